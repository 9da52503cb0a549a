"""Which numbers an evaluation is to measure: their keys in MLflow, and the settings that each depends on. Imports no torch.

A key names everything that tells two numbers of one run apart, so that what was measured is known by its key: ``knn/top1`` and
``linear/top1`` have the run's own settings, as the curves have them.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotssl.config.evaluating import KNN_PRESETS, SGD_EPOCHS, SGD_RATES, FinetuneOptions, Options, finetune_epochs
from rotssl.config.evaluation import EvaluationConfig
from rotssl.config.fields import ConfigError, nearest
from rotssl.evaluation.subsets import percent

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur", "defocus_blur", "zoom_blur"),
    *("brightness", "contrast", "pixelate", "jpeg"),
)


@dataclass(frozen=True)
class Number:
    """A number to measure.

    Attributes:
        protocol: of PROTOCOLS.
        key: its metric.
        settings: what it depends on, beside the encoder and the images.
    """

    protocol: str
    key: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The key without what is measured, for files and hits."""
        return self.key.rsplit("/", 1)[0]


def plan(
    protocols: Sequence[str], options: Options, evaluation: EvaluationConfig, network: str, other: str = ""
) -> list[Number]:
    """The numbers of some protocols.

    Args:
        protocols: of PROTOCOLS.
        options: of the command.
        evaluation: of the run.
        network: student or teacher; it is in the key if it is not the one that the run has evaluated.
        other: name of another data set, which then is in the key.

    Raises:
        ConfigError: there is no such corruption.
    """
    prefix = ("" if network == evaluation.network else f"{network}/") + (f"transfer/{other}/" if other else "")
    plans = {
        "knn": _knn,
        "linear": _linear,
        "semi": _semi,
        "sgd": _sgd,
        "finetune": _finetune,
        "fewshot": _fewshot,
        "robustness": _robustness,
    }
    return [
        Number(name, f"{prefix}{key}", settings)
        for name in protocols
        for key, settings in plans[name](options, evaluation)
    ]


Numbers = Iterator[tuple[str, dict[str, Any]]]


def _other(settings: object, default: object, *but: str) -> str:
    """A suffix for settings that are not the default ones, beside some fields that the key already names."""
    ours, usual = (
        {key: value for key, value in dataclasses.asdict(part).items() if key not in but}  # type: ignore[call-overload]
        for part in (settings, default)
    )
    return "" if ours == usual else f"_{hashlib.sha256(repr(sorted(ours.items())).encode()).hexdigest()[:6]}"


def _knn(options: Options, evaluation: EvaluationConfig) -> Numbers:
    given, preset = options.knn, KNN_PRESETS.get(options.knn.preset or "", {})
    ks = given.k or preset.get("k", (evaluation.knn_k,))
    temperatures = given.temperature or preset.get("temperature", (evaluation.knn_temperature,))
    distances = given.distance or preset.get("distance", ("cosine",))
    usual = evaluation.knn_k, evaluation.knn_temperature
    for k, temperature in itertools.product(ks, temperatures):
        if "cosine" in distances:
            key = "knn/top1" if (k, temperature) == usual else f"knn/k{k}_T{temperature:g}/top1"
            yield key, {"distance": "cosine", "k": k, "temperature": temperature}
    for k in ks if "euclidean" in distances else ():
        yield f"knn/k{k}_euclidean/top1", {"distance": "euclidean", "k": k}


def _linear(options: Options, evaluation: EvaluationConfig) -> Numbers:
    yield "linear/top1", {}


def _semi(options: Options, evaluation: EvaluationConfig) -> Numbers:
    seed = options.semi.seed
    for share in options.semi.shares:
        yield f"semi/{percent(share)}{f'_seed{seed}' if seed else ''}/top1", {"share": share, "split_seed": seed}


def _sgd(options: Options, evaluation: EvaluationConfig) -> Numbers:
    given = options.sgd
    # What is given as it would be without it is the same number.
    lr = None if given.lr == (SGD_RATES[given.preset],) else given.lr
    ours = dataclasses.replace(given, lr=lr, epochs=None if given.epochs == SGD_EPOCHS else given.epochs)
    suffix = _other(ours, type(given)(), "preset")
    yield f"sgd/{given.preset}{suffix}/top1", dataclasses.asdict(ours)


def _finetune(options: Options, evaluation: EvaluationConfig) -> Numbers:
    given, seed = options.finetune, options.semi.seed
    for share in given.shares:
        ours = dataclasses.replace(given, epochs=None if given.epochs == finetune_epochs(share) else given.epochs)
        suffix = _other(ours, FinetuneOptions(), "shares") + (f"_seed{seed}" if seed else "")
        settings = {**dataclasses.asdict(ours), "share": share, "split_seed": seed}
        del settings["shares"]
        yield f"finetune/{percent(share)}{suffix}/top1", settings


def _fewshot(options: Options, evaluation: EvaluationConfig) -> Numbers:
    given = options.fewshot
    suffix = _other(given, type(given)(), "ways", "shots")
    for shots in given.shots:
        settings = {**dataclasses.asdict(given), "shots": shots}
        yield f"fewshot/{given.ways}way_{shots}shot{suffix}/top1", settings


def _robustness(options: Options, evaluation: EvaluationConfig) -> Numbers:
    given = options.robustness
    common = {"k": evaluation.knn_k, "temperature": evaluation.knn_temperature, "noise_seed": given.seed}
    for name in given.corruptions or ():
        if name not in CORRUPTIONS:
            expected = f"one or more of {', '.join(CORRUPTIONS)}{nearest(name, CORRUPTIONS)}"
            raise ConfigError(f"robustness.corruptions: got {name!r}, expected {expected}")
    for angle in given.angles:
        yield f"robustness/rotate_{angle:g}/knn/top1", {**common, "angle": angle}
    suffix = f"_seed{given.seed}" if given.seed else ""
    for name, severity in itertools.product(given.corruptions or CORRUPTIONS, given.severities):
        settings = {**common, "corruption": name, "severity": severity}
        yield f"robustness/{name}_{severity}{suffix}/knn/top1", settings
