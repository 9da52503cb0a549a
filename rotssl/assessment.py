"""The evaluation of a finished run on the test split: what is missing is measured, logged and kept. Prints nothing."""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotssl import config as cfg
from rotssl.base.address import is_gone
from rotssl.base.errors import in_a_line
from rotssl.base.paths import AnyPath, filled_whole, write_whole
from rotssl.config.datasets import DATASETS
from rotssl.config.evaluating import Options, WorkerOptions
from rotssl.config.fields import Auto, ConfigError, nearest
from rotssl.config.methods import METHODS
from rotssl.config.resolved import ResolvedData
from rotssl.config.sections import OFF, DataConfig
from rotssl.data import datasets, packed_sets
from rotssl.evaluation.plan import Number, plan
from rotssl.evaluation.protocol import protocols as protocol_texts
from rotssl.runs import journal, tested
from rotssl.runs.state import RunState, check_writable, recorded
from rotssl.runtimes.ray_cluster import Workers
from rotssl.tracking import reader, store, writer

if TYPE_CHECKING:  # they import torch
    from rotssl.data.images import ImageSet
    from rotssl.evaluation.cards import Result
    from rotssl.evaluation.crew import Crew
    from rotssl.evaluation.setting import Setting

log = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Assessed:
    """What is known of a run on test.

    Attributes:
        name: of the run.
        measures: all of its numbers, by their keys.
        new: whether some of them were measured now.
        kept: the file that has them if the run has no store.
    """

    name: str
    measures: Mapping[str, float]
    new: bool
    kept: AnyPath | None


def assess(
    place: AnyPath,
    protocols: Sequence[str],
    options: Options,
    network: str | None = None,
    name: str | None = None,
    root: str | None = None,
    say: Say = log.info,
    show: Say = log.info,
) -> Assessed:
    """Measure what is missing of a finished run's numbers on test. Each protocol's are logged to a child run of it.

    Existing numbers are not measured again: the test split is used once. For a run without MLflow they are kept in its
    folder, and sent to its store once it has one.

    Args:
        place: folder of the run.
        protocols: some of PROTOCOLS.
        options: how to measure, and on which workers.
        network: student or teacher; None: the one that the run has evaluated.
        name: another data set than the run's.
        root: folder of the images, if they were moved, or of the other data set.
        say: called with a line about anything that takes time.
        show: called with a line about images of test that are also in train.

    Raises:
        ConfigError: there is no such run, it is not finished, or it has no test split or no store; or a protocol does not fit its
            data, which is said after the others are measured.
        DataError: an image cannot be read.
        WorkersGone: workers were lost for good.
    """
    record = _finished(place)
    off = record.uri == OFF
    config = recorded(place, None if name else root)
    network = network or config.evaluation.network
    done = _epochs(config, place, network)
    other, data = _other(config.data, name, root) if name else ("", None)
    numbers = plan(protocols, options, config.evaluation, network, other)
    logged = {} if off else reader.evaluations_of(record.uri, str(record.run_id), "test")
    kept = tested.read(place)
    known = tested.metrics(kept) | logged
    missing = [entry for entry in kept if not entry["metrics"].keys() <= logged.keys()]
    for entry in [] if off else missing:
        _log(record, place, entry)
    if new := [number for number in numbers if number.key not in known]:
        from rotssl.evaluation.setting import Setting

        check_writable(place)
        setting = Setting(config, str(place), network, done, data)
        images = setting.images(show)
        with _crew(options.scaling, setting, images, say) as crew:
            for entry in _measure(setting, place, new, images, say, crew, options.scaling.use_gpu):
                known |= entry["metrics"]
                if off:
                    missing.append(entry)
                    tested.write(place, missing)
                else:
                    _log(record, place, entry, kept)
    return Assessed(config.tracking.run_name, known, bool(new), place / tested.FILE if off else None)


def check_test(data: DataConfig, labelled: bool) -> None:
    """Check that a data set has a labelled test split for ``evaluation.protocols``, without loading it.

    Args:
        data: the data section.
        labelled: whether its training images have labels.

    Raises:
        ConfigError: it has none.
    """
    spec, why = DATASETS[data.name], "evaluation.protocols: they are measured on test, but"
    if spec.kind == "folders":
        datasets.test_files(data, why)
    elif (spec.kind == "packed" and "test" not in packed_sets.opened(data)[1].splits) or not labelled:
        raise ConfigError(f"{why} {data.name} in {data.root} has no labelled test split")
    folder = Path(os.path.expanduser(data.root or "")) / spec.folder
    missing = [name for name in spec.test_files if not (folder / name).is_file()]
    if missing and not data.download:
        raise ConfigError(f"{why} there is no {missing[0]} in {folder}")


