"""``train.budget``: the epochs that a number of minutes holds, chosen at the first start of a run and kept by later ones."""

import math
from contextlib import ExitStack

from rotssl import config as cfg
from rotssl.commands import say
from rotssl.config import Config, ResolvedConfig
from rotssl.config.fields import ConfigError, require
from rotssl.data.datasets import DataInfo
from rotssl.lifecycle import prepare
from rotssl.runs.state import RunState


def planned(asked: Config, resolved: ResolvedConfig, info: DataInfo, stack: ExitStack | None) -> ResolvedConfig:
    """The resolved configuration with as many epochs as its budget holds, in place of the budget.

    Args:
        asked: from ``build``, with a budget.
        resolved: ``prepare`` of it.
        info: facts about its data.
        stack: where a connection to the cluster is left, on a worker of which a few steps are timed; None: they are timed here.

    Raises:
        ConfigError: the budget does not hold an epoch, the configuration does not fit the epochs, or the steps can't be timed.
    """
    minutes, epochs = asked.train.budget, RunState.epochs_of(resolved)
    assert minutes is not None
    if epochs is None:
        each = _epoch_seconds(resolved, info, stack)
        epochs = int(60 * minutes / each)
        expected = f"at least {math.ceil(each / 0.6) / 100:g} minutes: an epoch takes so long by a few timed steps"
        require(epochs > 0, "train.budget", f"{minutes:g}", expected)
        say(f"train.epochs {epochs}: an epoch takes {each:.3g} s by a few timed steps; start-up is not counted")
    else:
        say(f"train.epochs {epochs}, as at the first start")
    fields = {"train.epochs": epochs, "train.budget": None, "tracking.run_name": resolved.tracking.run_name}
    config = cfg.build(cfg.flat(cfg.replace(asked, fields)))  # which checks the rules for this length
    return prepare(config, info, say=lambda line: None)[0]  # its lines have been said


def _epoch_seconds(config: ResolvedConfig, info: DataInfo, stack: ExitStack | None) -> float:
    """Seconds of an epoch with its evaluation, from a few timed steps."""
    if stack is None:
        from rotssl.engine import estimate, hardware

        asked = config.scaling.num_workers
        count = 1 if asked == "auto" else max(1, asked)
        return estimate.estimate_runs([config], [info.train_size], count, hardware.uses_gpu(config))[0]
    from rotssl.runtimes import preflight, ray_cluster
    from rotssl.runtimes.ray_tune import Slots

    workers = stack.enter_context(ray_cluster.connected(config))
    slots = Slots(1, workers.count, workers.use_gpu, {"GPU": 1.0} if workers.use_gpu else {})
    found = preflight.estimated(preflight.start_estimate([config], [info.train_size], slots))
    if found is None:
        raise ConfigError("train.budget: the cluster has no room for timing a few steps; give train.epochs")
    return found[0]
