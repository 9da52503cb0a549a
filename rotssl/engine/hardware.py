"""Hardware-specific choices: precision, weight layout, and limits of torch."""

import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rotssl.base import distributed, memory
from rotssl.config import ResolvedConfig
from rotssl.engine.runtime import RunFailed


def uses_gpu(config: ResolvedConfig) -> bool:
    """Whether a run in this process uses a GPU: as configured; auto: if torch finds one."""
    wanted = config.scaling.use_gpu
    return torch.cuda.is_available() if wanted == "auto" else wanted


def precision(config: ResolvedConfig, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``: as configured; auto: bf16 on GPUs that support it, else fp32."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def weight_layout(device: torch.device, images: torch.memory_format) -> torch.memory_format:
    """The memory format of weights: that of the images on GPUs, and on CPUs where it is faster.

    On CPUs, oneDNN computes weight gradients in the default format and copies them at each step if the weights have another.
    With AVX2, its convolutions gain more from weights in the format of the images than the copies cost. DDP requires the same
    format on all workers; if their processors differ, it is the default one.
    """
    if device.type != "cpu":
        return images
    pays = torch.tensor(float(torch.backends.cpu.get_cpu_capability() == "AVX2"))
    return images if bool(distributed.mean(pays) == 1) else torch.contiguous_format


def emulates_bf16() -> bool:
    """Whether this processor lacks bf16 instructions, so that bf16 steps take many times as long as fp32 steps."""
    # torch 2.11 may not report its capabilities; then this is False.
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    known = "avx512_bf16", "amx_bf16", "avx_ne_convert"
    return has.get("architecture") == "x86_64" and not any(has.get(name) for name in known)


def refuse_one_pixel(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Reject inputs of one pixel; a forward hook for bf16 convolutions on CPUs.

    Raises:
        RunFailed: the input is a map of one pixel.
    """
    if inputs[0].shape[-2:] == (1, 1):
        raise RunFailed(
            "train.precision: got bf16, expected fp32: these views shrink to maps of one pixel, for which torch's strided "
            "convolutions compute garbage on CPUs; or use larger views"
        )


@contextmanager
def enough_memory(batch_size: int, splits: bool, attempt: Callable[[int], None]) -> Iterator[None]:
    """Report in one line that a step in the body does not fit into memory, and what would fit.

    Args:
        batch_size: images of a step.
        splits: whether ``train.accumulate`` may split it.
        attempt: computes a step of so many images, without changing weights.

    Raises:
        RunFailed: it does not fit.
        RuntimeError: the same with several workers. The others wait for this one, so all of them have to end and start again;
            memory that somebody else held may be free then. What would fit cannot be tried.
    """
    reason, lacking = None, f"train.batch_size: got {batch_size}, for which there is not enough memory"
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        reason = str(error).splitlines()[0][:160]
        if distributed.world_size() > 1:
            ways = "a smaller batch, encoder or image, train.accumulate, or more workers"
            raise RuntimeError(f"{lacking}; use {ways} ({reason})") from error
        traceback.clear_frames(error.__traceback__)  # which hold the step's tensors
    if reason is None:
        return
    parts = [k for k in range(2, batch_size // 2 + 1) if batch_size % k == 0] if splits else []
    sizes = [batch_size // k for k in parts] or [batch_size >> k for k in range(1, batch_size.bit_length() - 1)]
    fits = _largest(sizes, attempt)
    if fits is None:
        advice = "use a smaller batch, encoder or image, or more workers"
    elif fits == 0:
        advice = f"use a smaller encoder or smaller images: not even a step of {sizes[-1]} images fits"
    elif parts:
        advice = f"steps of {fits} images fit: use train.accumulate {batch_size // fits}, or more workers"
    else:
        advice = f"use train.batch_size {fits}, which fits, or more workers"
    raise RunFailed(f"{lacking}; {advice} ({reason})")


def _largest(sizes: Sequence[int], attempt: Callable[[int], None]) -> int | None:
    """The first size, of falling ones, for which an attempt does not run out of memory; 0: none; None: it cannot be said."""
    last: int | None = None
    for size in sizes:
        if last is not None and 2 * size > last:
            continue  # close to one that does not fit
        last = size
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            attempt(size)
            return size
        except (RuntimeError, MemoryError, ValueError, IndexError) as error:
            if not memory.is_exhausted(error):
                return None  # a task or a method may not take so few images
            traceback.clear_frames(error.__traceback__)
    return 0 if sizes else None


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile finds its compiler: C++ on CPUs, C on GPUs (for the code that launches kernels).

    Raises:
        RunFailed: there is no compiler.
    """
    if device.type == "cpu":
        variable, kind, names = "CXX", "C++", ["clang++" if sys.platform == "darwin" else "g++"]
    else:
        variable, kind, names = "CC", "C", ["gcc", "clang"]
    asked = [os.environ[variable]] if variable in os.environ else names
    if not any(shutil.which(name) for name in asked):
        known = " or ".join(asked)
        raise RunFailed(
            f"train.compile: got true, but no {kind} compiler was found ({known}; set ${variable} to use another)"
        )


def be_deterministic(asked: bool) -> None:
    """Set whether torch raises an error for operations without a deterministic form; on GPUs call it before any matrix product.

    cuBLAS reads its workspace size from the environment, and torch rejects its products unless that size makes them
    deterministic.
    """
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False  # it would choose different kernels from run to run
    torch.use_deterministic_algorithms(asked)


class MemoryHeld:
    """Bytes of host memory that this process holds, and its peak GPU memory since the last call; for the log.

    The kernel looks at every page of the process to tell. So it is asked as seldom as takes half a percent of the time, and what
    it told last counts in between.

    Args:
        device: that the process trains on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._host, self._next = device, 0.0, 0.0

    def __call__(self) -> dict[str, float]:
        """The metrics ``memory/...``."""
        now = time.monotonic()
        if now >= self._next:
            self._host = float(memory.host_bytes())
            ended = time.monotonic()
            self._next = ended + 200 * (ended - now)
        found = {"memory/host_bytes": self._host}
        if self.device.type == "cuda":
            found["memory/device_peak_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        return found
