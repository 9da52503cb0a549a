"""The paper's own analysis in numbers, to be set beside ours.

From the workshop version of Addepalli et al. 2022 (arXiv 2210.09866), whose tables and figures have these names: Addepalli,
Bhogale, Dey and Babu, "Towards Efficient and Effective Self-Supervised Learning of Visual Representations", NeurIPS 2021 Workshop
"Self-Supervised Learning: Theory and Practice". Accuracies are in percent, of a linear classifier on the test set, ResNet-18.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

PLAIN, ROTATION, ALONE = "plain", "rotation", "rotation alone"
Line = Mapping[object, float]  # value of the varied field -> accuracy in percent


@dataclass(frozen=True)
class Study:
    """One question of the paper's analysis.

    Attributes:
        title: what is varied, in a few words.
        field: the field that our runs vary.
        default: its value in runs that do not have it.
        beside: another field of text that belongs to the value where it differs from this default: ``extra, contrastive``.
        axis: its name on the plot's axis.
        source: where the paper's numbers are.
        paper: method -> ``plain``, ``rotation`` or ``rotation alone`` -> line. A line without the field has one value, at None.
        percent: whether the field is a share, shown in percent.
        paper_axis: what the paper varies, if it is not the same; then only first and last values are compared.
        remark: how the paper's setting differs from ours, if it does.
    """

    title: str
    field: str
    default: str
    axis: str
    source: str
    paper: Mapping[str, Mapping[str, Line]]
    percent: bool = False
    paper_axis: str = ""
    remark: str = ""
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _tenths(*accuracies: float) -> dict[object, float]:
    return {i / 10: accuracy for i, accuracy in enumerate(accuracies)}


FORMS: Line = {"extra": 91.89, "extra, contrastive": 90.19, "extra, cosine": 88.95, "in_place": 87.75, "augment": 79.70}
_TABLE2: Mapping[str, Mapping[str, Line]] = {
    "byol": {
        PLAIN: {0.0: 63.64, 0.25: 64.50, 0.5: 66.30, 1.0: 66.72},
        ROTATION: {0.0: 68.62, 0.25: 68.30, 0.5: 68.90, 1.0: 70.26},
    }
}
_C10, _C100 = "CIFAR-10, 200 epochs", "CIFAR-100, 200 epochs"
STUDIES = {
    "table1": Study(
        "False negatives removed by an oracle",
        "oracle.false_negatives",
        "0.0",
        "share of the images whose label the oracle knows",
        f"table 1, {_C10}",
        {
            "simclr": {
                PLAIN: {0.0: 88.77, 0.3: 92.26, 0.5: 92.93, 1.0: 93.27},
                ROTATION: {0.0: 90.91, 0.3: 93.94, 0.5: 94.02, 1.0: 94.15},
            }
        },
        percent=True,
    ),
    "table2": Study(
        "False positives: crops that saliency chose",
        "views.good_crops",
        "0.0",
        "share of the images whose crops saliency chose",
        "table 2, ImageNet-100, 50 epochs",
        _TABLE2,
        percent=True,
        remark="the paper's saliency is that of a classifier which was trained with ImageNet's labels; ours is the distance of a "
        "pixel's colour from the border's",
    ),
    "overlap": Study(
        "False positives: crops that overlap",
        "views.min_overlap",
        "0.0",
        "smallest overlap (IoU) of two crops",
        "table 2, ImageNet-100, 50 epochs",
        _TABLE2,
        paper_axis="share of the images whose crops saliency chose",
        remark="the paper chooses crops by saliency (study table2); this bounds the overlap of the two crops",
    ),
    "figureA4": Study(
        "Noise in the rotation labels",
        "rotation.label_noise",
        "0.0",
        "share of rotation labels that are drawn anew",
        f"figure A4, {_C10}",
        {
            "byol": {
                PLAIN: {None: 89.30},
                ROTATION: _tenths(91.89, 90.65, 90.56, 89.93, 90.18, 90.28, 90.44, 89.75, 89.18, 88.19, 87.52),
            },
            "simclr": {
                PLAIN: {None: 88.77},
                ROTATION: _tenths(90.91, 90.25, 90.09, 89.63, 89.71, 89.62, 89.24, 89.33, 88.78, 88.52, 88.76),
            },
        },
        percent=True,
    ),
    "convergence": Study(
        "Convergence of each objective alone and of both",
        "train.epochs",
        "",
        "length of the run, epochs",
        "figure of CIFAR-10 over epochs",
        {
            "byol": {
                ALONE: {50.0: 77.98, 100.0: 81.67, 200.0: 84.00, 400.0: 85.56, 600.0: 86.46, 800.0: 86.59},
                PLAIN: {50.0: 80.53, 100.0: 85.35, 200.0: 89.30, 400.0: 91.08, 600.0: 91.87, 800.0: 92.23},
                ROTATION: {50.0: 85.20, 100.0: 88.76, 200.0: 91.89, 400.0: 92.94, 600.0: 92.87, 800.0: 93.22},
            },
            "supervised": {PLAIN: {200.0: 94.03}},
        },
        remark="of supervised training the paper has one number (table A1); its length is taken to be that of the others there",
    ),
    "tableA5": Study(
        "Which angles are told apart",
        "rotation.degrees",
        "[0, 90, 180, 270]",
        "angles",
        f"table A5, {_C100}",
        {
            "byol": {
                PLAIN: {None: 60.67},
                ROTATION: {
                    "[0, 180]": 66.21,
                    "[90, 270]": 62.96,
                    "[0, 90]": 65.24,
                    "[0, 270]": 65.04,
                    "[0, 90, 180, 270]": 67.03,
                    "[45, 135, 225, 315]": 65.50,
                    str([*range(0, 360, 45)]): 67.25,
                    str([*range(0, 360, 30)]): 63.61,
                },
            }
        },
        remark="angles that are no quarter turns leave empty corners, which tell the angle",
    ),
    "tableA6": Study(
        "Which layers the task shares",
        "rotation.head_on",
        "encoder",
        "input of the rotation head",
        f"table A6, {_C100}",
        {
            "byol": {
                PLAIN: {None: 60.67},
                ROTATION: {
                    "stem": 52.50,
                    "stage1": 52.84,
                    "stage2": 54.85,
                    "stage": 58.31,
                    "encoder": 66.06,
                    "projector": 67.03,
                },
            }
        },
        remark="the paper's encoder has four blocks, of which stage is the third; the encoder called small has three, of which "
        "stage is the second",
    ),
    "tableA7": Study(
        "Rotation beside the views, or of the views themselves",
        "rotation.mode",
        "in_place",
        "form of the task",
        f"table A7, {_C10}",
        {"byol": {PLAIN: {None: 89.30}, ROTATION: FORMS}},
        remark="the paper's in-place row turns each view by its own angle, as ours does with rotation.angles independent only, "
        "and has the extra views as well; it says neither which head its contrastive and cosine losses have nor a temperature",
        beside={"rotation.loss": "cross_entropy"},
    ),
}
