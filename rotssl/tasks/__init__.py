"""Auxiliary tasks: the contract, and the registry."""

from rotssl.tasks.base import Task
from rotssl.tasks.jigsaw import Jigsaw
from rotssl.tasks.rotation import Rotation

# Section of the configuration -> task. A task is built when the section's weight is above 0.
TASKS: dict[str, type[Task]] = {"rotation": Rotation, "jigsaw": Jigsaw}

__all__ = ["TASKS", "Jigsaw", "Rotation", "Task"]
