"""The section ``views``. Imports no torch."""

from dataclasses import dataclass

from rotssl.config.fields import Auto, opt

SMALLEST = 8  # side in pixels of the global views at the start of a run


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How the random views of an image are made. ``blur`` and ``solarize``: one value, or one per global view."""

    global_count: int = opt(2, "Number of global views.", ge=2, le=8)
    global_scale: tuple[float, float] = opt(
        (0.2, 1.0), "Smallest and largest crop, as shares of the image area.", gt=0, le=1
    )
    local_count: int = opt(0, "Number of small local views (multi-crop), seen by the student only.", ge=0, le=16)
    local_size: int | Auto = opt(
        "auto", "Side of the local views in pixels; auto: 3/7 of the global views' (96 for 224).", ge=4
    )
    local_scale: tuple[float, float] = opt(
        (0.05, 0.14), "Smallest and largest local crop, as shares of the image area.", gt=0, le=1
    )
    jitter: tuple[float, float, float, float] = opt(
        (0.4, 0.4, 0.4, 0.1), "Strength of brightness, contrast, saturation and hue.", ge=0, le=1
    )
    jitter_p: float = opt(0.8, "Probability of the colour jitter.", ge=0, le=1)
    grayscale: float = opt(0.2, "Probability of conversion to grayscale.", ge=0, le=1)
    blur: tuple[float, ...] = opt(
        (0.0,), "Probability of Gaussian blur; one value, or one per global view.", ge=0, le=1
    )
    local_blur: float = opt(0.0, "Probability of Gaussian blur of a local view.", ge=0, le=1)
    solarize: tuple[float, ...] = opt(
        (0.0,),
        "Probability of solarisation; one value, or one per global view. Never applied to local views.",
        ge=0,
        le=1,
    )
    flip: float = opt(0.5, "Probability of a horizontal flip.", ge=0, le=1)
    size_start: int | float | None = opt(
        None,
        "Side of the global views at the start of the run, which saves time: in pixels, at least 8, or below 1 as a share of "
        "data.image_size; local views and crops of tasks shrink by the same factor. none: data.image_size throughout.",
        gt=0,
        later=True,
    )
    size_until: float = opt(
        0.75, "With size_start: share of the run after which views have their full side.", gt=0, le=1, later=True
    )

    min_overlap: float = opt(
        0.0,
        "Smallest overlap (intersection over union) of the crop of each further global view with that of the first; others are "
        "drawn again, up to 20 times, then the one that overlaps most is taken. 0: any.",
        ge=0,
        lt=1,
        later=True,
    )
    good_crops: float = opt(
        0.0,
        "For analysis (table 2 of the paper): share of the images, exact in each batch, whose global crops saliency chooses. "
        "Those that are not good are drawn again, up to 20 times, then the best one is taken. 0: none.",
        ge=0,
        le=1,
        later=True,
    )
    good_mass: float = opt(
        0.0,
        "Smallest share of its picture's saliency in a good crop. 0: a good crop is more salient on average than its picture, as "
        "in the paper.",
        ge=0,
        lt=1,
        later=True,
    )
    log_saliency: bool = opt(
        False,
        "Log the mean share of the saliency in global crops (views/mass), and the share of good ones (views/good); always with "
        "good_crops. Changes nothing.",
        later=True,
    )
    split: int = opt(
        1,
        "2: cut each global view of the student into 2 x 2 tiles, and average the features of each pair of them before the "
        "projector (Fast-MoCo, arXiv 2207.08220); 1: whole views.",
        ge=1,
        le=2,
        later=True,
    )

    def side_at(self, progress: float, side: int, whole: int) -> int:
        """Return the side of a view in pixels at a progress of the run, of at least 4 if it is reduced.

        Args:
            progress: progress of the run, from 0 to 1.
            side: side of this view at the end of the run.
            whole: side of the global views at the end of the run.
        """
        if self.size_start is None or progress >= self.size_until:
            return side
        return min(side, max(4, round(side * self.size_start / whole)))
