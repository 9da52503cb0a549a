"""MLflow's system metrics of a run: how much the machines that train were used.

They are not in the journal, and nothing is done for one that the store does not take.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rotssl.config.sections import OFF
from rotssl.engine.events import Usage
from rotssl.tracking.store import client_of, short

log = logging.getLogger(__name__)
KEPT = 100  # samples that wait for the store; of more the oldest go
REST_S = 20.0  # without samples after the store did not answer: each try may hold up the epochs for its patience
AT_ONCE = 1000  # metrics that MLflow takes in one request


def of_epochs(names: Iterable[str]) -> list[str]:
    """The names of metrics that are of a run's epochs, and not of its machines."""
    return [name for name in names if not name.startswith(Usage.PREFIX)]


class SystemMetrics:
    """Logs samples to a run in MLflow; only ``add`` may be called from another thread.

    The step of a sample is the second of the run, from its first start on. So all machines have the same steps, and they go on
    rising in later starts.

    Args:
        uri: URI of the tracking store, or OFF.
        run_id: id of the run.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._samples: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=KEPT)
        self._client: Any = None
        self._began = 0  # the run's start, in milliseconds since 1970
        self._steps: dict[str, int] = {}  # the last one of each metric in this start
        self._rest = 0.0  # until when nothing is sent, on time.monotonic()'s clock

    def add(self, metrics: Mapping[str, float]) -> None:
        """Note a sample of now, for the next ``send``."""
        if self.uri != OFF:
            self._samples.append((int(time.time() * 1000), metrics))

    def rest(self) -> None:
        """Drop what was added, and send nothing for a while: the store does not answer."""
        self._rest = time.monotonic() + REST_S
        self._samples.clear()

    def send(self) -> None:
        """Log what was added, or drop it if the store does not answer."""
        if time.monotonic() < self._rest:
            self._samples.clear()
        if not self._samples:
            return
        try:
            if self._client is None:
                client = client_of(self.uri)
                self._began = client.get_run(self.run_id).info.start_time
                self._client = client
            metrics = self._taken()
            for first in range(0, len(metrics), AT_ONCE):
                self._client.log_batch(self.run_id, metrics=metrics[first : first + AT_ONCE])
        except (
            Exception
        ) as error:  # any error of the store or the network; of the epochs, which matter, the Tracker warns
            log.debug("samples of the machines are dropped (%s)", short(error))
            self.rest()

    def _taken(self) -> list[Any]:
        """The samples as MLflow's metrics, without those that came in the same second as others of the same name."""
        from mlflow.entities import Metric

        found = []
        while self._samples:
            at, metrics = self._samples.popleft()
            step = max(0, at - self._began) // 1000
            for key, value in metrics.items():
                if step > self._steps.get(key, -1):
                    self._steps[key] = step
                    found.append(Metric(key, value, at, step))
        return found
