"""What notebooks and scripts call: ``rotssl.pretrain``, ``ablate``, ``compare``, ``evaluate``, ``report``: docs/python.md.

Each does what the program of its name in jobs/ does, with the same files, and returns an object in place of an exit code. Bad
input raises ConfigError. An interrupted call raises KeyboardInterrupt; the same call resumes.
"""

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from rotssl import commands
from rotssl import config as cfg
from rotssl.base.paths import AnyPath
from rotssl.config import evaluating
from rotssl.config.cli import Command
from rotssl.config.fields import ConfigError, nearest
from rotssl.config.recipes import load_recipe, read_yaml, recommended
from rotssl.config.sections import OFF
from rotssl.config.sweep import SweepCommand, read
from rotssl.reports import terminal
from rotssl.reports.results import Ablated, Compared, Evaluated, Pretrained, Reported

if TYPE_CHECKING:
    from rotssl.commands.compare import Report
    from rotssl.lifecycle import Run

_SWEEP = ("sweep", "grid", "distributions")  # sections of a sweep's file that are not those of a run


def pretrain(recipe: str | Path | Mapping[str, Any] | None = None, **fields: Any) -> Pretrained:
    """Pretrain an encoder, or go on with a run that was interrupted; a finished one is returned at once.

    Without Ray (``scaling={"num_workers": 0}``) it trains in this process. With Ray it uses the cluster that this process is
    connected to, and leaves it as it is. If there is none, it starts one on this machine, or joins that of RAY_ADDRESS, for the
    time of the call.

    Args:
        recipe: a recipe: its file, or its content. None: the defaults of the method, as for jobs/pretrain.py.
        fields: sections, such as ``train={"epochs": 10}``, or dotted fields, such as ``**{"train.epochs": 10}``. They override
            the recipe.

    Returns:
        The run. A run that failed has the status ``failed``; it does not raise.

    Raises:
        ConfigError: a field, the recipe, the data, the machine or the store cannot be used.
        KeyboardInterrupt: it was interrupted.
    """
    from rotssl.commands import pretrain as command

    given = _flat(fields)
    if recipe is None:
        first = registry = recommended(given)
    else:
        first = _flat(recipe) if isinstance(recipe, Mapping) else load_recipe(str(recipe), "recipe")
        registry = {}
    found: list[Pretrained] = []

    def conclude(run: "Run", status: str) -> int:
        found.append(Pretrained.of(run))
        return commands.EXIT_OK

    with _told():
        command.run(Command(cfg.build({**first, **given}), False, False, registry), conclude)
    if found[0].status == "interrupted":
        raise KeyboardInterrupt("the same call resumes from the last checkpoint")
    return found[0]


def ablate(file: str | Path | None = None, **fields: Any) -> Ablated:
    """Run a sweep on a Ray cluster, or what is missing of it, and compare its runs. The cluster is that of ``pretrain``.

    Args:
        file: a sweep file. None: the fields are all of it.
        fields: sections of a sweep file, such as ``grid={"rotation.weight": [0, 1]}``, ``sweep={"name": "weights", "seeds": 2}``
            and ``train={"epochs": 2}``; they override the file.

    Raises:
        ConfigError: a field, the file, the cluster or the store cannot be used.
        KeyboardInterrupt: it was interrupted.
    """
    from rotssl.commands import ablate as command
    from rotssl.lifecycle import Run

    own = {section: fields.pop(section) for section in _SWEEP if section in fields}
    flags = {**_flat({"sweep": own.pop("sweep", {})}), **_flat(fields)}
    if "/" in str(flags.get("sweep.name", "")):
        raise ConfigError(f"sweep.name: got {flags['sweep.name']!r}, expected a short name without slashes")
    reports: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="rotssl-sweep-") as folder, _told():
        if file is None:
            content, path = _nested(flags) | _plain(own), Path(folder) / f"{flags.get('sweep.name', 'sweep')}.yaml"
            flags = {}
            path.write_text(yaml.safe_dump(content, sort_keys=False))
        else:
            content, path = read_yaml(str(file), "file") | _plain(own), Path(file)
        try:
            sweep, code = command.perform(SweepCommand(read(path, content, flags), False, False), reports.append)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), "the call") if file is None else str(error)) from error
    if code == commands.EXIT_INTERRUPTED:
        raise KeyboardInterrupt("the same call resumes from the last checkpoints")
    trials = [Pretrained.of(Run(trial.config)) for trial in sweep.trials]
    compared = Compared.of(reports[0]) if reports else None
    return Ablated(sweep.sweep.name, sweep.folder, sweep.state.status, trials, compared)


