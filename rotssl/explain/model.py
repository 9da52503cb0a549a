"""The whole model of a run, with the heads of its tasks, from its newest checkpoint."""

import torch

from rotssl.base.errors import in_a_line
from rotssl.base.paths import AnyPath
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.engine.pretrainer import Pretrainer, build_pretrainer
from rotssl.models.networks import check_encoder
from rotssl.runs import checkpoint


def restored(folder: AnyPath, config: ResolvedConfig, device: torch.device) -> tuple[Pretrainer, int]:
    """The model in evaluation mode, without gradients of its weights, and the number of epochs behind it.

    Raises:
        ConfigError: the run has no checkpoint of a whole epoch that can be read, or it is of another run, or of other networks.
    """
    state = next(checkpoint.latest(folder), None)  # one within an epoch would not be of the epoch that it says
    if state is None:
        raise ConfigError(f"{folder} has no checkpoint that can be read, of a whole epoch")
    checkpoint.check_same(folder, state, config)
    model = build_pretrainer(config, device)
    check_encoder(model.encoder, config, folder, state)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        where = folder / checkpoint.place(state) / checkpoint.FILE
        raise ConfigError(f"{where} is of other networks than the run ({in_a_line(error)})") from error
    return model.eval().requires_grad_(False), int(state["epoch"])
