"""Auxiliary tasks: views in, inputs with known targets out. The registry is in rotssl.config.tasks."""
