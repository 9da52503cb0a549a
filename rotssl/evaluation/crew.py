"""Independent work of an evaluation, and who does it: this process, or workers that share it.

Work is shared by tasks, not by DDP: features of parts of the images, a changed copy of the test images, a training with one rate
or one seed. A task is computed by one worker alone, with the seeds, the batches and the BatchNorm statistics that it has
everywhere. So the numbers are those of one process to the bit, on equal devices with equal numbers of threads, whatever the
number of workers; and most protocols have more tasks than a cluster has workers. DDP would sum gradients in another order, and
divide batches of 16 images on the small parts with labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class WorkersGone(Exception):
    """Workers of an evaluation are lost for good; the text is the one line to print. Exit code 1."""


@dataclass(frozen=True)
class Task:
    """A method of ``Subject``, and its arguments.

    Attributes:
        name: of the method.
        args: its arguments; what ``Crew.share`` returned stands for what was shared.
        title: a line that is said when the task starts; empty: none.
    """

    name: str
    args: tuple[Any, ...]
    title: str = ""


class Crew(Protocol):
    """Does tasks.

    Attributes:
        count: how many tasks it does at a time.
    """

    count: int

    def share(self, value: Any) -> Any:
        """What stands for a tensor, or something else with ``to(device)``, in the arguments of tasks: it is sent once."""

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """What the tasks return, in their order."""


class Here:
    """This process does the tasks, one after the other.

    Args:
        work: does one.
        say: called with their titles.
    """

    count = 1

    def __init__(self, work: Callable[[Task], Any], say: Callable[[str], None]) -> None:
        self.work, self.say = work, say

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """What the tasks return."""
        found = []
        for task in tasks:
            if task.title:
                self.say(task.title)
            found.append(self.work(task))
        return found
