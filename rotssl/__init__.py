"""Self-supervised pretraining with rotation prediction, on a Ray cluster."""

__version__ = "0.1.0"
