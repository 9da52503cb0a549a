"""What is said beside the results of gpu.py: the device, the versions, the code; and the report that is made of them."""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import common
from gpu_queue import Refused

ROOT = Path(__file__).parent.parent
PACKAGES = ("torchvision", "timm", "numpy", "torchcodec", "ray", "lightly")


def ask(device: str, bundle: Path) -> dict[str, Any]:
    """What ``facts`` says, from another process: a GPU may take one process at a time, and the cells need it.

    Raises:
        Refused: torch has no such device here.
    """
    command = [sys.executable, str(Path(__file__).resolve()), device, str(bundle)]
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise Refused(f"--device: {device} did not answer within {error.timeout:.0f} s") from error
    if done.returncode:
        raise Refused(
            (done.stderr.strip().splitlines() or [f"the look at the device ended with {done.returncode}"])[-1]
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _absent(modules: Iterable[str]) -> set[str]:
    """Those of these modules' packages that are not installed."""
    names = {module.partition(".")[0] for module in modules}
    return {name for name in names if importlib.util.find_spec(name) is None}


def here(modules: Iterable[str], bundle: Path) -> bool:
    """Whether these modules' packages are installed, or in the bundle, as far as names show."""
    listed = bundle / "site.list"
    packed = {line.partition("-")[0] for line in listed.read_text().splitlines()} if listed.exists() else set()
    return _absent(modules) <= packed


def import_path(needs: Sequence[str], site: Path | None) -> str:
    """PYTHONPATH of a cell that needs these modules: the bundle's packages come first, where one of them is not installed.

    Where all are, the bundle is left out, whose packages would hide others of the same name, and may be for another Python.
    """
    ours = [str(ROOT), str(ROOT / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    packed = [str(site)] if site is not None and _absent(needs) else []
    return os.pathsep.join(filter(None, packed + ours))


def lacking(bundle: Path) -> list[str]:
    """What some cells, or the lines about this machine, would like to have."""
    found = [] if archive(bundle).is_file() else ["CIFAR-10's archive"]
    found += [] if shutil.which(os.environ.get("CXX") or "g++") else ["a C++ compiler"]
    return found + [name for name in ("nvidia-smi", "git") if shutil.which(name) is None]


def archive(bundle: Path) -> Path:
    """CIFAR-10 as JPEG folders: the bundle's, or that of $ROTSSL_DATA."""
    ours = bundle / "cifar10-jpeg.tar.gz"
    return ours if ours.exists() else Path(os.environ.get("ROTSSL_DATA", "")) / ours.name


def unpack(bundle: Path, scratch: Path) -> Path | None:
    """The bundle's Python packages, unpacked once; None without a bundle."""
    source, folder = bundle / "site.tar.xz", scratch / "site"
    if not source.exists():
        return None
    if not folder.exists():
        part = scratch / "site.part"
        with tarfile.open(source) as files:
            files.extractall(part, filter="tar")  # programs stay executable
        part.rename(folder)
    return folder


def code() -> str:
    """A checksum of the sources, since a bare machine has no git to ask."""
    digest = hashlib.sha256()
    ours = [ROOT / "benchmarks" / name for name in ("common.py", "contenders.py")]
    for file in sorted([*(ROOT / "rotssl").rglob("*.py"), *(ROOT / "benchmarks").glob("gpu*"), *ours]):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def commit(bundle: Path) -> str:
    """Of this checkout, or as the bundle has it."""
    found, noted = common.commit(), bundle / "commit"
    return noted.read_text().strip() if found == "unknown" and noted.exists() else found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def facts(kind: str, bundle: Path) -> dict[str, Any]:
    """Device, versions, machine and code.

    Raises:
        Refused: torch has no such device here.
    """
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise Refused("--device: got cuda, but torch sees no GPU here")
    device: dict[str, Any] = {"type": kind, "name": common.machine()}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device |= {"name": properties.name, "count": torch.cuda.device_count(), "driver": _driver()}
        device |= {"memory": properties.total_memory, "processors": properties.multi_processor_count}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    host = f"{_processor()}, {os.cpu_count()} cores, {platform.platform(terse=True)}"
    return {"device": device, "versions": versions, "host": host, "commit": commit(bundle), "code": code()}


def tail(log: Path, since: int, count: int) -> str:
    """The last lines that say something, of what came after so many bytes."""
    with log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - 100_000))
        lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def shorten(log: Path, most: int = 8_000_000) -> None:
    """Cut off the beginning of a log that has become too long to be carried around."""
    if log.stat().st_size > most:
        log.write_bytes(b"(cut off)\n" + log.read_bytes()[-most // 2 :])


def report(lines: Sequence[dict[str, Any]], cells: Iterable[Any], kind: str, smoke: bool) -> str:
    """All results of a kind of device as tables, the newest of each cell."""
    newest = {}
    for line in lines:
        if (line["device"]["type"], line["smoke"]) == (kind, smoke):
            done_before = newest.get(line["name"], {}).get("status") == "done"
            newest[line["name"]] = newest[line["name"]] if done_before and line["status"] != "done" else line
    names = [cell.name for cell in cells if cell.name in newest]
    names += [name for name in newest if name not in names]
    text = ["# Results on " + ", ".join(sorted({newest[name]["device"]["name"] for name in names}))]
    if smoke:
        text += ["", "In miniature: these figures only show that the cells run."]
    text += ["", "| cell | question | status | seconds |", "|---|---|---|---|"]
    for name in names:
        line = newest[name]
        status = line["status"] + (f": {line['reason']}" if line["reason"] else "")
        text.append(f"| {name} | {line['answers']} | {_cell(status)} | {line['seconds']:.0f} |")
    for name in names:
        line = newest[name]
        driver = line["device"].get("driver")
        where = f"{line['device']['name']}" + (f", driver {driver}" if driver else "")
        versions = ", ".join(f"{key} {value}" for key, value in line["versions"].items() if value)
        text += ["", f"## {name}", "", line["answers"], ""]
        text += table("", line["result"]) or ["Nothing was found."]
        host = line["host"] if line["device"]["type"] == "cuda" else ""  # a CPU is its own device
        told = [f"{line['started']}, {where}" + (f", {host}" if host else ""), versions]
        text += ["", "; ".join([*told, f"commit {line['commit']}, code {line['code']}."])]
    return "\n".join(text) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(prefix: str, result: dict[str, Any]) -> list[str]:
    """A result as Markdown: rows of one shape become a table, the rest a list."""
    text: list[str] = []
    for key, value in result.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            heads = list(dict.fromkeys(head for row in value for head in row))
            text += ["", f"{name}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            text += [f"| {' | '.join(_cell(row.get(head, '')) for head in heads)} |" for row in value] + [""]
        elif isinstance(value, dict):
            text += table(f"{name}, ", value)
        else:
            text.append(f"- {name}: {_cell(value)}")
    return text


if __name__ == "__main__":
    try:
        print(json.dumps(facts(sys.argv[1], Path(sys.argv[2]))))
    except Refused as error:
        sys.exit(str(error))
