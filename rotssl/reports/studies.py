"""An analysis of the paper's with our runs: lines over the varied field, differences over paired seeds, and what they say."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rotssl.config.fields import ConfigError
from rotssl.reports.comparison import gain
from rotssl.reports.groups import TASKS, active, budget_of, seed_of
from rotssl.reports.paper import ALONE, PLAIN, ROTATION, Line, Study
from rotssl.reports.reach import last_point, mean_of
from rotssl.reports.statistics import Estimate, paired_difference
from rotssl.reports.tables import points
from rotssl.tracking.reader import TrackedRun

Runs = Mapping[int, TrackedRun]  # by seed
_LINES = (
    "train.seed",
    "tasks.method_weight",
    "oracle.log",
    "views.log_saliency",
)  # what runs may differ in, and what tells their lines apart
_LEAVES = ("weight", "share", "mode", "degrees", "head_on", "loss", "temperature", "angles", "label_noise")
_TASK = tuple(f"rotation.{leaf}" for leaf in _LEAVES)
Value = object  # of the varied field: a number, or text; None for a line that does not have it


@dataclass(frozen=True)
class Answer:
    """A difference that the paper reports, with ours.

    Attributes:
        what: in words.
        ours: in fractions, over the seeds that both sides have.
        seeds: how many these are.
        paper: in points; None if the paper has not got it.
    """

    what: str
    ours: Estimate
    seeds: int
    paper: float | None

    @property
    def verdict(self) -> str:
        """What the interval says of the direction."""
        if self.ours.low is None or self.ours.high is None:
            return "one seed has no interval, so nothing is said about the direction"
        if self.ours.low <= 0 <= self.ours.high:
            return "a change isn't seen: the interval contains 0"
        up = self.ours.low > 0
        seen = "up" if up else "down"
        if self.paper is None or self.paper == 0:
            return seen
        return f"{seen}, as in the paper" if up == (self.paper > 0) else f"{seen}, unlike the paper"

    def __str__(self) -> str:
        """The sentence."""
        paper = "the paper has no such number" if self.paper is None else f"the paper has {self.paper:+.2f}"
        count = f", {self.seeds} paired seeds" if self.seeds > 1 else ""
        return f"{self.what}: {points(self.ours)} points{count}; {paper}. Here: {self.verdict}."


@dataclass(frozen=True)
class Found:
    """The lines of one method, and what follows from them.

    Attributes:
        method: its name.
        budget: epochs of the runs; None if that is what is varied.
        lines: ``plain``, ``rotation`` or ``rotation alone`` -> value -> seed -> run.
        answers: the differences.
    """

    method: str
    budget: int | None
    lines: Mapping[str, Mapping[Value, Runs]]
    answers: Sequence[Answer]


def label(value: Value, study: Study) -> str:
    """A value of the varied field in words."""
    if isinstance(value, float):
        return f"{100 * value:g}%" if study.percent else f"{value:g}"
    return str(value).strip("[]")


def found_in(runs: Sequence[TrackedRun], study: Study, metric: str) -> list[Found]:
    """What the complete runs of an experiment say about a study, by method and, if it is not what is varied, length.

    Args:
        runs: complete runs (``groups.sift``).
        study: the study.
        metric: of their last epoch, a fraction.

    Raises:
        ConfigError: no run varies the field, or runs that count as equal differ in other fields too.
    """
    sorted_in: dict[tuple[str, int | None], dict[str, dict[Value, dict[int, TrackedRun]]]] = {}
    for run in runs:
        line = _line(run)
        budget = None if study.field == "train.epochs" else budget_of(run)
        value = _value(run, study, line)
        place = sorted_in.setdefault((run.params["method.name"], budget), {}).setdefault(line, {}).setdefault(value, {})
        seed = seed_of(run)
        if seed in place:
            at = "" if value is None else f" at {study.field} {label(value, study)}"
            differ = sorted(k for k, v in run.params.items() if place[seed].params.get(k) != v)
            raise ConfigError(
                f"{place[seed].name} and {run.name} are both {line}{at}, but differ in "
                f"{', '.join(differ)}: choose one sweep with --sweep"
            )
        place[seed] = run
    _check_alike(runs, study)
    found = [
        Found(*key, lines, _answers(key[0], lines, study, metric)) for key, lines in sorted(sorted_in.items(), key=str)
    ]
    if not any(len(values) > 1 for entry in found for values in entry.lines.values()):
        raise ConfigError(f"no complete runs differ in {study.field}: run a sweep over it first")
    return found


def _check_alike(runs: Sequence[TrackedRun], study: Study) -> None:
    """Check that runs of one method and length differ in nothing but the study's field, rotation and the seed.

    Raises:
        ConfigError: some do.
    """
    first: dict[tuple[object, ...], tuple[TrackedRun, Mapping[str, object]]] = {}
    own = {study.field, *study.beside, *_LINES}
    for run in runs:
        fields = {key: value for key, value in active(run.params).items() if key not in own}
        common = {key: value for key, value in fields.items() if key.split(".")[0] not in (*TASKS, "tasks")}
        task = {key: value for key, value in fields.items() if key in _TASK and _line(run) != PLAIN}
        where = run.params["method.name"], budget_of(run)
        for place, mine in ((where, common), ((*where, _line(run)), task)):
            other, known = first.setdefault(place, (run, mine))
            if differ := sorted(key for key in known.keys() & mine.keys() if known[key] != mine[key]):
                raise ConfigError(
                    f"{other.name} and {run.name} differ in {', '.join(differ)}, not in {study.field} alone: choose one "
                    "sweep with --sweep"
                )


def _line(run: TrackedRun) -> str:
    """Which line of the paper a run belongs to.

    Raises:
        ConfigError: none, for it has another task than rotation.
    """
    weights = {task: run.params.get(f"{task}.weight", "0") for task in TASKS}
    on = [task for task, weight in weights.items() if weight == "auto" or float(weight) > 0]
    if others := [task for task in on if task != "rotation"]:
        raise ConfigError(f"{run.name} has the task {others[0]}: the paper's lines are of rotation")
    return ALONE if on and float(run.params.get("tasks.method_weight", "1")) == 0 else ROTATION if on else PLAIN


def _value(run: TrackedRun, study: Study, line: str) -> Value:
    section = study.field.split(".")[0]
    if section in TASKS and line == PLAIN:
        return None
    text = run.params.get(study.field, study.default)
    others = [run.params.get(field, default) for field, default in study.beside.items()]
    more = [value for value, default in zip(others, study.beside.values(), strict=True) if value != default]
    try:
        return float(text)
    except ValueError:
        value = str(ast.literal_eval(text)) if text.startswith(("[", "(")) else text
        return ", ".join([value, *more])


def ordered(values: Mapping[Value, object], study: Study) -> list[Value]:
    """Values in the order of the axis: numbers ascending, others as the paper lists them and then by name."""
    listed = [value for lines in study.paper.values() for line in lines.values() for value in line]

    def place(value: Value) -> tuple[int, float, str]:
        if isinstance(value, float):
            return 0, value, ""
        return (1, listed.index(value), "") if value in listed else (2, 0, str(value))

    return sorted((value for value in values if value is not None), key=place)


def _answers(method: str, lines: Mapping[str, Mapping[Value, Runs]], study: Study, metric: str) -> list[Answer]:
    every = ordered(dict.fromkeys(value for line in lines.values() for value in line), study)
    known = _papers(method, study, every)
    answers: list[Answer] = []
    for name, line in lines.items():
        values = ordered(line, study)
        if len(values) > 1 and all(isinstance(value, float) for value in values):
            first, last = values[0], values[-1]
            words = f"{method}, {name}: from {label(first, study)} to {label(last, study)}"
            answers += _answer(
                words, line[last], line[first], metric, _apart(known.get(name), last, known.get(name), first)
            )
    if PLAIN not in lines:
        return answers
    for name in (ROTATION, ALONE):
        for value in ordered(lines.get(name, {}), study):
            other = _at(lines[PLAIN], value)
            if other is not None:
                words = f"{method}, {name} over plain at {label(value, study)}"
                paper = _apart(known.get(name), value, known.get(PLAIN), value)
                answers += _answer(words, lines[name][value], other, metric, paper)
    return [*answers, *_change_of_gain(method, lines, study, known, metric)]


def _change_of_gain(
    method: str, lines: Mapping[str, Mapping[Value, Runs]], study: Study, known: Mapping[str, Line], metric: str
) -> Iterator[Answer]:
    """How the gain of rotation over plain changes from the first to the last value that both lines have."""
    plain, turned = lines[PLAIN], lines.get(ROTATION, {})
    both = [value for value in ordered(turned, study) if value in plain and isinstance(value, float)]
    if len(both) < 2:
        return
    first, last = both[0], both[-1]
    sides = [plain[first], turned[first], plain[last], turned[last]]
    seeds = sorted(set.intersection(*(set(runs) for runs in sides)))
    if not seeds:
        return
    accuracy = [{seed: last_point(runs[seed])[metric] for seed in seeds} for runs in sides]
    before, after = ({s: accuracy[i + 1][s] - accuracy[i][s] for s in seeds} for i in (0, 2))
    pairs = [after[s] for s in seeds], [before[s] for s in seeds]
    ours = Estimate(*paired_difference(*pairs)) if len(seeds) > 1 else Estimate(pairs[0][0] - pairs[1][0])
    gains = [_apart(known.get(ROTATION), value, known.get(PLAIN), value) for value in (last, first)]
    paper = None if None in gains else gains[0] - gains[1]  # type: ignore[operator]
    words = f"{method}, the gain of rotation over plain from {label(first, study)} to {label(last, study)}"
    yield Answer(words, ours, len(seeds), paper)


def _answer(words: str, ours: Runs, theirs: Runs, metric: str, paper: float | None) -> Iterator[Answer]:
    difference = gain(ours, theirs, metric)
    if difference is not None:
        yield Answer(words, difference, len(ours.keys() & theirs.keys()), paper)


def _at(line: Mapping[Value, Runs], value: Value) -> Runs | None:
    """The runs at a value, or those of a line without the field."""
    return line.get(value, line.get(None))


def _apart(ours: Line | None, value: Value, theirs: Line | None, other: Value) -> float | None:
    one, two = ((line or {}).get(v, (line or {}).get(None)) for line, v in ((ours, value), (theirs, other)))
    return None if one is None or two is None else one - two


def _papers(method: str, study: Study, values: Sequence[Value]) -> Mapping[str, Line]:
    """The paper's lines of a method; if it varies another quantity, its first and last number at our first and last value."""
    known = study.paper.get(method, {})
    if not study.paper_axis or not values:
        return known
    ends = {values[0]: 0, values[-1]: -1}
    return {name: {value: list(line.values())[i] for value, i in ends.items()} for name, line in known.items()}


