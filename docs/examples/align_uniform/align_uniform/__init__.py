"""Alignment and uniformity, Wang and Isola 2020 (arXiv 2005.10242): what rotssl has to know before it trains.

Imports no torch: every command of rotssl reads this file.
"""

from dataclasses import dataclass

from rotssl import MethodConfig, MethodSpec, opt


@dataclass(frozen=True, kw_only=True)
class AlignUniformConfig(MethodConfig):
    """Alignment and uniformity, Wang and Isola 2020 (arXiv 2005.10242)."""

    name: str = opt("align_uniform", "Pretraining method.")
    alpha: float = opt(2.0, "Power of the distance between views of an image.", gt=0)
    t: float = opt(2.0, "Scale of the Gaussian potential between images.", gt=0)
    uniformity: float = opt(1.0, "Weight of the uniformity term.", ge=0)


SPEC = MethodSpec(AlignUniformConfig, "align_uniform.method:AlignUniform", optimizer="sgd", lr=0.24)