def at_end(
    state: RunState, config: cfg.ResolvedConfig, workers: Workers | None, say: Say = log.info
) -> Assessed | None:
    """Evaluate a run by ``evaluation.protocols``, if it is finished and that is not done.

    What goes wrong is a warning and ``state.untested``: the run is finished whatever becomes of these numbers, and the next start
    tries again.

    Args:
        state: of the run, in its folder.
        config: of the run.
        workers: that have trained it, who share the work; None: this process.
        say: called with a line when it starts, and with the titles of what takes time.

    Returns:
        What is known of the run on test; None if there was nothing to do, or it failed.
    """
    if not state.to_test(config):
        return None
    scaling = WorkerOptions(use_gpu=config.scaling.use_gpu)
    if workers is not None:
        cpus = config.scaling.cpus_per_worker
        scaling = WorkerOptions(num_workers=workers.count, use_gpu=workers.use_gpu, cpus_per_worker=cpus)
    names, found = tuple(dict.fromkeys(config.evaluation.protocols or ())), None
    # Whatever ends this process, the next start knows that something is left to do.
    state.untested = "the evaluation was cut short"
    try:
        state.write(state.status, state.reason)
        options = Options(scaling=scaling)
        say(f"evaluating on test: {', '.join(names)}")
        found = assess(state.path.parent, names, options, say=say, show=_warn)
        state.tested, state.untested = sorted({*state.tested, *names}), ""
    except Exception as error:  # of any kind: of a store, of a disk, of memory
        state.untested = in_a_line(error)
        tell = "%s is finished, but could not be evaluated on test (%s); the same command tries again"
        log.warning(tell, state.path.parent.name, state.untested)
    try:
        state.write(state.status, state.reason)
    except OSError as error:
        log.warning("could not update %s: %s", state.path, error)
    return found


def _warn(line: str) -> None:
    """Log a line about images, which may say itself that it warns."""
    log.warning(line.removeprefix("warning: "))


def _crew(
    options: WorkerOptions, setting: "Setting", images: "tuple[ImageSet, ImageSet]", say: Say
) -> "contextlib.AbstractContextManager[Crew | None]":
    """Ray workers, if there are to be any, within the body."""
    if options.num_workers == 0:
        return contextlib.nullcontext()
    from rotssl.runtimes import ray_crew

    return ray_crew.crew_of(options, setting, images, say)


def _epochs(config: cfg.ResolvedConfig, place: AnyPath, network: str) -> int:
    """The epochs of a run that has all of them, and a network of this name.

    Raises:
        ConfigError: it lacks some, or the teacher.
    """
    if network == "teacher" and not METHODS[config.method.name].teacher:
        raise ConfigError(f"--network: got teacher, expected student: {config.method.name} has no teacher")
    done = max(journal.read(place), default=0)
    if done < config.train.epochs:
        count = f"{done} of {config.train.epochs} epochs"
        raise ConfigError(f"--checkpoint: the journal in {place} has {count}; run it again first")
    return done


