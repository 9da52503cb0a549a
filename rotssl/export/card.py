"""A folder as Hugging Face has them: weights, config.json, and a model card that is made from the run's records."""

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml
from torch import nn

import rotssl
from rotssl.base.files import write_whole
from rotssl.config.datasets import DATASETS
from rotssl.config.fields import ConfigError
from rotssl.config.rules import labels_used
from rotssl.export import formats
from rotssl.export.encoder import Encoder
from rotssl.export.records import Records
from rotssl.export.source import CARD_FACTS, CARD_WEIGHTS, in_folder
from rotssl.models.encoders import packed

README = "README.md"
_COSTS = {
    "cost/epochs": ("epochs", "{:g}"),
    "cost/samples": ("images seen", "{:,.0f}"),
    "cost/train_seconds": ("training time", "{:,.0f} s"),
    "cost/device_seconds": ("device time, all workers", "{:,.0f} s"),
    "cost/flops": ("compute", "{:.3g} FLOPs"),
}


def write(encoder: Encoder, records: Records, folder: Path, licence: str | None = None) -> tuple[str, float]:
    """Write the folder and read it again, also by timm if it has the encoder.

    Args:
        encoder: on the CPU.
        records: of its run.
        folder: to write to; exists.
        licence: of the weights, as Hugging Face names it; None: not stated.

    Returns:
        The file of weights, and the largest difference of the features.

    Raises:
        ConfigError: what was read again has other features.
    """
    fits = not formats.misfit(encoder, "timm")
    write_whole(folder / CARD_WEIGHTS, packed(encoder.network))
    write_whole(folder / CARD_FACTS, json.dumps(_config(encoder, fits), indent=2) + "\n")
    write_whole(folder / README, card(encoder, records, licence))
    gaps = [formats.gap(encoder, again) for again in (in_folder(folder), *([_by_timm(folder)] if fits else []))]
    for found in gaps:
        if not found <= formats.TOLERANCE:
            raise ConfigError(
                f"--format: huggingface gives other features than the encoder: they differ by {found:.1g}"
            )
    return CARD_WEIGHTS, max(gaps)


def _by_timm(folder: Path) -> nn.Module:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _config(encoder: Encoder, fits: bool) -> dict[str, Any]:
    """The content of config.json: for ``rotssl.load_encoder``, and for ``timm.create_model`` if timm has the encoder."""
    if not fits:
        return {"num_features": encoder.dim, "rotssl": encoder.about}
    arguments = formats.timm_arguments(encoder.about)
    side = encoder.image_size
    return {
        "architecture": arguments.pop("model_name").partition(".")[0],
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "mean": _three(encoder.mean),
            "std": _three(encoder.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
        },
        "rotssl": encoder.about,
    }


def _three(values: tuple[float, ...]) -> list[float]:
    return list(values) * (3 // len(values))


def card(encoder: Encoder, records: Records, licence: str | None = None) -> str:
    """The model card; the arguments are those of ``write``."""
    source = (Path(__file__).with_name("card.md.j2")).read_text()
    template = jinja2.Environment(  # noqa: S701 - markdown, not HTML
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(source)
    config = records.config
    epoch = encoder.about.get("epoch", records.epochs)  # of the checkpoint, if the weights are from one
    at_end = epoch == records.epochs
    measures = records.of_network(encoder.about["network"]) if at_end else ()
    return template.render(
        epoch=epoch,
        measures=measures,
        encoder=encoder,
        about=encoder.about,
        timm=not formats.misfit(encoder, "timm"),
        records=records,
        config=config,
        labels=labels_used(config),
        spec=DATASETS[config.data.name],
        tasks=sorted(config.active()),
        costs=[
            (words, form.format(records.last[k])) for k, (words, form) in _COSTS.items() if at_end and k in records.last
        ],
        recipe=yaml.safe_dump(records.recipe, sort_keys=True, width=110).strip(),
        licence=licence,
        version=rotssl.__version__,
    )
