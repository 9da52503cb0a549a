"""Self-supervised pretraining with rotation prediction, on a Ray cluster."""

__version__ = "0.2.0"
