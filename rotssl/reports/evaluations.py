"""What jobs/evaluate.py measured, as rows for the terminal and as tables for the page."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from rotssl.reports.tables import Table, percent
from rotssl.tracking.reader import TrackedRun

SEVERAL = 3  # values of a fact that a caption shows
SPREADS = ("interval", "deviation")  # beside an accuracy
_CORRUPTED = re.compile(r"(.*)robustness/((?!rotate_)[a-z_]+)_\d(?:_seed\d+)?/(knn|linear)")
# What a table says of its numbers, in words, from the cards' parameters in MLflow.
_FACTS = {
    **{
        "view": "view",
        "bn": "BatchNorm",
        "precision": "precision",
        "distance": "distance",
        "k": "k",
        "temperature": "T",
    },
    **{"penalties_tried": "penalties tried", "penalty": "penalty", "epochs": "epochs", "batch_size": "batch size"},
    **{"rates_tried": "rates tried", "rate": "rate", "augmentation": "augmentation", "share": "shares of the labels"},
    **{"labelled_images": "labelled images", "split_seed": "seed of the parts", "split": "checksums of the parts"},
    **{"ways": "classes", "shots": "training images of each", "queries": "test images of each", "episodes": "episodes"},
    **{"query_images": "test images", "query_digest": "their checksum"},
}


def rows(known: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Names and values of accuracies by their keys; those of a corruption are averaged over its severities."""
    groups = dict[str, list[float]]()
    for key in sorted(known):
        name, _, leaf = key.rpartition("/")
        if leaf != "top1":
            continue
        if changed := _CORRUPTED.fullmatch(name):
            before, corruption, classifier = changed.groups()
            for group in (corruption, "all corruptions"):
                groups.setdefault(f"{before}robustness/{group}, {classifier}", []).append(known[key])
            continue
        spread = next((known[f"{name}/{more}"] for more in SPREADS if f"{name}/{more}" in known), None)
        if math.isnan(known[key]):
            yield name, "features are not finite"
            continue
        yield name, percent(known[key]) + ("" if spread is None else f" \u00b1 {percent(spread)}")
    for name, found in groups.items():
        yield f"{name} (mean of {len(found)})", percent(sum(found) / len(found))


def tables_of(records: Sequence[TrackedRun], runs: Sequence[TrackedRun]) -> list[Table]:
    """A table for each protocol that some runs were evaluated by.

    Args:
        records: all of the experiment; evaluations that have no card are left out.
        runs: the compared ones.
    """
    names = {run.run_id: run.name for run in runs}
    cards = [r for r in records if r.parent in names and "card.protocol" in r.params]
    found = []
    for protocol in dict.fromkeys(record.params["card.protocol"] for record in cards):
        ours = [record for record in cards if record.params["card.protocol"] == protocol]
        body = [
            (names[str(record.parent)], record.params.get("card.network", ""), name, value)
            for record in ours
            for name, value in rows(record.values)
        ]
        facts = []
        for key, word in _FACTS.items():
            values = {record.params.get(f"card.{key}", "") for record in ours} - {""}
            if values:
                text = " or ".join(sorted(values)) if len(values) <= SEVERAL else "several, see the cards"
                facts.append(f"{word}: {text}")
        caption = f"Measured once on the test images. {'; '.join(facts)}."
        headers = ("run", "network", "number", "top-1")
        found.append(Table(f"Evaluation: {protocol}", caption, headers, sorted(body), names=3))
    return found


def content_of(records: Sequence[TrackedRun], runs: Sequence[TrackedRun]) -> list[dict[str, object]]:
    """The same for ``report.json``, with all numbers and parameters of the cards."""
    names = {run.run_id: run.name for run in runs}
    return [
        {
            "run": names[str(record.parent)],
            "run_id": record.parent,
            "card": {
                key.removeprefix("card."): value for key, value in record.params.items() if key.startswith("card.")
            },
            "metrics": {key: value for key, value in record.values.items() if math.isfinite(value)},
        }
        for record in records
        if record.parent in names and "card.protocol" in record.params
    ]
