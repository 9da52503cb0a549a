"""Gauges of a run for Prometheus, beside those of Ray, on the metrics port of the node whose process shows the run's events."""

import sys
import time
from collections.abc import Callable, Mapping

from rotssl.config import ResolvedConfig
from rotssl.engine.events import EpochDone, Event
from rotssl.runs import journal

TAGS = ("experiment", "run")
REFRESH_S = 5.0  # Ray forgets a gauge that is not set again within two of its reports, 20 seconds
# Ray puts ray_ in front of the names.
EPOCH, EPOCHS, LEFT = "rotssl_epoch", "rotssl_epochs", "rotssl_seconds_left"
METRICS = {  # those of a run's epochs, of which an epoch may lack some
    "throughput/images_per_second": "rotssl_images_per_second",
    "loss/total": "rotssl_loss",
    "knn/top1": "rotssl_knn_accuracy",
}
MEANING = {
    EPOCH: "Epochs that are done",
    EPOCHS: "Epochs of the whole run",
    LEFT: "Seconds of training until the run ends, at the mean pace so far",
    "rotssl_images_per_second": "Images per second of the last epoch, over all workers",
    "rotssl_loss": "Mean of the total loss over the last epoch",
    "rotssl_knn_accuracy": "Accuracy of the last kNN evaluation, from 0 to 1",
}


class Gauges:
    """The gauges of a run, which an earlier start's last epoch sets first.

    Args:
        config: of the run.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        from ray.util.metrics import Gauge

        self.epochs = config.train.epochs
        tags = dict(zip(TAGS, (config.tracking.experiment, config.tracking.run_name), strict=True))
        self._gauges = {name: Gauge(name, meaning, TAGS) for name, meaning in MEANING.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags(tags)
        self._values: dict[str, float] = {EPOCHS: self.epochs}
        points = journal.read(config.run_dir)
        known = {key: value for epoch in sorted(points) for key, value in points[epoch].items()}
        self._note(max(points, default=0), known)

    def handle(self, event: Event) -> None:
        """Set the gauges: after an epoch to its values, and on other events to what they were."""
        if isinstance(event, EpochDone):
            self._note(event.epoch, event.metrics)
        elif time.monotonic() >= self._due:
            self._set()

    def _note(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self._values[EPOCH] = epoch
        if epoch:
            self._values[LEFT] = journal.seconds_left({epoch: dict(metrics)}, self.epochs)
        self._values |= {name: metrics[key] for key, name in METRICS.items() if key in metrics}
        self._set()

    def _set(self) -> None:
        for name, value in self._values.items():
            self._gauges[name].set(value)
        self._due = time.monotonic() + REFRESH_S


def gauged(config: ResolvedConfig, show: Callable[[Event], None]) -> Callable[[Event], None]:
    """``show``, which sets the run's gauges, too, if this process is connected to Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return show
    gauges = Gauges(config)

    def handle(event: Event) -> None:
        gauges.handle(event)
        show(event)

    return handle
