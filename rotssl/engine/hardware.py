"""What the hardware asks for: precision, the layout of weights, and what torch can't do on it."""

import os
import shutil
import sys

import torch
from torch import Tensor, nn

from rotssl.base import distributed, memory
from rotssl.config import ResolvedConfig
from rotssl.engine.runtime import RunFailed


def precision(config: ResolvedConfig, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``: as configured, or bf16 on GPUs that have it."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def weight_layout(device: torch.device, images: torch.memory_format) -> torch.memory_format:
    """How weights lie in memory: as the images do on GPUs, and on CPUs where that pays.

    oneDNN gives a CPU's weight gradients in the default format, and copies them at each step into that of other weights. With
    AVX2 its convolutions gain more than that by weights that lie as the images do. All workers have one layout, which DDP
    insists on: where their processors differ, the default one.
    """
    if device.type != "cpu":
        return images
    pays = torch.tensor(float(torch.backends.cpu.get_cpu_capability() == "AVX2"))
    return images if bool(distributed.mean(pays) == 1) else torch.contiguous_format


def emulates_bf16() -> bool:
    """Whether this processor has no instructions for bf16, so that steps in it take many times as long as in fp32."""
    # torch 2.11 may not tell what it found; then nothing is said.
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    known = "avx512_bf16", "amx_bf16", "avx_ne_convert"
    return has.get("architecture") == "x86_64" and not any(has.get(name) for name in known)


def refuse_one_pixel(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A forward hook for convolutions in bf16 on CPUs.

    Raises:
        RunFailed: a map of one pixel comes in.
    """
    if inputs[0].shape[-2:] == (1, 1):
        raise RunFailed(
            "train.precision: got bf16, expected fp32: on CPUs torch computes garbage for convolutions with a stride on maps "
            "of one pixel, to which these views shrink; or take larger views"
        )


def require_compiler(device: torch.device) -> None:
    """See that torch.compile finds what it needs: a C++ compiler on a CPU, on a GPU one of C for what launches its kernels.

    Raises:
        RunFailed: there is none.
    """
    if device.type == "cpu":
        variable, kind, names = "CXX", "C++", ["clang++" if sys.platform == "darwin" else "g++"]
    else:
        variable, kind, names = "CC", "C", ["gcc", "clang"]
    asked = [os.environ[variable]] if variable in os.environ else names
    if not any(shutil.which(name) for name in asked):
        known = " or ".join(asked)
        raise RunFailed(
            f"train.compile: got true, but there is no {kind} compiler here ({known}; ${variable} names another)"
        )


def be_deterministic(asked: bool) -> None:
    """Have torch refuse what has no deterministic form, or not; on GPUs before the first matrix product.

    cuBLAS reads the size of its workspace from the environment, and torch refuses its products where it is not one of those that
    make them deterministic.
    """
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False  # which would choose other kernels from run to run
    torch.use_deterministic_algorithms(asked)


def memory_held(device: torch.device) -> dict[str, float]:
    """What this process holds of its node's memory and, since the last call, held at most of its GPU's, in bytes; for the log."""
    found = {"memory/host_bytes": float(memory.host_bytes())}
    if device.type == "cuda":
        found["memory/device_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
    return found
