"""One run on disk: its state and lock, its journal, its checkpoints."""
