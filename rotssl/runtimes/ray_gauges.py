"""Gauges of a run for Prometheus, beside those of Ray, on the metrics port of the node whose process shows the run's events."""

import sys
from collections.abc import Callable, Mapping

from rotssl.config import ResolvedConfig
from rotssl.engine.events import EpochDone, Event
from rotssl.runs import journal

TAGS = ("experiment", "run")
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
        points = journal.read(config.run_dir)
        self._gauges[EPOCHS].set(self.epochs)
        self._set(
            max(points, default=0), {key: value for epoch in sorted(points) for key, value in points[epoch].items()}
        )

    def handle(self, event: Event) -> None:
        """Set the gauges after an epoch."""
        if isinstance(event, EpochDone):
            self._set(event.epoch, event.metrics)

    def _set(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self._gauges[EPOCH].set(epoch)
        if epoch:
            self._gauges[LEFT].set(journal.seconds_left({epoch: dict(metrics)}, self.epochs))
        for key, name in METRICS.items():
            if key in metrics:
                self._gauges[name].set(metrics[key])


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
