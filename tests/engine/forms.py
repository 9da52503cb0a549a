"""Every form of every task, which the contract tests try with the methods."""

from rotssl.config.tasks import TASKS as REGISTRY
from tests.small_runs import PAPER

GROWS = {"views.size_start": 12, "views.size_until": 0.3}  # of 16 steps the first 5 are small
JIGSAW = {"jigsaw.weight": 1.0, "jigsaw.grid": 2, "jigsaw.permutations": 10}
DISJOINT = {"rotation.mode": "disjoint", "rotation.fraction_end": 0.125, "train.batch_size": 64}
EQUIVARIANCE = {"rotation.weight": 0, "equivariance.weight": 1.0, "train.batch_size": 64}
TASKS = {
    "off": {"rotation.weight": 0},
    "extra": PAPER,
    "one small view": {**PAPER, "rotation.views": 1, "rotation.resolution": 0.5},
    "extra, half": {**PAPER, "rotation.fraction": 0.5},
    "extra, BN kept": {**PAPER, "rotation.update_bn": False},
    "joint, half": {**PAPER, "rotation.joint": True, "rotation.fraction": 0.5},
    "four way": {"rotation.mode": "four_way"},
    "four way, half": {"rotation.mode": "four_way", "rotation.fraction": 0.5},
    "jigsaw": {"rotation.weight": 0, **JIGSAW},
    "rotation and jigsaw": {**PAPER, **JIGSAW},
    "shared": {},
    "independent": {"rotation.angles": "independent"},
    "shared, fewer": {"rotation.fraction": 0.5, "rotation.fraction_end": 0.25},
    "shared and jigsaw": JIGSAW,
    "disjoint": DISJOINT,
    "disjoint on the projector": {**DISJOINT, "rotation.head_on": "projector"},
    "conditioned": {"rotation.conditioned": True},
    "conditioned, independent": {"rotation.conditioned": True, "rotation.angles": "independent"},
    "on a stage": {"rotation.head_on": "stage"},
    "extra on a stage": {**PAPER, "rotation.head_on": "stage"},
    "on the stem": {"rotation.head_on": "stem"},
    "extra on the first stage": {**PAPER, "rotation.head_on": "stage1"},
    "augment": {"rotation.mode": "augment"},
    "contrastive": {"rotation.loss": "contrastive"},
    "contrastive, fewer, extra": {**PAPER, "rotation.loss": "contrastive", "rotation.fraction": 0.7},
    "contrastive, four way": {"rotation.mode": "four_way", "rotation.loss": "contrastive"},
    "cosine, fewer, extra": {**PAPER, "rotation.loss": "cosine", "rotation.fraction": 0.7},
    "split": {"views.split": 2},
    "two angles": {"rotation.degrees": (0, 180)},
    "eight angles": {**PAPER, "rotation.degrees": tuple(range(0, 360, 45))},
    "shared, by share": {"rotation.share": 0.2},
    "equivariance": EQUIVARIANCE,
    "equivariance, by share": {**EQUIVARIANCE, "equivariance.weight": "auto", "equivariance.share": 0.2},
    "equivariance and jigsaw, extra": {**EQUIVARIANCE, **JIGSAW, **PAPER, "rotation.weight": 1.0},
    "extra and jigsaw, by share": {**PAPER, **JIGSAW, "rotation.share": 0.3, "jigsaw.weight": "auto"},
}
# A task that has no form of its own above is tried as it comes.
for name in REGISTRY:
    if not any(f"{name}." in key for form in TASKS.values() for key in form):
        TASKS[name] = {"rotation.weight": 0, f"{name}.weight": 1.0}
