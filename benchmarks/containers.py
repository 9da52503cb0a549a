"""Which container for large pictures: how long does one picture at random take out of each, and a batch of them?

    python benchmarks/containers.py [--images 4096] [--rounds 5] [--peers FOLDER] [--output FOLDER]

Writes made-up JPEGs of ImageNet's sizes (made_up.py) with each library as its documentation says, and reads their bytes at random
from a warm page cache, in one thread, without decoding. Each library runs in a process of its own, in an environment of their own
(--peers); the first one is this project's packed set: tar files with an index. Needs $ROTSSL_DATA. Writes
benchmarks/results/containers_DATE.md.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("litdata", "mosaicml-streaming", "array-record", "pylance", "pyarrow")
BATCH = 256
Read = Callable[[Sequence[int]], list[bytes]]


def packed(files: list[Path], folder: Path) -> Read:
    """Rotssl's packed set."""
    from rotssl.base.place import Folder
    from rotssl.data.packed import Manifest
    from rotssl.data.packed_sets import rows
    from rotssl.data.shards import Shards
    from rotssl.packing import packer
    from rotssl.packing.processes import in_processes
    from rotssl.packing.shards import Options
    from rotssl.packing.sources import look

    source = look(str(files[0].parents[2]), ("", ""))
    manifest = packer.pack(packer.plan(source, Options()), str(folder), lambda *given: in_processes(*given, 1))
    index = rows(Folder(folder), manifest, "train")
    shards = Shards(Folder(folder), Manifest.read(Folder(folder)).splits["train"], folder)  # type: ignore[union-attr]
    places = [(int(row["shard"]), int(row["offset"]), int(row["length"])) for row in index]
    return lambda wanted: [shards.read(*places[i]) for i in wanted]


def _entry(file: str) -> dict[str, Any]:
    return {"image": Path(file).read_bytes(), "label": int(Path(file).parent.name)}


def litdata(files: list[Path], folder: Path) -> Read:
    """LitData's chunks."""
    from litdata import StreamingDataset, optimize

    optimize(_entry, [str(file) for file in files], str(folder), chunk_bytes="64MB", num_workers=1)
    known = StreamingDataset(str(folder), shuffle=False)
    return lambda wanted: [known[i]["image"] for i in wanted]


def mds(files: list[Path], folder: Path) -> Read:
    """MosaicML Streaming's MDS."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as out:
        for file in files:
            out.write(_entry(str(file)))
    known = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return lambda wanted: [known[i]["image"] for i in wanted]


def array_record(files: list[Path], folder: Path) -> Read:
    """ArrayRecord, with groups of one record, as its documentation advises for random access."""
    from array_record.python import array_record_data_source as source
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    paths = []
    for first in range(0, len(files), 1024):
        paths.append(str(folder / f"{first:06}.array_record"))
        writer = ArrayRecordWriter(paths[-1], "group_size:1")
        for file in files[first : first + 1024]:
            writer.write(file.read_bytes())
        writer.close()
    known = source.ArrayRecordDataSource(paths)
    return lambda wanted: list(known.__getitems__(list(wanted)))


def lance(files: list[Path], folder: Path) -> Read:
    """Lance."""
    import lance
    import pyarrow

    entries = [_entry(str(file)) for file in files]
    kinds = pyarrow.schema([("image", pyarrow.large_binary()), ("label", pyarrow.int64())])
    known = lance.write_dataset(pyarrow.Table.from_pylist(entries, kinds), str(folder))
    return lambda wanted: known.take(list(wanted), columns=["image"])["image"].to_pylist()


def parquet(files: list[Path], folder: Path) -> Read:
    """Parquet, in row groups of 100 pictures."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([_entry(str(file)) for file in files])
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=100, compression="none")
    known = pyarrow.parquet.ParquetFile(folder / "all.parquet")

    def one(i: int) -> bytes:
        return known.read_row_group(i // 100, ["image"])["image"][i % 100].as_py()  # type: ignore[no-any-return]

    return lambda wanted: [one(i) for i in wanted]


CONTAINERS = {each.__name__: each for each in (packed, litdata, mds, array_record, lance, parquet)}


def measure(name: str, work: Path, rounds: int) -> dict[str, Any]:
    """Seconds to write, bytes, and in each round microseconds a picture, alone and in batches."""
    import numpy as np

    files, folder = sorted((work / "jpegs").rglob("*.jpg")), work / name
    started = time.perf_counter()
    read = CONTAINERS[name](files, folder)
    told: dict[str, Any] = {"write": time.perf_counter() - started, "one": [], "batch": []}
    told["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    sizes = sum(file.stat().st_size for file in files)
    assert sum(map(len, read(range(len(files))))) == sizes  # all of them, which also fills the page cache
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        order = [int(i) for i in rng.permutation(len(files))[: 2 * BATCH]]
        for kind, parts in (("one", [[i] for i in order]), ("batch", [order[:BATCH], order[BATCH:]])):
            started = time.perf_counter()
            for part in parts:
                read(part)
            told[kind].append(1e6 * (time.perf_counter() - started) / len(order))
    return told


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "rotssl-containers")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.rounds)))
        return 0
    import made_up
    from common import command, commit, import_path, machine, shown
    from paired import peers

    python = peers(args.peers, PACKAGES)
    lines = [
        f"# Containers for large pictures, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}.",
        f"{args.images:,} made-up JPEGs. Bytes at random from a warm page cache, one thread, nothing decoded; {args.rounds} "
        f"rounds of {2 * BATCH} pictures, one by one and {BATCH} at a time; median (range).",
        "",
        "| container | write, s | size over the files' | one picture, us | a picture of a batch, us |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        total = made_up.make(work / "jpegs", args.images, 16, os.cpu_count() or 1)
        for name in CONTAINERS:
            where = sys.executable if name == "packed" else str(python)
            if python is None and name != "packed":
                continue
            told = [where, __file__, "--rounds", str(args.rounds), "--measure", name, str(work)]
            done = subprocess.run(told, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": import_path()})
            if done.returncode:
                lines.append(f"| {name} | failed: {(done.stderr.splitlines() or [''])[-1][:160]} | | | |")
                print(done.stderr[-2000:], file=sys.stderr)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            lines.append(
                f"| {name} | {found['write']:.1f} | {found['bytes'] / total:.3f} | {shown(found['one'], '.0f')} "
                f"| {shown(found['batch'], '.0f')} |"
            )
            print(lines[-1], flush=True)
            shutil.rmtree(work / name, ignore_errors=True)
    print("\n".join(lines))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"containers_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
