"""The page of one run: its curves, what its encoder and its rotation head have learned, its costs and its configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rotssl.reports import run_plots
from rotssl.reports.html import environment
from rotssl.reports.run_plots import Drawing
from rotssl.reports.tables import amount, percent
from rotssl.runs.journal import Points

if TYPE_CHECKING:  # it imports torch
    from rotssl.explain.run import Explained, Turns

_MEASURES = (
    ("knn/top1", "kNN top-1, validation"),
    ("linear/top1", "linear probe top-1, validation"),
    ("test/knn/top1", "kNN top-1, test"),
    ("test/linear/top1", "linear probe top-1, test"),
    ("rotation/accuracy", "rotation head, training views"),
)
_COSTS = (
    ("cost/epochs", "epochs", "epochs"),
    ("cost/flops", "training compute", "flops"),
    ("cost/train_seconds", "training time", "device_seconds"),
    ("cost/device_seconds", "device time, over all devices", "device_seconds"),
    ("cost/lost_seconds", "lost by interruptions", "device_seconds"),
)
_METHOD = (
    (
        "Curves",
        "From the run's journal, metrics.jsonl. Losses and the rotation head's accuracy are means over the epoch's steps.",
    ),
    (
        "Map",
        "Features of the evaluated encoder for whole pictures, without random crops and colours. PCA is computed in float64 on "
        "the centred features. UMAP (arXiv 1802.03426), by cosine, is drawn if umap-learn is installed.",
    ),
    (
        "Neighbours",
        "The nearest training pictures by cosine of the features. The pictures shown are the first of each class, of at most "
        "eight, not chosen by their result.",
    ),
    (
        "What rotation confuses",
        "Each picture is turned by each angle of the run and judged by the rotation head, in evaluation mode. A class whose "
        "pictures look alike upside down is hard for it.",
    ),
    (
        "What tells the angle",
        "Gradient x input (Shrikumar et al., arXiv 1605.01713) of the right angle's logit: absolute sum over channels, turned "
        "back, averaged over the angles and over 3 x 3 pixels, divided by its 99th percentile. It says where small changes move "
        "the logit, not why.",
    ),
)


@dataclass(frozen=True)
class Tile:
    """A small picture with a line below it; ``good`` is None where nothing is right or wrong."""

    source: str
    text: str
    good: bool | None = None


@dataclass(frozen=True)
class RunPage:
    """The content of the page.

    Attributes:
        title: heading.
        subtitle: one line below it.
        summary: sentences.
        warnings: what is wrong with the run.
        measures: names and values.
        curves: the curves, or None without points.
        maps: captions and drawings.
        near: rows of pictures, the first of each row is the query.
        near_text: a caption.
        angles: of the rotation head; empty without one.
        confusion: rows of shares from 0 to 1, true angle by judged angle.
        by_class: class, number of pictures, share of right judgements, the hardest first.
        hardest: pictures that are judged wrong most often.
        salient: pictures, and the same with their saliency.
        costs: names and values.
        changed: fields that are not at their defaults.
        fields: all fields.
    """

    title: str
    subtitle: str
    summary: Sequence[str]
    warnings: Sequence[str]
    measures: Sequence[tuple[str, str]]
    curves: Drawing | None
    maps: Sequence[tuple[str, Drawing]]
    near: Sequence[Sequence[Tile]]
    near_text: str
    angles: Sequence[str]
    confusion: Sequence[Sequence[float]]
    by_class: Sequence[tuple[str, int, float]]
    hardest: Sequence[Tile]
    salient: Sequence[tuple[Tile, Tile]]
    costs: Sequence[tuple[str, str]]
    changed: Sequence[tuple[str, str]]
    fields: Sequence[tuple[str, str]]


def page(
    name: str,
    status: str,
    points: Points,
    test: Mapping[str, float],
    found: "Explained",
    fields: Mapping[str, Any],
    defaults: Mapping[str, Any],
    warnings: Sequence[str],
) -> RunPage:
    """The content of a run's page.

    Args:
        name: of the run.
        status: of the run, in words.
        points: its journal.
        test: measures on the test split, such as ``knn/top1``; empty if it was not evaluated.
        found: what ``explain`` found.
        fields: its configuration, by dotted names.
        defaults: of the same fields.
        warnings: what is wrong with the run.
    """
    last = {**points[max(points)], **{f"test/{key}": value for key, value in test.items()}} if points else {}
    measures = [(label, percent(last[key])) for key, label in _MEASURES if key in last]
    count = len(found.maps[0].places)
    maps = [
        (_map_text(m.kind, count, found.split), run_plots.scatter(m, found.labels, found.classes)) for m in found.maps
    ]
    turns = found.turns
    subtitle = (
        f"{fields['method.name']} on {fields['data.name']}, {fields['encoder.name']}; epoch {found.epoch}; {status}"
    )
    return RunPage(
        title=f"Run {name}",
        subtitle=subtitle,
        summary=_summary(found, last),
        warnings=warnings,
        measures=measures,
        curves=run_plots.curves(points) if points else None,
        maps=maps,
        near=[_near(row, found.classes) for row in found.near],
        near_text=_near_text(found, count),
        angles=[f"{degrees}\N{DEGREE SIGN}" for degrees in turns.confusion.degrees] if turns else (),
        confusion=(turns.confusion.counts / turns.confusion.counts.sum(1, keepdim=True)).tolist() if turns else (),
        by_class=[(found.classes[c], n, share) for c, (n, share) in turns.by_class.items()] if turns else (),
        hardest=_hardest(turns, found.classes),
        salient=_salient(turns),
        costs=_costs(last),
        changed=[(key, _text(value)) for key, value in fields.items() if value != defaults.get(key, value)],
        fields=[(key, _text(value)) for key, value in fields.items()],
    )


def _summary(found: "Explained", last: Mapping[str, float]) -> list[str]:
    lines = []
    for key, words in (("knn/top1", "A kNN classifier on the frozen features"), ("linear/top1", "A linear probe")):
        if key in last:
            also = f", {percent(last[f'test/{key}'])} on test" if f"test/{key}" in last else ""
            lines.append(f"{words} is right for {percent(last[key])} of the validation pictures{also}.")
    if found.turns is None:
        lines.append("This run has no rotation head that names an angle.")
    else:
        chance = percent(1 / len(found.turns.confusion.degrees))
        right = percent(found.turns.confusion.accuracy)
        line = f"The rotation head is right for {right} of the turned pictures; chance is {chance}."
        by_class = found.turns.by_class
        if len(by_class) > 1:
            (hard, (_, low)), *_, (easy, (_, high)) = by_class.items()
            line += (
                f" {found.classes[hard]} is hardest ({percent(low)}), {found.classes[easy]} easiest ({percent(high)})."
            )
        lines.append(line)
    return lines


def _costs(last: Mapping[str, float]) -> list[tuple[str, str]]:
    costs = [(label, amount(last[key], kind)) for key, label, kind in _COSTS if last.get(key)]
    speed = last.get("throughput/images_per_second")
    return costs if speed is None else [*costs, ("throughput of the last epoch", f"{speed:.0f} images/s")]


def _map_text(kind: str, count: int, split: str) -> str:
    return f"{kind} of the features of {count:,} {split} pictures. Points of one colour are of one class."


def _near_text(found: "Explained", count: int) -> str:
    bank = f"Left: a {found.split} picture. Right: its nearest of {found.bank:,} training pictures, with the cosine."
    if found.same is None:
        return bank
    each = len(found.near[0].found)
    return f"{bank} Of the {each} nearest of all {count:,} pictures, {percent(found.same)} have the picture's class."


def _near(row: Any, classes: Sequence[str]) -> list[Tile]:
    first = Tile(run_plots.tile(row.picture), "" if row.label is None else classes[row.label])
    others = [
        Tile(run_plots.tile(picture), f"{cosine:.2f}", None if row.label is None else label == row.label)
        for picture, label, cosine in row.found
    ]
    return [first, *others]


def _hardest(turns: "Turns | None", classes: Sequence[str]) -> list[Tile]:
    return [
        Tile(run_plots.tile(picture), f"{classes[label] if label is not None else ''} {percent(right)}".strip())
        for picture, label, right in (turns.hardest if turns else ())
        if right < 1
    ]


def _salient(turns: "Turns | None") -> list[tuple[Tile, Tile]]:
    return [
        (Tile(run_plots.tile(picture), ""), Tile(run_plots.heated(picture, heat), ""))
        for picture, heat in (turns.salient if turns else ())
    ]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def render(content: RunPage) -> str:
    """The page as HTML."""
    return environment().get_template("run.html.j2").render(page=content, method=_METHOD) + "\n"
