"""Collectives for the rest of the library: no-ops in a single process, with correct gradients across several.

All collectives go through this file, so that methods and tasks do not depend on the number of workers.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# All gradients in one exchange: on CPUs the backward pass uses all cores, so a concurrent exchange would only slow it down.
CPU_BUCKET_MB = 10_000
_alone = False


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Index of this worker; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Within the body, this process acts as a group of one (for example to count the FLOPs of a step on one rank)."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.size = x.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each rank's loss depends on every rank's rows: the gradients of a row are summed over the ranks.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.narrow(0, dist.get_rank() * ctx.size, ctx.size)


def gather(x: Tensor) -> Tensor:
    """All workers' rows in the order of their ranks, (B, ...) -> (world x B, ...), with gradient.

    The gradient of the local rows is the sum over the losses of all ranks; once DDP has averaged it, it is the gradient
    of the mean of these losses. Every rank must have the same number of rows.
    """
    return x if world_size() == 1 else _AllGather.apply(x)


def gather_to(x: Tensor, target: int) -> Tensor:
    """All workers' rows in the order of their ranks, (world x B, ...), without gradient, on one rank; others keep their own.

    Every rank must have the same number of rows.
    """
    if world_size() == 1:
        return x
    room = x.new_empty(world_size() * len(x), *x.shape[1:]) if rank() == target else None
    dist.gather(x.contiguous(), None if room is None else list(room.split(len(x))), dst=target)
    return x if room is None else room


def from_rank(x: Tensor, source: int) -> Tensor:
    """One worker's tensor, on all of them and without gradient; others give one of the same shape, which stays as it is."""
    if world_size() == 1:
        return x
    found = x.contiguous() if rank() == source else torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.broadcast(found, source)
    return found


def largest(x: Tensor) -> Tensor:
    """The largest value over all workers, element by element and without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def first_nonempty(text: str, device: torch.device) -> str:
    """The first non-empty text by rank, cut to 1000 bytes; the same on all workers, empty if all texts are empty."""
    own = torch.tensor(list(text.encode()[:1000].ljust(1000)), dtype=torch.uint8, device=device)
    texts = [bytes(row).decode(errors="ignore").rstrip() for row in gather(own[None]).cpu().numpy()]
    return next(filter(None, texts), "")


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def total(x: Tensor) -> Tensor:
    """The sum over all workers, with the gradient of the sum over the workers' losses, as for gather()."""
    return x if world_size() == 1 else _Total.apply(x)


def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over the workers, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP, or the model itself if there is one worker. Every parameter must be used in every step.

    DDP does not synchronise buffers, which training does not read: queues and synchronised statistics are equal anyway, and the
    running statistics of per-worker BatchNorm are set to rank 0's at the end of an epoch (``broadcast_running_stats``).
    """
    if world_size() == 1:
        return model
    options: dict[str, Any] = {"device_ids": [device]} if device.type == "cuda" else {"bucket_cap_mb": CPU_BUCKET_MB}
    with warnings.catch_warnings():
        # torch 2.15 renames broadcast_buffers; 2.11 does not know the new name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False, **options)
    # Raised for a 1x1 convolution on a channels_last batch, whose strides differ in name only.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return parallel


def broadcast_running_stats(model: nn.Module) -> None:
    """Set the running statistics of all workers to rank 0's, so that rank 0's checkpoint is valid for all of them."""
    if world_size() == 1:
        return
    # Those of synchronised layers are equal already.
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    found = [x for layer in layers for x in (layer.running_mean, layer.running_var) if x is not None]
    if found:
        flat = torch.cat(found)
        dist.broadcast(flat, 0)
        for own, first in zip(found, flat.split([len(x) for x in found]), strict=True):
            own.copy_(first)


def all_reduce(sums: Tensor) -> Tensor:
    """The sum over all workers, in place and without gradient."""
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums
