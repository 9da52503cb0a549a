"""What decoding saw of a set of images, as one line and as warnings. This module does not import torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rotssl.data.reading import Facts

LISTED = 10  # bad files that a message names
NARROW = 32  # shades of 256; a set that uses fewer has lost most of its contrast
DEPTHS = ("8 bits", "more than 8 bits")

Size = tuple[int, int]


@dataclass
class Seen:
    """Counts over a set of images; plain values, so that a store of decoded images can keep them.

    ``smallest`` and ``largest`` are sizes by area, ``shades`` the lowest and highest shade of the images of each depth, and
    ``bad`` the files that could not be read, each with the cause.
    """

    smallest: Size = (0, 0)
    largest: Size = (0, 0)
    turned: int = 0
    transparent: int = 0
    shades: dict[str, list[int]] = field(default_factory=dict)
    bad: list[list[str]] = field(default_factory=list)

    def add(self, facts: Facts, low: int, high: int) -> None:
        """Count one image, with its lowest and highest shade."""
        area = facts.size[0] * facts.size[1]
        if not self.largest[0] or area < self.smallest[0] * self.smallest[1]:
            self.smallest = facts.size
        if area > self.largest[0] * self.largest[1]:
            self.largest = facts.size
        self.turned += facts.turned
        self.transparent += facts.transparent
        found = self.shades.setdefault(DEPTHS[facts.deep], [low, high])
        found[:] = [min(found[0], low), max(found[1], high)]

    def line(self, counts: Mapping[str, int], classes: Sequence[str], skipped: Mapping[str, int]) -> str:
        """The one line about the data; ``counts`` are the images of each split, ``skipped`` the files left out, by suffix."""
        splits = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        among = f" in {len(classes)} classes" if classes else ", unlabelled"
        parts = [f"data: {sum(counts.values()):,} images{among} ({splits})"]
        sizes = [
            f"{width} x {height}" for width, height in dict.fromkeys(map(tuple, (self.smallest, self.largest))) if width
        ]
        parts += [" to ".join(sizes)] if sizes else []
        parts += [f"{self.turned:,} with an orientation tag (turned upright)"] if self.turned else []
        parts += [f"{self.transparent:,} transparent (on white)"] if self.transparent else []
        parts += [f"{len(self.bad):,} unreadable (left out)"] if self.bad else []
        if total := sum(skipped.values()):
            each = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
            kinds = ", ".join(kind if len(each) == 1 else f"{count:,} {kind}" for kind, count in each)
            parts.append(f"{total:,} skipped ({kinds})")
        return ", ".join(parts)

    def shade_warnings(self) -> list[str]:
        """Lines about shades that are squeezed together."""
        return [
            f"warning: all shades of the images of {depth} are between {low} and {high} of 255; stretch them in the files"
            for depth, (low, high) in self.shades.items()
            if high - low < NARROW
        ]

    def warnings(self) -> list[str]:
        """Lines about shades that are squeezed together, and about files that were left out."""
        return self.shade_warnings() + ([f"warning: left out: {listing(self.bad)}"] if self.bad else [])


def listing(bad: Iterable[Sequence[str]]) -> str:
    """The first bad files with their causes, and the count of the others, in one line."""
    lines = [f"{file} {cause}" for file, cause in bad]
    more = f"; and {len(lines) - LISTED} more (python -m rotssl.data.look lists all)" if len(lines) > LISTED else ""
    return "; ".join(lines[:LISTED]) + more
