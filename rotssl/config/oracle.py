"""The section ``oracle``: what a run is told about the classes of its images. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from rotssl.config.fields import opt


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """Labels in pretraining, to find out what false negatives cost (docs/analysis.md). Such a run is not self-supervised."""

    false_negatives: float = opt(
        0.0,
        "USES LABELS, for analysis only: remove negatives of the anchor's own class from the loss of SimCLR and MoCo v2. "
        "The share that oracle.share_of names, 0 to 1; 0: none.",
        ge=0,
        le=1,
        later=True,
    )
    share_of: Literal["images", "pairs"] = opt(
        "images",
        "images: the share whose labels are known; a pair goes if both are (our reading of the paper's table 1). pairs: the "
        "share of the pairs of one class, which go one by one.",
        later=True,
    )
    log: bool = opt(
        False,
        "Log the share of an anchor's negatives that are of its class (oracle/same_class). Needs labels, and changes nothing.",
        later=True,
    )

    @property
    def on(self) -> bool:
        """Whether labels change the loss."""
        return self.false_negatives > 0

    @property
    def reads_labels(self) -> bool:
        """Whether the training needs labels, to change the loss or to log a share."""
        return self.on or self.log

    def __str__(self) -> str:
        """The oracle in words, for tags and reports; empty if labels do not change the loss."""
        share = f"{100 * self.false_negatives:g}%"
        of = (
            f"the labels of {share} of the images"
            if self.share_of == "images"
            else f"{share} of the pairs of one class"
        )
        return f"an oracle removes false negatives, given {of}" if self.on else ""
