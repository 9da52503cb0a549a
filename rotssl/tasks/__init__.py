"""Auxiliary tasks: views to inputs with known targets, and their losses. The registry is in rotssl.config.tasks."""
