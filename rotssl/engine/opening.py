"""What a start checks and says before its first step: the images, and what follows from them and from the machine."""

import logging
from collections.abc import Iterator
from typing import Any

from rotssl.base.paths import AnyPath
from rotssl.config import ResolvedConfig
from rotssl.config.fields import require
from rotssl.config.methods import METHODS
from rotssl.config.rules import labels_used, reads_labels
from rotssl.data.datasets import Splits
from rotssl.data.images import Labels, other_images
from rotssl.data.record import Record
from rotssl.engine.hardware import emulates_bf16
from rotssl.engine.runtime import RunFailed

log = logging.getLogger(__name__)


def check_images(splits: Splits, sketch: dict[str, Any], state: dict[str, Any], folder: AnyPath) -> None:
    """Check that a run resumes with the images that it was started with; runs without a record of them go on.

    Args:
        splits: the images now.
        sketch: their sketch.
        state: the checkpoint that the run resumes from.
        folder: the run's folder.

    Raises:
        RunFailed: it has other images; the message says how they differ.
    """
    reason = ""
    try:
        reason = Record.compared(splits.record, folder)
    except ValueError as error:
        log.warning("%s; the images are compared with the checkpoint's sketch only", error)
    if reason := reason or other_images(sketch, state.get("images")):
        raise RunFailed(
            f"data.root: the run was started with other images: {reason}; restore them, or choose another tracking.run_name"
        )


def labels_of(config: ResolvedConfig, splits: Splits) -> Labels | None:
    """The labels that the training reads, (N,); None if it reads none.

    Raises:
        ConfigError: they have more classes than the classifier of supervised training.
    """
    labels = splits.train.labels if reads_labels(config) else None
    if labels is not None and METHODS[config.method.name].labels:
        count, width = int(labels.max()) + 1, config.method.out_dim
        require(width >= count, "method.out_dim", width, f"{count} or more, the number of classes")
    return labels


def lines(splits: Splits, config: ResolvedConfig, device: str, done: int, step: int) -> Iterator[str]:
    """What to tell the user.

    Args:
        splits: the images.
        config: of the run.
        device: kind of device.
        done: number of epochs that earlier starts did.
        step: number of steps that they did of the next one.
    """
    train = config.train
    if how := labels_used(config):
        yield f"LABELS ARE USED IN PRETRAINING: {how}; this run is an analysis, not self-supervised"
    yield from splits.lines
    if step:
        yield f"resuming within epoch {done + 1}, after {step} of its steps"
    elif train.init_from and not done:
        yield f"starting with the weights of {train.init_from}"
    elif done:
        yield f"resuming after epoch {done}"
    bank, k = len(splits.train), config.evaluation.knn_k
    measured = splits.validation if splits.validation is not None else splits.test
    if measured is not None and bank < k:
        yield f"kNN uses k={bank} instead of {k}: there are no more training images"
    if (train.precision, device) == ("bf16", "cpu") and emulates_bf16():
        yield "train.precision bf16: this processor has no bf16 instructions; fp32 is many times faster here"
