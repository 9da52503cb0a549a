"""The alarm of a run that collapses, while it trains."""

from collections.abc import Mapping
from typing import Literal

from rotssl.base import distributed
from rotssl.engine.events import Facts, Note
from rotssl.engine.runtime import RunFailed, Runtime
from rotssl.runs.health import collapsed
from rotssl.runs.journal import Points


class Alarm:
    """Looks at each epoch's metrics, with those before it.

    Args:
        action: ``flag``: say it once, on the terminal and as the tag ``collapsed``; ``stop``: end the run.
        points: of earlier starts.
        runtime: environment of the run.
    """

    def __init__(self, action: Literal["flag", "stop"], points: Points, runtime: Runtime) -> None:
        self.action, self.runtime, self.told = action, runtime, False
        self.points = {epoch: dict(point) for epoch, point in points.items()}

    def see(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Look at an epoch (1-based); every worker must call it.

        Raises:
            RunFailed: the run has collapsed, and ``action`` is ``stop``.
        """
        self.points[epoch] = dict(metrics)
        # Rank 0 may know more than the others: its journal, and what it evaluated.
        why = distributed.first_nonempty(collapsed(self.points) or "", self.runtime.device)
        if why and self.action == "stop":
            raise RunFailed(why)
        if why and not self.told:
            self.told = True
            self.runtime.progress(Note(f"warning: {why}; the run goes on (train.on_collapse flag)"))
            self.runtime.progress(Facts({"collapsed": why}))
