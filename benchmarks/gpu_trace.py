"""What a profile of some steps says: the dearest kernels, how busy the device was, its longest gaps. In numbers and a picture."""

import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Span = tuple[float, float]  # microseconds


def device_events(events: Iterable[Any], cuda: bool) -> list[Any]:
    """Kernels and copies of a GPU; on a CPU, the outermost operations."""
    from torch.autograd import DeviceType

    if not cuda:
        return [event for event in events if event.cpu_parent is None]
    marks = [event for event in events if event.device_type == DeviceType.CUDA]  # names of steps among them
    # Names of kernels may have a # as well: {lambda(float)#1}.
    return [event for event in marks if not (event.is_user_annotation or re.fullmatch(r"[\w.]+#[\w.]+", event.name))]


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that don't overlap, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def summary(events: Iterable[Any], steps: int, cuda: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Kernels by the time that they take, on a CPU operations without those that they call, and what the device did over all.

    Args:
        events: of torch's profiler.
        steps: that were watched.
        cuda: whether the device is a GPU.
    """
    events = list(events)
    chosen = device_events(events, cuda)
    times, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    for event in chosen if cuda else events:
        times[event.name] += event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        counts[event.name] += 1
    whole = sum(times.values()) or 1.0
    kernels = [
        {
            "kernel": name[:90],
            "share": times[name] / whole,
            "us a step": times[name] / steps,
            "a step": counts[name] / steps,
        }
        for name in sorted(times, key=lambda name: -times[name])
    ]
    busy = union((event.time_range.start, event.time_range.end) for event in chosen)
    wall = busy[-1][1] - busy[0][0] if busy else 1.0
    between = [(after[0] - before[1], before[1], after[0]) for before, after in itertools.pairwise(busy)]
    gaps = sorted(between, reverse=True)
    found = {
        "launches a step" if cuda else "operations a step": sum(counts.values()) / steps,
        "busy share": sum(end - start for start, end in busy) / wall,
        "longest gaps": [{"us": gap, "host did": host_work(events, start, end)} for gap, start, end in gaps[:8]]
        if cuda
        else [],
    }
    # What the host does from one launch to the next: as long as that is more than a kernel takes, the device waits for it.
    calls = sorted(event.time_range.start for event in events if "launchkernel" in event.name.lower())
    if len(calls) > 1:
        found["us between launches"] = statistics.median(b - a for a, b in itertools.pairwise(calls))
    return kernels, found


def host_work(events: Sequence[Any], start: float, end: float) -> str:
    """The operations of the host that take most of a gap, outermost ones."""
    from torch.autograd import DeviceType

    spent = defaultdict[str, float](float)
    for event in events:
        if event.device_type == DeviceType.CPU and event.cpu_parent is None:
            within = min(end, event.time_range.end) - max(start, event.time_range.start)
            if within > 0:
                spent[event.name] += within
    told = sorted(spent, key=lambda name: -spent[name])[:3]
    named = sum(spent[name] for name in told)
    rest = max(0.0, end - start - named)
    return ", ".join([*(f"{name} {spent[name]:.0f} us" for name in told), f"no operation {rest:.0f} us"])


def draw(events: Iterable[Any], kernels: Sequence[dict[str, Any]], cuda: bool, steps: int, path: Path) -> None:
    """The dearest kernels as bars, and below one step of the device's time, busy and idle."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    chosen = device_events(events, cuda)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(11, 7), height_ratios=(4, 1), layout="constrained")
    names = [row["kernel"][:70] for row in kernels][::-1]
    upper.barh(names, [row["us a step"] / 1000 for row in kernels][::-1], color="tab:blue")
    upper.set_xlabel("ms a step")
    upper.tick_params(axis="y", labelsize=7)
    upper.set_title("Where the device's time goes" if cuda else "Where the time goes, by operation")
    busy = union((event.time_range.start, event.time_range.end) for event in chosen)
    if busy:
        start, length = busy[0][0], (busy[-1][1] - busy[0][0]) / steps
        # A step in the middle: the first ones still fill the queue of launches.
        begin = start + (steps // 2) * length
        shown = [((a - begin) / 1000, (b - a) / 1000) for a, b in busy if a < begin + length and b > begin]
        lower.broken_barh(shown, (0, 1), color="tab:blue")
        lower.set_xlim(0, length / 1000)
    lower.set_yticks([])
    lower.set_xlabel("ms of one step; white: the device had nothing to do")
    for panel in (upper, lower):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
