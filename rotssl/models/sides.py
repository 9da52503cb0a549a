"""Which sides of views an encoder accepts, asked before a run starts."""

import functools

from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.sections import EncoderConfig


def check(config: ResolvedConfig) -> None:
    """Ask timm whether an encoder of its own accepts all views.

    Raises:
        ConfigError: it does not; the message names the field that sets the side.
    """
    encoder, whole, start = config.encoder, config.data.image_size, config.views.size_start
    for key, side in _sides(config, 1.0).items():
        if reason := _objection(encoder, whole, side):
            raise ConfigError(f"{key}: got {side}, but {encoder.name} does not accept images of this size ({reason})")
    if start is None:
        return
    _objection(encoder, start, start)  # raises if a patch is larger than the first views
    for side in _sides(config, 0.0).values():
        if reason := _objection(encoder, whole, side):
            words = f"but {encoder.name} does not accept images of {side} pixels ({reason})"
            raise ConfigError(f"views.size_start: got {start}, {words}")


def _sides(config: ResolvedConfig, progress: float) -> dict[str, int]:
    """Sides in pixels of all kinds of views at a progress of the run, by the field that sets them."""
    views, whole = config.views, config.data.image_size
    now = views.side_at(progress, whole, whole)
    sides = {"data.image_size": now}
    sides |= {"views.local_size": views.side_at(progress, views.local_size, whole)} if views.local_count else {}
    sides |= {"views.split": now // 2} if views.split == 2 else {}
    for name, task in config.active().items():
        at_end = task.sides(whole)
        for leaf, side in task.sides(now).items():
            # A side that does not follow that of the global views is that of a crop of the task's own.
            sides[f"{name}.{leaf}"] = views.side_at(progress, side, whole) if side == at_end[leaf] else side
    return sides


@functools.cache  # a sweep asks for every trial
def _objection(encoder: EncoderConfig, image_size: int, side: int) -> str:
    """Why an encoder built for one image size does not accept another; empty if it does."""
    import torch

    from rotssl.models.encoders import build_encoder

    with torch.device("meta"):
        model, _ = build_encoder(image_size=image_size, **vars(encoder))
        try:
            model(torch.empty(2, 3, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            return str(error)
    return ""
