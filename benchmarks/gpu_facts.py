"""What is said beside the results of gpu.py: the device, the versions, the code; and the report that is made of them."""

import hashlib
import os
import platform
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).parent.parent
PACKAGES = ("torchvision", "timm", "numpy", "ray", "lightly")


def missing(device: str) -> str:
    """What keeps this machine from using the device, in a line; empty if nothing does."""
    import torch

    return (
        "--device: got cuda, but torch sees no GPU here" if device == "cuda" and not torch.cuda.is_available() else ""
    )


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
    for file in sorted([*(ROOT / "rotssl").rglob("*.py"), *(ROOT / "benchmarks").glob("gpu*")]):
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


def facts(kind: str, bundle: Path) -> dict[str, Any]:
    """Device, versions, machine and code."""
    import torch

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
    host = f"{os.cpu_count()} cores, {platform.platform(terse=True)}"
    return {"device": device, "versions": versions, "host": host, "commit": commit(bundle), "code": code()}


def tail(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-40:] if line.strip()]
    return (lines or ["nothing was printed"])[-1][:300]


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
        text.append("In miniature: these figures only show that the cells run.")
    text += ["| cell | question | status | seconds |", "|---|---|---|---|"]
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
        text += [
            "",
            f"{line['started']}, {where}, {line['host']}; {versions}; commit {line['commit']}, code {line['code']}.",
        ]
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
