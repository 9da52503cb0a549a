"""The driver of an evaluation: the encoder of a finished run on the test split."""

import dataclasses
import hashlib
import itertools
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rotssl import __version__
from rotssl import config as cfg
from rotssl.base.address import is_gone
from rotssl.base.paths import AnyPath, write_whole
from rotssl.commands import EXIT_FAILED, EXIT_OK, recorded, run_at, say
from rotssl.commands.images import check_there, images_of
from rotssl.config.datasets import DATASETS
from rotssl.config.evaluating import Options
from rotssl.config.fields import ConfigError, nearest
from rotssl.config.methods import METHODS
from rotssl.config.resolved import ResolvedData
from rotssl.config.sections import OFF
from rotssl.data import datasets, likeness
from rotssl.data.images import DataError, ImageSet
from rotssl.evaluation.plan import Number, plan
from rotssl.evaluation.protocol import protocols as protocol_texts
from rotssl.reports import terminal
from rotssl.runs import journal, tested
from rotssl.runs.state import RunState, check_writable
from rotssl.tracking import reader, store, writer

if TYPE_CHECKING:  # they import torch
    from rotssl.evaluation.cards import Result

FOLDER = "evaluation"  # in a run's folder, with a folder for the cards and hits of each protocol


def evaluate(
    run_id: str | None,
    folder: str | None,
    protocols: Sequence[str],
    uri: str,
    root: str | None = None,
    options: Options | None = None,
    network: str | None = None,
    name: str | None = None,
) -> int:
    """Carry out jobs/evaluate.py; returns the exit code.

    The numbers of each protocol are logged to a child run of the evaluated one. Existing numbers are printed, not measured again:
    the test split is used once. For a run without MLflow they are kept in its folder, and sent to its store once it has one.

    Args:
        run_id: id of the run in MLflow, or None.
        folder: folder of the run, if there is no run_id.
        protocols: some of PROTOCOLS.
        uri: URI of the tracking store that has the run_id.
        root: folder of the images, if they were moved, or of the other data set.
        options: how to measure.
        network: student or teacher; None: the one that the run has evaluated.
        name: another data set than the run's.

    Raises:
        ConfigError: there is no such run, it is not finished, or it has no test split or no store.
    """
    place = run_at(folder or reader.run_folder_of(uri, str(run_id)))
    record = _finished(place)
    off = record.uri == OFF
    config = recorded(place, None if name else root)
    network = network or config.evaluation.network
    done = _epochs(config, place, network)
    other, data = _other(config.data, name, root) if name else ("", None)
    numbers = plan(protocols, options or Options(), config.evaluation, network, other)
    logged = {} if off else reader.evaluations_of(record.uri, str(record.run_id), "test")
    kept = tested.read(place)
    known = tested.metrics(kept) | logged
    missing = [entry for entry in kept if not entry["metrics"].keys() <= logged.keys()]
    for entry in [] if off else missing:
        _log(record, place, entry)
    if new := [number for number in numbers if number.key not in known]:
        check_writable(place)
        try:
            for entry in _measure(config, place, new, network, done, data):
                known |= entry["metrics"]
                if off:
                    missing.append(entry)
                    tested.write(place, missing)
                else:
                    _log(record, place, entry, kept)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
    else:
        print("already measured:")
    _show(config.tracking.run_name, known, place / tested.FILE if off else None)
    return EXIT_OK


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


def _show(name: str, known: Mapping[str, float], kept: AnyPath | None) -> None:
    """Print what is known of a run on test, and where it is kept if there is no store."""
    from rotssl.reports import evaluations

    more = [row for row in evaluations.rows(known) if row[0] not in ("knn", "linear")]
    terminal.show(terminal.measures(f"{name} on the test split", known, "test", more))
    if kept is not None:
        print(f"not recorded in MLflow, because the run is not; saved in {kept}")


