"""The encoder of a finished run: the one that it exported, or its other network, from the newest checkpoint."""

from torch import nn

from rotssl.base.paths import AnyPath
from rotssl.config.fields import ConfigError
from rotssl.models.encoders import FACTS, WEIGHTS, facts, read_encoder, read_facts, restored
from rotssl.runs import checkpoint
from rotssl.runs.state import recorded

PREFIX = {"student": "encoder.", "teacher": "teacher.0."}  # of the names in a checkpoint's model


def network_of(folder: AnyPath, network: str, exported: str, epoch: int) -> nn.Module:
    """The student's or the teacher's encoder after the last epoch, in evaluation mode, (B, 3, S, S) -> (B, D).

    Args:
        folder: of the run.
        network: ``student`` or ``teacher``.
        exported: which of the two the run has exported (``evaluation.network``; without a teacher it is the student).
        epoch: of the run's end, 1-based.

    Raises:
        ConfigError: a file is missing, the method has no teacher, or the newest checkpoint is of an earlier epoch.
    """
    for name in (FACTS, WEIGHTS):
        if not (folder / name).exists():
            raise ConfigError(f"--checkpoint: no {name} in {folder}; the command that trained the run writes it again")
    try:
        about, known = read_facts(folder / FACTS), facts(recorded(folder))
        if differ := [f"{key} {about[key]}" for key in ("encoder", "stem", "norm") if about[key] != known[key]]:
            raise ConfigError(f"it is of another encoder than the run: {', '.join(differ)}")
        encoder, _ = read_encoder(folder)
    except (ConfigError, ValueError, KeyError, RuntimeError) as error:  # cut short, or of another network
        why = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(f"--checkpoint: {WEIGHTS} in {folder} cannot be read ({why})") from error
    if network == exported:
        return encoder
    state = next(checkpoint.latest(folder), None)
    if state is None:
        raise ConfigError(
            f"--network: the {network} is read from a checkpoint, and {folder} has none that can be read; "
            f"the {exported} is in encoder.safetensors"
        )
    if state["epoch"] != epoch:
        raise ConfigError(f"--network: the newest checkpoint in {folder} is of epoch {state['epoch']}, not {epoch}")
    prefix = PREFIX[network]
    weights = {key.removeprefix(prefix): value for key, value in state["model"].items() if key.startswith(prefix)}
    if not weights:
        raise ConfigError(f"--network: got {network}, expected student, for the run's method has no teacher")
    where = folder / checkpoint.place(state) / checkpoint.FILE
    return restored(about, weights, where)[0]
