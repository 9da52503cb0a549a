"""What everything else stands on: randomness, schedules, memory, collectives. Knows no configuration."""