def compare(
    experiment: str,
    *,
    sweep: str | None = None,
    metric: str = "knn/top1",
    baseline: str | None = None,
    target: float | None = None,
    uri: str | None = None,
    output: str | Path | None = None,
) -> Compared:
    """Compare the runs of an experiment: which auxiliary weight, how many epochs, and what it saves.

    Args:
        experiment: its name in MLflow.
        sweep: name or id of a sweep, to compare only its trials.
        metric: metric to compare, one of ``rotssl.commands.compare.METRICS``.
        baseline: fields that define the baseline, ``KEY=VALUE,KEY=VALUE``; None: all auxiliary weights are 0.
        target: accuracy to reach, above 0 and at most 1; None: the baseline's final one.
        uri: URI of the tracking store; None: MLFLOW_TRACKING_URI, else mlflow.db in ./results.
        output: folder for the report; None: next to the store.

    Raises:
        ConfigError: the store or an argument cannot be used, or there is nothing to compare.
    """
    from rotssl.commands import compare as command
    from rotssl.tracking.store import asked_uri

    if metric not in command.METRICS:
        raise ConfigError(f"metric: got {metric!r}, expected one of {', '.join(command.METRICS)}")
    if target is not None and not (isinstance(target, int | float) and 0 < target <= 1):
        raise ConfigError(f"target: got {target!r}, expected a fraction above 0 and at most 1, such as 0.7")
    store = asked_uri(uri)
    folder = commands.folder_of("output", str(output or command.default_output(store, experiment))).absolute()
    with _told():
        report = command.compare(store, experiment, folder, baseline, target, metric, sweep=sweep)
    return Compared.of(report)


def evaluate(
    run: Pretrained | str | Path,
    protocols: Sequence[str] = ("knn", "linear"),
    *,
    network: Literal["student", "teacher"] | None = None,
    uri: str | None = None,
    root: str | None = None,
    **options: Any,
) -> Evaluated:
    """Measure the encoder of a finished run on the test split, once: numbers that exist are returned.

        rotssl.evaluate(run, ["knn", "fewshot"], knn={"k": [20, 200]}, fewshot={"shots": 5})

    Args:
        run: what ``pretrain`` returned, the run's folder, or its id in MLflow.
        protocols: some of ``rotssl.config.evaluating.PROTOCOLS``.
        network: None: the one that the run has evaluated.
        uri: URI of the tracking store, for an id; None: MLFLOW_TRACKING_URI, else mlflow.db in ./results.
        root: folder of the images, if they were moved.
        **options: of the protocols, by section or with dotted names, as those of jobs/evaluate.py. ``data={"name": ..., "root":
            ...}`` is another labelled data set.

    Raises:
        ConfigError: there is no such run, it is not finished, or it has no test split; or its images cannot be read.
    """
    from rotssl.commands import evaluate as command
    from rotssl.runs import tested
    from rotssl.runs.state import RunState
    from rotssl.tracking import reader

    names = tuple(dict.fromkeys([protocols] if isinstance(protocols, str) else protocols))
    if not names or not set(names) <= set(evaluating.PROTOCOLS):
        expected = f"one or more of {', '.join(evaluating.PROTOCOLS)}"
        raise ConfigError(f"protocols: got {', '.join(map(str, names)) or 'none'}, expected {expected}")
    given = _flat(options)
    name, root = given.pop("data.name", None), given.pop("data.root", root)
    if unknown := given.keys() - evaluating.schema().keys():
        key = min(unknown)
        raise ConfigError(f"{key}: unknown option of an evaluation{nearest(key, evaluating.schema())}")
    if network not in (None, "student", "teacher"):
        raise ConfigError(f"network: got {network!r}, expected student or teacher")
    chosen = evaluating.build(given)
    folder = _folder_of(run, uri)
    with _told(), terminal.silent():
        code = command.evaluate(None, str(folder), names, "", root, options=chosen, network=network, name=name)
    if code != commands.EXIT_OK:
        raise ConfigError(f"run: {folder} could not be evaluated; the reason is above")
    state = RunState.read(folder / "run.json", {})
    if state.uri == OFF:
        return Evaluated(folder, tested.metrics(tested.read(folder)))
    return Evaluated(folder, reader.evaluations_of(state.uri, str(state.run_id), "test"))


