"""A run on disk: its state and lock, its journal and its checkpoints."""
