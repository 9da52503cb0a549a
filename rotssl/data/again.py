"""The images of a run, when it is read again."""

import logging
import os
from pathlib import Path

from rotssl.base.paths import AnyPath
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.data import datasets
from rotssl.data.record import Record

log = logging.getLogger(__name__)


def check_there(root: str | None, moved: bool = True) -> None:
    """Check that the folder of a data set exists, where a look tells; one in an object store is not looked for.

    Args:
        root: ``data.root``.
        moved: whether it was there when the run was started.

    Raises:
        ConfigError: it does not.
    """
    if root is not None and "://" not in root and not Path(os.path.expanduser(root)).exists():
        why = "is not there any more; give the images' new place: --data.root DIR" if moved else "is not there"
        raise ConfigError(f"data.root: {root} {why}")


def images_of(config: ResolvedConfig, folder: AnyPath) -> datasets.Splits:
    """The images that a run was trained and validated on.

    Args:
        config: of the run; with a new ``data.root`` if they were moved.
        folder: of the run, whose record they are compared with.

    Raises:
        ConfigError: they are not there, or are others than the run's.
        DataError: one can't be read.
    """
    check_there(config.data.root)
    splits, reason = datasets.load(config.data, config.evaluation.holdout), ""
    try:
        reason = Record.compared(splits.record, folder)
    except ValueError as error:
        log.warning("%s; the images are not compared with those of the run", error)
    if reason:
        raise ConfigError(f"data.root: the run was trained on other images: {reason}")
    return splits