def report(
    run: Pretrained | str | Path,
    *,
    images: int = 2000,
    uri: str | None = None,
    output: str | None = None,
    root: str | None = None,
) -> Reported:
    """Write the page of a run: curves, a map of the features, nearest neighbours, what rotation confuses, costs.

    Args:
        run: what ``pretrain`` returned, the run's folder, or its id in MLflow.
        images: largest number of pictures that are shown and judged.
        uri: URI of the tracking store, for an id; None: MLFLOW_TRACKING_URI, else mlflow.db in ./results.
        output: folder for the page; None: ``report`` in the run's folder.
        root: folder of the images, if they were moved.

    Raises:
        ConfigError: there is no such run, it has no checkpoint, or its images cannot be read.
    """
    from rotssl.commands import report as command

    folder = _folder_of(run, uri)
    with _told():
        page = command.report(None, str(folder), "", output, root, images)
    return Reported(page, json.loads((page.parent / "report.json").read_text())["summary"])


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Show our warnings within the body, and not that a notebook lacks widgets which Ray and tqdm would use."""
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
    with commands.warnings_shown(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        yield


def _folder_of(run: Pretrained | str | Path, uri: str | None) -> AnyPath:
    """The folder of a run, given it, what was returned for it, or its id.

    Raises:
        ConfigError: there is no such run.
    """
    from rotssl.tracking import reader
    from rotssl.tracking.store import asked_uri

    address = str(run.folder if isinstance(run, Pretrained) else run)
    here = (commands.folder_of("run", address) / "config.yaml").exists()
    by_id = not here and not isinstance(run, Path) and address.isalnum()
    return commands.run_at(reader.run_folder_of(asked_uri(uri), address) if by_id else address, "run")


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value, from sections and dotted names.

    Raises:
        ConfigError: a name is neither, or a field is given twice.
    """
    found: dict[str, Any] = {}
    sections = dict.fromkeys([*(key.split(".")[0] for key in cfg.schema()), "sweep"])
    for name, value in fields.items():
        if "." not in name and not isinstance(value, Mapping):
            expected = 'a section such as train={"epochs": 10}, or a dotted field such as **{"train.epochs": 10}'
            raise ConfigError(f"{name}: got {value!r}, expected {expected}{nearest(name, sections)}")
        for key, leaf in ({name: value} if "." in name else {f"{name}.{k}": v for k, v in value.items()}).items():
            if key in found:
                raise ConfigError(f"{key}: given twice")
            found[key] = _plain(leaf)
    return found


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, leaf = key.split(".", 1)
        nested.setdefault(section, {})[leaf] = value
    return nested


def _plain(value: Any) -> Any:
    """A value as YAML has it: paths as text, numbers of numpy as numbers, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
