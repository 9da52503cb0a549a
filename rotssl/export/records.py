"""What a run's records say of its encoder, for the model card: nothing here is measured or guessed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rotssl import config as cfg
from rotssl.base.paths import AnyPath, folders
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.sections import OFF
from rotssl.evaluation.protocol import protocols
from rotssl.runs import journal, tested
from rotssl.runs.state import RunState, recorded
from rotssl.tracking import registry, untracked

_PRIVATE = ("data.root", "train.init_from")  # places on somebody's machine
_ACCURACY = "/top1"
# What a card says of its numbers that is said elsewhere in the model card, or is long.
_UNSAID = ("numbers", "value", "run", "method", "network", "epoch", "rotssl", "query_split", "top1_by_seed", "source")
_NETWORKS = ("student/", "teacher/")  # how names begin of accuracies of a network that the run has not evaluated


@dataclass(frozen=True)
class Measure:
    """An accuracy: its name, the share of hits (0 to 1), the split that was classified, and the protocol."""

    name: str
    value: float
    split: str
    protocol: str


@dataclass(frozen=True)
class Records:
    """The records of a run.

    Attributes:
        config: its resolved configuration.
        state: its ``run.json``.
        epochs: number of epochs done.
        last: metrics of the last of them.
        tags: its tags in MLflow, or those that are kept for it.
        measures: all accuracies on record.
    """

    config: ResolvedConfig
    state: RunState
    epochs: int
    last: Mapping[str, float]
    tags: Mapping[str, str]
    measures: tuple[Measure, ...]

    def of_network(self, network: str) -> tuple[Measure, ...]:
        """The accuracies of the student or of the teacher."""
        if network == self.config.evaluation.network:
            return tuple(each for each in self.measures if not each.name.startswith(_NETWORKS))
        return tuple(each for each in self.measures if each.name.startswith(f"{network}/"))

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields that determine what the run computed, by dotted names, without places on a machine."""
        return {key: value for key, value in cfg.described(self.config).items() if key not in _PRIVATE}


def read(folder: AnyPath) -> Records:
    """The records of the run in a folder.

    Raises:
        ConfigError: a record is missing or damaged, or the store with the run's tags and evaluations can't be used.
    """
    config, state = recorded(folder), RunState.read(folder / "run.json", {})
    points = journal.read(folder)
    epochs = max(points, default=0)
    last = points.get(epochs, {})
    if state.uri == OFF or state.run_id is None:
        tags = untracked.kept_tags(folder)
        later = [registry.Evaluation("test", entry["metrics"], entry["facts"]) for entry in tested.read(folder)]
    else:
        tags, later = registry.tags_of(state.uri, state.run_id), registry.evaluations(state.uri, state.run_id)
    measures = (*_of_run(config, last, tags), *_of_evaluations(later, _cards(folder)))
    return Records(config, state, epochs, last, tags, measures)


def _of_run(config: ResolvedConfig, last: Mapping[str, float], tags: Mapping[str, str]) -> list[Measure]:
    """The accuracies of the run's last epoch."""
    found = []
    for key, value in last.items():
        if key.endswith(_ACCURACY):
            *split, name, _ = ["validation", *key.split("/")] if key.count("/") == 1 else key.split("/")
            text = protocols(config.evaluation, split[-1]).get(f"{name}_protocol", "")
            fewer = name == "knn" and int(tags.get("knn_k", config.evaluation.knn_k)) != config.evaluation.knn_k
            found.append(Measure(name, value, split[-1], text + (f" (reduced to k={tags['knn_k']})" if fewer else "")))
    return found


def _cards(folder: AnyPath) -> dict[str, dict[str, Any]]:
    """What the protocol cards in a run's folder say of each number, by its key.

    Raises:
        ConfigError: a card is damaged.
    """
    found = dict[str, dict[str, Any]]()
    for place in folders(folder / tested.FOLDER):
        file = place / "card.json"
        if not file.exists():
            continue
        try:
            content = json.loads(file.read_text())
            shared = {key: value for key, value in content.items() if key not in _UNSAID}
            for key, own in content["numbers"].items():
                found[key] = {name: value for name, value in {**shared, **own}.items() if name not in _UNSAID}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    return found


def _of_evaluations(evaluations: list[registry.Evaluation], cards: Mapping[str, Mapping[str, Any]]) -> list[Measure]:
    found = []
    for each in evaluations:
        for key, value in each.metrics.items():
            if key.endswith(_ACCURACY):
                name = key.removesuffix(_ACCURACY)
                how = cards.get(key, each.how)
                text = ", ".join(f"{fact} {_text(what)}" for fact, what in sorted(how.items()) if what is not None)
                found.append(Measure(name, value, each.split, each.how.get(f"{name}_protocol", text)))
    return found


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
