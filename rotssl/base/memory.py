"""Memory of this machine and of processes, in bytes, and settings of malloc."""

import ctypes
import os
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)


def host_memory() -> int:
    """Memory of this machine, or of the container of this process."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _LIMITS):
        text = path.read_text().strip() if path.exists() else "max"
        sizes += [int(text)] if text.isdecimal() else []
    return min(sizes)


def parts(pid: int | None = None) -> dict[str, int]:
    """Proportional set size of a process by kind: each page divided by the number of processes that map it.

    Sums over processes thus count every page once. ``anon`` is allocated memory, ``shmem`` shared memory such as Ray's object
    store, ``file`` pages of mapped files (libraries, a disk cache of images), which the kernel evicts when it needs memory.
    If the kernel does not report this (not Linux, or before 5.4), ``anon`` is the unique set size and the others are 0.

    Args:
        pid: id of the process; None for this one.
    """
    try:
        lines = Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text().splitlines()
        found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_")}
        return {kind: found[f"Pss_{kind.capitalize()}"] for kind in ("anon", "shmem", "file")}
    except (OSError, KeyError):
        import psutil  # needed only here, and not installed on every machine

        return {"anon": int(psutil.Process(pid).memory_full_info().uss), "shmem": 0, "file": 0}


def host_bytes(pid: int | None = None) -> int:
    """A process's share of the memory of its node that only its end, or swapping, would free: ``anon`` and ``shmem``."""
    found = parts(pid)
    return found["anon"] + found["shmem"]


def tune_malloc() -> None:
    """Let this process keep freed memory for its next allocation.

    By default glibc maps every large block anew and returns it when freed, so each training step on a CPU would request the
    memory of its activations page by page. Blocks over 1 GiB are still returned, or over 32 MiB with an old glibc that rejects
    the larger threshold. Without glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # If 1 GiB is rejected, set a lower threshold: the next call stops its automatic growth, at 128 KiB by default.
        if not mallopt(_MMAP_THRESHOLD, 1 << 30):
            mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, -1)


def is_exhausted(error: BaseException) -> bool:
    """Whether an error means that a device or this machine is out of memory; torch raises several kinds."""
    import torch

    words = "not enough memory", "can't allocate memory", "ALLOC_FAILED", "out of memory"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
