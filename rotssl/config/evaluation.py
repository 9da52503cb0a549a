"""The section evaluation of a configuration, and the names of the protocols. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from rotssl.config.fields import Auto, opt

Protocol = Literal["knn", "linear", "semi", "sgd", "finetune", "fewshot", "robustness"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training."""

    knn_every: int | Auto = opt(
        1,
        "Evaluate kNN on validation every N epochs; 0: never; auto: after the first epoch of a start and after the last one, and "
        "in between as often as takes, with checkpoints, at most 5% of the training time.",
        ge=0,
    )
    bank: int | None = opt(
        None,
        "Training images, as many of each class, whose features kNN and the probe compare with; default: all.",
        ge=200,
        later=True,
    )
    knn_k: int = opt(200, "Number of neighbours of kNN.", ge=1, le=1000, later=True)
    knn_temperature: float = opt(0.1, "Temperature of kNN's votes, exp(cosine / T).", gt=0, later=True)
    network: Literal["student", "teacher"] = opt(
        "student",
        "Encoder that is evaluated and exported: the trained one, or its moving average, as DINO's authors do.",
        later=True,
    )
    knn_bf16: bool = opt(
        False, "Compute kNN's cosines in bf16, for large banks on devices that support it; a few predictions change."
    )
    linear: bool = opt(True, "Train a linear probe on the features of the last epoch.")
    holdout: float = opt(
        0.1,
        "Share of the training images held out for validation if the data set has no validation split; 0: train on all of them "
        "and evaluate once, at the end, on the test split.",
        ge=0,
        lt=1,
    )
    protocols: tuple[Protocol, ...] | None = opt(
        None,
        "Protocols by which a finished run is evaluated on test, as jobs/evaluate.py does with its defaults, such as "
        "knn,linear,semi; default: none. Nothing is chosen by these numbers.",
        later=True,
    )