def reading(found: Sequence[Found], study: Study) -> list[str]:
    """The paragraph: what our runs say, sentence by sentence, and how the paper's setting differs."""
    lines = [str(answer) for entry in found for answer in entry.answers]
    many = len(lines) > 1
    notes = ["each interval stands for itself: of twenty without any effect, one does not contain 0"] if many else []
    notes += [study.remark] if study.remark else []
    return [*lines, *(f"Note: {note}." for note in notes)]


def content(found: Sequence[Found], study: Study, metric: str) -> dict[str, object]:
    """All numbers, for a JSON file."""
    return {
        "field": study.field,
        "metric": metric,
        "source": study.source,
        "methods": [
            {
                "method": entry.method,
                "epochs": entry.budget,
                "lines": {
                    name: [
                        {
                            "value": None if value is None else label(value, study),
                            "accuracy": {str(seed): last_point(run)[metric] for seed, run in sorted(runs.items())},
                            "mean": mean_of(last_point(run)[metric] for run in runs.values()),
                            "paper": None
                            if study.paper_axis
                            else study.paper.get(entry.method, {}).get(name, {}).get(value),
                        }
                        for value, runs in line.items()
                    ]
                    for name, line in entry.lines.items()
                },
                "answers": [
                    {**vars(answer), "ours": vars(answer.ours), "verdict": answer.verdict} for answer in entry.answers
                ],
            }
            for entry in found
        ],
    }
