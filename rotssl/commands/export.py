"""The driver of an export: the encoder of a run, in the formats of other libraries."""

from collections.abc import Sequence

from rotssl.base.paths import filled_whole
from rotssl.commands import EXIT_OK, folder_of, run_at, say
from rotssl.config.fields import ConfigError
from rotssl.config.sections import OFF
from rotssl.tracking import reader

FILES = ("safetensors", "torchvision", "timm", "onnx", "huggingface")
FORMATS = (*FILES, "mlflow")
DEFAULT = "safetensors,huggingface"


def formats_of(given: str) -> tuple[str, ...]:
    """The formats in a list of names; ``all`` stands for those that are files.

    Raises:
        ConfigError: one is unknown.
    """
    names = tuple(dict.fromkeys(given.split(",")))
    if not set(names) <= {*FORMATS, "all"}:
        raise ConfigError(f"--format: got {given!r}, expected one or more of {', '.join(FORMATS)}, or all")
    return names


def export(
    run_id: str | None,
    folder: str | None,
    names: Sequence[str],
    output: str | None,
    network: str,
    uri: str,
    model: str | None = None,
    licence: str | None = None,
) -> int:
    """Carry out jobs/export.py; returns the exit code.

    Args:
        run_id: id of the run in MLflow, or None.
        folder: folder of the run, if there is no run_id.
        names: formats; ``all``: all files that fit the encoder, those that don't are said.
        output: folder to write to; None: ``export`` in the run's folder.
        network: ``student``, ``teacher``, or ``auto``.
        uri: URI of the tracking store that has the run_id.
        model: name of the registered model; None: the run's.
        licence: of the weights, for the model card.

    Raises:
        ConfigError: there is no such encoder, or a format does not fit it.
    """
    from rotssl.export import card, formats, records, served
    from rotssl.export.source import in_folder

    place = run_at(folder or reader.run_folder_of(uri, str(run_id)))
    known = records.read(place)
    if "mlflow" in names and (known.state.uri == OFF or known.state.run_id is None):
        raise ConfigError(f"--format: mlflow does not fit: {place} is of a run that is not in MLflow")
    encoder = in_folder(place, network)
    wanted = [name for name in FORMATS if name in names or ("all" in names and name in FILES)]
    for name in list(wanted):
        if reason := formats.misfit(encoder, name):
            if name in names:
                raise ConfigError(f"--format: {name} does not fit: {reason}")
            say(f"{name} is left out: {reason}")
            wanted.remove(name)
    target = place / "export" if output is None else folder_of("--output", output)
    print(f"the {encoder.about['network']} of {place.name}, {encoder.dim} features:")
    for name in wanted:
        if name == "mlflow":
            where, gap = served.register(encoder, known, model or place.name)
            if not gap <= formats.TOLERANCE:
                raise ConfigError(f"--format: {where} gives other features than the encoder: they differ by {gap:.1g}")
            _say(name, where, gap)
            continue
        within = target / formats.FOLDER if name == "huggingface" else target
        with filled_whole(within) as here:
            if name == "huggingface":
                file, gap = card.write(encoder, known, here, licence)
            else:
                file, gap = formats.write(encoder, name, here)
        _say(name, str(within / file), gap)
    return EXIT_OK


def _say(name: str, where: str, gap: float) -> None:
    print(f"{name:12} {where}  (read again: features differ by {gap:.1g})", flush=True)