def _log(
    record: RunState, place: AnyPath, entry: Mapping[str, Any], kept: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Send an entry to the run's store, with its files; a new one, beside those that are kept, stays if that fails."""
    folder = entry.get("folder")
    names = entry.get("files", ()) if folder else ()
    files = [place / tested.FOLDER / str(folder) / name for name in names]
    what = entry["epoch"], entry["metrics"], entry["facts"], files
    try:
        writer.log_evaluation(record.uri, str(record.run_id), "test", *what)
    except Exception:  # of any kind: the test split is not used again because a store did not answer
        if kept is not None:
            tested.write(place, [*kept, entry])
        raise


def _other(ours: ResolvedData, name: str, root: str | None) -> tuple[str, ResolvedData]:
    """What another data set is called in keys, and its data section, in the views' size of the run.

    Raises:
        ConfigError: there is no such data set, it lacks a folder, or it is the run's own.
    """
    if name not in DATASETS:
        raise ConfigError(f"data.name: got {name!r}, expected {', '.join(DATASETS)}{nearest(name, DATASETS)}")
    kind = DATASETS[name].kind
    if kind != "package" and root is None:
        raise ConfigError(f"data.root: got none, expected the folder of {name}")
    there = os.path.abspath(os.path.expanduser(root)) if root and "://" not in root else root or ""
    same = kind in ("package", "torchvision") or there == os.path.abspath(os.path.expanduser(ours.root or ""))
    if name == ours.name and same:
        raise ConfigError(f"data.name: {name} is the run's own data set; leave it out")
    data = dataclasses.replace(ours, name=name, root=root, limit=None)
    if kind in ("package", "torchvision"):
        return name, data
    last = re.sub(r"[^\w.-]+", "-", there.rstrip("/").rsplit("/", 1)[-1]) or "root"
    return f"{name}-{last}-{zlib.crc32(there.encode()):08x}", data


def _finished(place: AnyPath) -> RunState:
    """The state of the finished run in a folder, whose store is at hand.

    Raises:
        ConfigError: there is none.
    """
    record = RunState.read(place / "run.json", {})
    off = record.uri == OFF
    if record.status != "finished" or (record.run_id is None and not off):
        raise ConfigError(f"--checkpoint: {place} does not hold a finished run (status: {record.status})")
    if is_gone(record.uri):
        raise ConfigError(
            f"--checkpoint: the store of {place} is not there any more ({record.uri}); move it back, or run "
            "jobs/pretrain.py with the run's configuration and its new --storage.path, which makes a new one"
        )
    if not off and (reason := store.reachable(record.uri)):
        raise ConfigError(reason)
    return record


def _measure(
    setting: "Setting",
    folder: AnyPath,
    numbers: Sequence[Number],
    images: "tuple[ImageSet, ImageSet]",
    say: Say,
    crew: "Crew | None",
    use_gpu: bool | Auto,
) -> Iterator[dict[str, Any]]:
    """Measure numbers, protocol by protocol; yields an entry for each, whose files are in the run's folder.

    Args:
        setting: what is measured.
        folder: of the run.
        numbers: what to measure, those of a protocol one after the other.
        images: of the setting.
        say: called with a line about anything that takes time.
        crew: does the tasks; None: this process.
        use_gpu: whether this process may use a GPU.

    Raises:
        ConfigError: a protocol does not fit the data; after the others are measured.
    """
    import torch

    from rotssl.engine.runtime import indexed
    from rotssl.evaluation import cards
    from rotssl.evaluation.bench import Bench

    config, (train, test) = setting.config, images
    device = indexed(torch.device("cuda" if torch.cuda.is_available() and use_gpu is not False else "cpu"))
    bench = Bench(*setting.loaded(train, test, device), say=say, crew=crew)
    common = setting.facts(len(bench.chosen), train, test)
    refused = list[ConfigError]()
    for protocol, group in itertools.groupby(numbers, lambda number: number.protocol):
        try:
            results = bench.measure(list(group))
        except ConfigError as error:
            refused.append(error)
            continue
        # What trains by itself takes all images, whatever the bank is.
        whole = {"bank_images": len(train)} if protocol in ("semi", "sgd", "finetune") else {}
        card = cards.card(common | whole, results)
        place, files = _save(folder, protocol, results, cards.written(card))
        metrics = {key: value for result in results for key, value in result.metrics.items()}
        texts = protocol_texts(config.evaluation, "test")
        plain = f"{protocol}_protocol" if f"{protocol}/top1" in metrics else ""
        facts = ({plain: texts[plain]} if plain in texts else {}) | cards.params(card)
        found = (setting.epoch, metrics, facts)
        yield dict(zip(tested.ENTRY, found, strict=True)) | {"card": card, "folder": place, "files": files}
    if refused:
        raise refused[0]


def _save(folder: AnyPath, protocol: str, results: "Sequence[Result]", card: str) -> tuple[str, list[str]]:
    """Write what belongs to the numbers of a protocol below the run's folder; returns the folder and its files."""
    from rotssl.evaluation import hits

    keys = ",".join(sorted(result.number.key for result in results))
    place = f"{protocol}-{hashlib.sha256(keys.encode()).hexdigest()[:8]}"
    files = {name: text for result in results for name, text in result.files.items()} | {"card.json": card}
    with filled_whole(folder / tested.FOLDER / place) as made:
        for name, text in files.items():
            write_whole(made / name, text)
        hits.save({name: found for result in results for name, found in result.hits.items()}, made)
    return place, sorted([*files, hits.FILE])
