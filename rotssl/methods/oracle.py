"""False negatives: negatives of the anchor's own class, counted and removed by an oracle that knows labels."""

import torch
from torch import Tensor


class Oracle:
    """Says which negatives of a contrastive loss are of their anchor's class, and removes a share of them.

    Table 1 of Addepalli et al. 2022 (arXiv 2210.09866) varies a share of labels. We read it as that of the images whose label the
    oracle knows: a pair of one class is removed if both are known, which a share f makes f^2 of the pairs. With ``of_pairs`` each
    pair is removed with probability f. Both follow from a number u in [0, 1) of each image, the same throughout a run: u < f for
    both images, and (u_i + u_j) mod 1 < f for the pair, which is uniform, and the same from both sides.

    Args:
        share: f, from 0 to 1; at 0 it only counts.
        of_pairs: whether f is a share of the pairs, not of the images.
    """

    def __init__(self, share: float, of_pairs: bool = False) -> None:
        self.share, self.of_pairs = share, of_pairs

    def judge(
        self, anchors: Tensor, others: Tensor, offset: int | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The negatives to remove, without a host synchronisation.

        Args:
            anchors: class and number u of each anchor, (B, 2); classes below 0 are unknown, and equal to no other.
            others: the same of the images among which its negatives are, (N, 2).
            offset: row of ``others`` that is the first anchor itself, which is no negative; None: all are negatives.

        Returns:
            What is removed, bool (B, N), or None if the share is 0; and to log, ``oracle/same_class``, the share of the negatives
            that are of the anchor's class, and ``oracle/removed``, the share of these that are removed.
        """
        same = (anchors[:, None, 0] == others[None, :, 0]) & (anchors[:, None, 0] >= 0)
        negatives = others.shape[0]
        if offset is not None:
            own = torch.arange(offset, offset + len(anchors), device=anchors.device)
            same = same.scatter(1, own[:, None], False)
            negatives -= 1
        count = same.sum()
        logs = {"oracle/same_class": count / max(1, len(anchors) * negatives)}
        if self.share == 0:
            return None, logs
        ours, theirs = anchors[:, None, 1], others[None, :, 1]
        if self.of_pairs:
            removed = same & ((ours + theirs) % 1 < self.share)
        else:
            removed = same & (ours < self.share) & (theirs < self.share)
        return removed, logs | {"oracle/removed": removed.sum() / count.clamp(min=1)}
