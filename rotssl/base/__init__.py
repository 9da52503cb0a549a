"""The foundation of all other packages: randomness, schedules, memory, collectives. Independent of the configuration."""
