"""The driver of an evaluation: the encoder of a finished run on the test split."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotssl import config as cfg
from rotssl.base.address import is_gone
from rotssl.base.paths import AnyPath, write_whole
from rotssl.commands import EXIT_FAILED, EXIT_OK, folder_of, recorded
from rotssl.config.fields import ConfigError
from rotssl.config.sections import OFF
from rotssl.data import datasets, likeness
from rotssl.data.images import DataError
from rotssl.data.record import Record
from rotssl.evaluation.protocol import protocols as protocol_texts
from rotssl.reports import terminal
from rotssl.runs import journal
from rotssl.runs.state import RunState, check_writable
from rotssl.tracking import reader, store, writer

log = logging.getLogger(__name__)
PROTOCOLS = ("knn", "linear")
KEPT, ENTRY = "test.json", ("epoch", "metrics", "facts")  # in the folder of a run without MLflow


def evaluate(
    run_id: str | None, folder: str | None, protocols: Sequence[str], uri: str, root: str | None = None
) -> int:
    """Carry out jobs/evaluate.py; returns the exit code.

    The numbers are logged to a child run of the evaluated one. Existing numbers are printed, not measured again: the test split
    is used once. For a run without MLflow they are kept in its folder, and sent to its store once it has one.

    Args:
        run_id: id of the run in MLflow, or None.
        folder: folder of the run, if there is no run_id.
        protocols: some of PROTOCOLS.
        uri: URI of the tracking store that has the run_id.
        root: folder of the images, if they were moved.

    Raises:
        ConfigError: there is no such run, it is not finished, or it has no test split or no store.
    """
    place = folder_of("--checkpoint", folder or reader.run_folder_of(uri, str(run_id)))
    record = _finished(place)
    off = record.uri == OFF
    config = recorded(place, root)
    done = max(journal.read(place), default=0)
    if done < config.train.epochs:
        count = f"{done} of {config.train.epochs} epochs"
        raise ConfigError(f"--checkpoint: the journal in {place} has {count}; run it again first")
    logged = {} if off else reader.evaluations_of(record.uri, str(record.run_id), "test")
    kept = _kept(place / KEPT)
    known = {key: value for entry in kept for key, value in entry["metrics"].items()} | logged
    missing = [entry for entry in kept if not entry["metrics"].keys() <= logged.keys()]
    new = sorted(name for name in protocols if f"{name}/top1" not in known)
    if new:
        if off:
            check_writable(place)
        texts = protocol_texts(config.evaluation, "test")
        shown = {f"{name}_protocol": texts[f"{name}_protocol"] for name in new}
        try:
            found = _measure(config, place, new)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
        missing.append(dict(zip(ENTRY, (done, found, shown), strict=True)))
        known |= found
    else:
        print("already measured:")
    if off and new:
        write_whole(place / KEPT, json.dumps(missing, indent=2) + "\n")
    for entry in [] if off else missing:
        writer.log_evaluation(record.uri, str(record.run_id), "test", *(entry[key] for key in ENTRY))
    terminal.show(terminal.measures(f"{config.tracking.run_name} on the test split", known, "test"))
    if off:
        print(f"not recorded in MLflow, because the run is not; saved in {place / KEPT}")
    return EXIT_OK


def _finished(place: AnyPath) -> RunState:
    """The state of the finished run in a folder, whose store is at hand.

    Raises:
        ConfigError: there is none.
    """
    record = RunState.read(place / "run.json", {})
    off = record.uri == OFF
    if record.status != "finished" or (record.run_id is None and not off) or not (place / "config.yaml").exists():
        raise ConfigError(f"--checkpoint: {place} does not hold a finished run (status: {record.status})")
    if is_gone(record.uri):
        raise ConfigError(
            f"--checkpoint: the store of {place} is not there any more ({record.uri}); move it back, or run "
            "jobs/pretrain.py with the run's configuration and its new --storage.path, which makes a new one"
        )
    if not off and (reason := store.reachable(record.uri)):
        raise ConfigError(reason)
    return record


def _kept(file: AnyPath) -> list[dict[str, Any]]:
    """The evaluations made while the run had no store, each with epoch, metrics and protocols.

    Raises:
        ConfigError: the file can't be read; ignoring it would use the test split again.
    """
    if not file.exists():
        return []
    try:
        return [{key: entry[key] for key in ENTRY} for entry in json.loads(file.read_text())]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"--checkpoint: {file} cannot be read ({type(error).__name__}: {error})") from error


def _measure(config: cfg.ResolvedConfig, folder: AnyPath, protocols: Sequence[str]) -> dict[str, float]:
    import torch

    from rotssl.data.augment import Augment
    from rotssl.engine.runtime import indexed
    from rotssl.evaluation.measure import Features, bank_of, encode_share, measures
    from rotssl.models.encoders import load_encoder

    if config.data.root is not None and not Path(config.data.root).exists():
        raise ConfigError(
            f"data.root: {config.data.root} is not there any more; give the images' new place: --data.root DIR"
        )
    test = datasets.load_test(config.data)
    splits = datasets.load(config.data, config.evaluation.holdout)
    reason = ""
    try:
        reason = Record.compared(splits.record, folder)
    except ValueError as error:
        log.warning("%s; the images are not compared with those of the run", error)
    if reason:
        raise ConfigError(f"data.root: the run was trained on other images: {reason}")
    train = splits.train
    for line in likeness.between(train, test, "test"):
        print(line)
    assert train.labels is not None and test.labels is not None
    device = indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    encoder = load_encoder(folder)[0].to(device, memory_format=layout)  # type: ignore[call-overload]
    augment = Augment(config.views, config.data.image_size, *datasets.normalization(config.data.name), 0)
    chosen = bank_of(train, config.evaluation.bank)
    labels = (torch.from_numpy(known).to(device) for known in (train.labels[chosen], test.labels))
    rows = (
        encode_share(encoder, train, augment, device, layout, chosen=chosen),
        encode_share(encoder, test, augment, device, layout),
    )
    bank, queries = map(Features, rows, labels)
    how = config.evaluation.knn_k, config.evaluation.knn_temperature
    computed = measures(bank, queries, "linear" in protocols, neighbours=how)
    found = {name: measure.compute() for name, measure in computed.items()}
    wanted = {f"{name}/top1" for name in protocols}
    return {key: value for key, value in found.items() if key in wanted or key == "feature/effective_rank"}
