"""How much the machines that train are used: samples for MLflow's system metrics.

A thread of one process of each machine takes them and emits them as events, which the driver logs. Training does not wait for
them, and what gets lost is not sent again.
"""

import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch

from rotssl.config import ResolvedConfig
from rotssl.config.sections import OFF
from rotssl.engine.events import Usage

log = logging.getLogger(__name__)
FIRST_S = 1.0  # after which the first sample is taken, so that short runs have one, too


class Machine:
    """This machine, measured with psutil and, if it is installed, NVIDIA's NVML. The names of the measures are MLflow's.

    Args:
        gpus: number of GPUs of the run here: the first ones of those that CUDA shows to this process. In a machine with GPUs of
            several models, CUDA counts as NVML does only with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """

    def __init__(self, gpus: int) -> None:
        psutil.cpu_percent()  # the share of the time since the last call
        self.nvml: Any = None
        self.gpus: dict[int, Any] = {}
        if gpus:
            self._find(gpus)

    def _find(self, count: int) -> None:
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
        except Exception as error:  # ImportError, or any of NVML's: the driver may be missing or of another version
            log.info("the GPUs are not measured (%s)", error)
            return
        self.nvml = nvml
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        for name in ([*map(str, range(count))] if shown is None else shown.split(","))[:count]:
            with suppress(nvml.NVMLError):  # a name that NVML doesn't know
                by_number = name.strip().isdecimal()
                find = nvml.nvmlDeviceGetHandleByIndex if by_number else nvml.nvmlDeviceGetHandleByUUID
                handle = find(int(name) if by_number else name.strip())
                self.gpus[nvml.nvmlDeviceGetIndex(handle)] = handle

    def sample(self) -> dict[str, float]:
        """Measure now; a measure that a GPU does not have is left out."""
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
        }
        for number, handle in self.gpus.items():
            found |= {f"gpu_{number}_{name}": value for name, value in self._of_gpu(handle)}
        return {name: round(value, 1) for name, value in found.items()}

    def _of_gpu(self, handle: Any) -> Iterator[tuple[str, float]]:
        nvml = self.nvml
        with suppress(nvml.NVMLError):
            yield "utilization_percentage", float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            yield "memory_usage_megabytes", memory.used / 1e6
            yield "memory_usage_percentage", memory.used / memory.total * 100
        with suppress(nvml.NVMLError):
            yield "power_usage_watts", nvml.nvmlDeviceGetPowerUsage(handle) / 1000


@contextmanager
def sampled(
    config: ResolvedConfig,
    device: torch.device,
    tell: Callable[[Usage], None],
    processes: int = 1,
    node: int | None = None,
) -> Iterator[None]:
    """Sample this machine within the body, every ``tracking.system_seconds``; not at all without tracking.

    Args:
        config: of the run.
        device: that this process trains on.
        tell: called with each sample, in a thread of its own.
        processes: of the run on this machine.
        node: number of this machine; None if it is the only one.
    """
    every = 0.0 if config.tracking.uri == OFF else config.tracking.system_seconds
    if every == 0:
        yield
        return
    ended = threading.Event()
    prefix = Usage.PREFIX if node is None else f"{Usage.PREFIX}node_{node}/"

    def watch() -> None:
        try:
            machine = Machine(processes if device.type == "cuda" else 0)
            pause = min(FIRST_S, every)
            while not ended.wait(pause):
                tell(Usage({prefix + name: value for name, value in machine.sample().items()}))
                pause = every
        except Exception as error:  # of any kind, also of what sends them: the run does not depend on it
            log.warning("the use of this machine is not logged any more (%s)", error)

    # Nothing waits for its end: a driver that hangs must not hold up a run.
    threading.Thread(target=watch, name="usage", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