def _log(
    record: RunState, place: AnyPath, entry: Mapping[str, Any], kept: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Send an entry to the run's store, with its files; a new one, beside those that are kept, stays if that fails."""
    folder = entry.get("folder")
    names = entry.get("files", ()) if folder else ()
    files = [place / FOLDER / str(folder) / name for name in names]
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
    config: cfg.ResolvedConfig,
    folder: AnyPath,
    numbers: Sequence[Number],
    network: str,
    epoch: int,
    other: ResolvedData | None,
) -> Iterator[dict[str, Any]]:
    """Measure numbers, protocol by protocol; yields an entry for each, whose files are in the run's folder.

    Args:
        config: of the run.
        folder: of the run.
        numbers: what to measure, those of a protocol one after the other.
        network: student or teacher.
        epoch: of the run's end, 1-based.
        other: the data section of another set than the run's, or None.
    """
    import torch

    from rotssl.data.augment import Augment
    from rotssl.engine.runtime import indexed
    from rotssl.evaluation import cards
    from rotssl.evaluation.bench import Bench
    from rotssl.models.networks import network_of

    encoder = network_of(folder, network, epoch).encoder
    data = other or config.data
    train, test = _images(config, folder, other)
    device = indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    encoder = encoder.to(device, memory_format=layout)  # type: ignore[call-overload]
    augment = Augment(config.views, config.data.image_size, *datasets.normalization(config.data.name), 0)
    bench = Bench(config, encoder, train, test, augment, device, say)
    side = config.data.image_size
    common = {
        **{"network": network, "run": config.tracking.run_name, "method": config.method.name, "epoch": epoch},
        **{"features": "encoder", "view": f"whole image, resized to {side} x {side}, normalised as in pretraining"},
        **{"bn": "running statistics", "precision": "fp32", "data": data.name},
        **{"bank": "train, without what is held out for validation", "bank_images": len(bench.chosen)},
        **{"bank_digest": cards.digest(train), "query_split": "test", "query_images": len(test)},
        **{"query_digest": cards.digest(test), "rotssl": __version__},
    }
    for protocol, group in itertools.groupby(numbers, lambda number: number.protocol):
        results = bench.measure(list(group))
        # What trains by itself takes all images, whatever the bank is.
        whole = {"bank_images": len(train)} if protocol in ("semi", "sgd", "finetune") else {}
        card = cards.card(common | whole, results)
        place, files = _save(folder, protocol, results, cards.written(card))
        metrics = {key: value for result in results for key, value in result.metrics.items()}
        texts = protocol_texts(config.evaluation, "test")
        plain = f"{protocol}_protocol" if f"{protocol}/top1" in metrics else ""
        facts = ({plain: texts[plain]} if plain in texts else {}) | cards.params(card)
        found = (epoch, metrics, facts)
        yield dict(zip(tested.ENTRY, found, strict=True)) | {"card": card, "folder": place, "files": files}


def _images(config: cfg.ResolvedConfig, folder: AnyPath, other: ResolvedData | None) -> tuple[ImageSet, ImageSet]:
    """The training images, and the test images."""
    from rotssl.evaluation.bench import check_labels

    data, holdout = other or config.data, config.evaluation.holdout
    check_there(data.root, moved=other is None)
    if other is not None:
        datasets.inspect(data, holdout)
    test = datasets.load_test(data)
    splits = images_of(config, folder) if other is None else datasets.load(data, holdout)
    check_labels(splits.train, test, splits.classes, data.name)
    for line in likeness.between(splits.train, test, "test"):
        print(line)
    return splits.train, test


def _save(folder: AnyPath, protocol: str, results: "Sequence[Result]", card: str) -> tuple[str, list[str]]:
    """Write what belongs to the numbers of a protocol below the run's folder; returns the folder and its files."""
    from rotssl.evaluation import hits

    keys = ",".join(sorted(result.number.key for result in results))
    place = f"{protocol}-{hashlib.sha256(keys.encode()).hexdigest()[:8]}"
    (folder / FOLDER / place).mkdir(parents=True, exist_ok=True)
    files = {name: text for result in results for name, text in result.files.items()} | {"card.json": card}
    for name, text in files.items():
        write_whole(folder / FOLDER / place / name, text)
    hits.save({name: found for result in results for name, found in result.hits.items()}, folder / FOLDER / place)
    return place, sorted([*files, hits.FILE])
