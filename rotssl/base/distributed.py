"""The process group as seen by the rest of the library: no-ops in a single process, gradients right across several.

Everything collective goes through this file, so that methods and tasks never ask how many workers there are.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from rotssl.methods.losses import full_precision

# All gradients in one exchange: on CPUs the backward pass has all cores, so that an exchange beside it only takes them away.
CPU_BUCKET_MB = 10_000
_alone = False
_views = 1


def world_size() -> int:
    """Number of workers, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Index of this worker, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Within the body this process acts as a group of one (to count the FLOPs of a step on one rank, say)."""
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

    The gradient that reaches the local rows is the sum over the ranks' losses; averaged over ranks by DDP it is the gradient
    of the mean of those losses. Every rank must hold the same number of rows.
    """
    return x if world_size() == 1 else _AllGather.apply(x)


def room_for_all(x: Tensor) -> Tensor | None:
    """Where ``gather_to_first`` puts all workers' rows, (world x B, ...): on rank 0 of several, elsewhere None."""
    return x.new_empty(world_size() * len(x), *x.shape[1:]) if world_size() > 1 and rank() == 0 else None


def gather_to_first(x: Tensor, room: Tensor | None) -> Tensor:
    """All workers' rows in the order of their ranks, on rank 0 and without gradient; the own ones elsewhere.

    Args:
        x: (B, ...), of as many rows on each rank.
        room: of ``room_for_all``; made before, as a rank that has no memory for it must not leave the others waiting here.
    """
    if world_size() > 1:
        dist.gather(x.contiguous(), None if room is None else list(room.split(len(x))), dst=0)
    return x if room is None else room


def first_text(text: str, device: torch.device) -> str:
    """The first text, by rank, that is not empty, cut to 1000 bytes; the same on all workers, empty if all are."""
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
    """The sum over all workers, with gradient: like gather(), of the sum over the workers' losses."""
    return x if world_size() == 1 else _Total.apply(x)


def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over the workers, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP, or itself where there is one worker. Every parameter takes part in every step.

    Buffers are left alone in training, which does not read them: queues and synchronised statistics are equal anyway, and
    per-worker BatchNorm's running ones follow rank 0's at the end of an epoch (``follow_first``).
    """
    if world_size() == 1:
        return model
    options: dict[str, Any] = {"device_ids": [device]} if device.type == "cuda" else {"bucket_cap_mb": CPU_BUCKET_MB}
    with warnings.catch_warnings():
        # torch 2.15 has a new name for broadcast_buffers, which 2.11 does not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False, **options)
    # Of a 1x1 convolution on a channels_last batch: the same numbers in the same order, under another name.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return parallel


def follow_first(model: nn.Module) -> None:
    """Give all workers rank 0's running statistics: a checkpoint, which is rank 0's, then holds what all of them go on with."""
    if world_size() == 1:
        return
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]  # the others are equal
    found = [x for layer in layers for x in (layer.running_mean, layer.running_var) if x is not None]
    if found:
        flat = torch.cat(found)
        dist.broadcast(flat, 0)
        for own, first in zip(found, flat.split([len(x) for x in found]), strict=True):
            own.copy_(first)


def _all_reduce(sums: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums


@contextmanager
def statistics_apart(views: int) -> Iterator[None]:
    """Within the body, a batch is so many views of equal size, one after the other, each to be normalised by its own statistics.

    Only for networks that ``can_tell_views_apart``.
    """
    global _views
    before, _views = _views, views
    try:
        yield
    finally:
        _views = before


def can_tell_views_apart(network: nn.Module) -> bool:
    """Whether views in one pass come out as in a pass each: by GlobalBatchNorm, or as there are no statistics of a batch."""
    return all(
        isinstance(m, GlobalBatchNorm) for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    )


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch normalisation by the statistics of all workers' samples, of V views of B samples each apart."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, views: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        apart = x.unflatten(0, (views, -1))  # (V, B, C, ...)
        dims, shape = [d for d in range(apart.dim()) if d not in (0, 2)], [views, 1, -1] + [1] * (x.dim() - 2)
        # Two passes, as x nearly constant over the batch (a projector's input at the start, say) has E[x^2] - E[x]^2 drown in
        # rounding; the workers' parts are then put together in double precision.
        wide = full_precision(apart)
        own_mean = wide.mean(dims)  # (V, C)
        own_square = (wide - own_mean.view(shape)).square_().sum(dims).double()
        count = own_square.new_full((1,), x.numel() // (views * x.shape[1]))
        own_mean = own_mean.double()
        parts = own_mean * count, own_square + own_mean.square() * count
        sums = _all_reduce(torch.cat([*(part.flatten() for part in parts), count]))
        total = sums[-1]
        mean_, square = (sums[:-1] / total).view(2, views, -1)
        var = (square - mean_.square()).clamp_(min=0)
        mean_, var = mean_.to(weight.dtype), var.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean_, torch.rsqrt(var + epsilon), total)
        ctx.dims, ctx.shape, ctx.views = dims, shape, views
        each = zip(apart, mean_, var, strict=True)
        out = torch.cat([F.batch_norm(view, m, v, weight, bias, False, 0.0, epsilon) for view, m, v in each])
        ctx.mark_non_differentiable(mean_, var, total)
        return out, mean_, var, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean_, inv_std, total = ctx.saved_tensors
        grad, shape = full_precision(grads[0].unflatten(0, (ctx.views, -1))), ctx.shape
        centred = full_precision(x.unflatten(0, (ctx.views, -1))) - mean_.view(shape)
        grad_bias = grad.sum(ctx.dims)  # (V, C), as the next one
        grad_weight = (grad * centred).sum(ctx.dims) * inv_std
        mean_grad, mean_grad_x = _all_reduce(torch.stack([grad_bias, grad_weight])) / total.to(grad_bias.dtype)
        # dx = w/s (g - mean(g) - x_hat mean(g x_hat)), with x_hat = (x - m)/s, as a*g + b*(x - m) + c.
        scale = weight * inv_std
        slope, offset = -scale * inv_std * mean_grad_x, -scale * mean_grad
        grad_x = grad * scale.view(shape) + centred.mul_(slope.view(shape)).add_(offset.view(shape))
        return grad_x.flatten(0, 1).to(x.dtype), grad_weight.sum(0), grad_bias.sum(0), None, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batch of all workers, on any device that can all-reduce; same state as torch's BatchNorm.

    torch's SyncBatchNorm refuses CPUs. In a single process it is used as well: torch's own kernel for CPUs adds up a
    channels_last batch naively, with a relative error of 1e-5 (torch 2.15), which would make one worker differ from two.
    Accepts (B, C) and (B, C, H, W), and several views in one batch (``statistics_apart``), which take one exchange.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (B, C, ...) by the statistics over all workers (training) or by the running ones."""
        if not self.training:
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            assert self.running_mean is not None
            weight, bias = torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean)
        out, mean_, var, total = _GlobalBatchNorm.apply(input, weight, bias, self.eps, _views)
        with torch.no_grad():
            momentum = 0.0 if self.momentum is None else self.momentum
            assert (
                self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
            )
            self.num_batches_tracked.add_(len(mean_))
            for mean_of_view, unbiased in zip(mean_, var * (total / (total - 1)).to(var.dtype), strict=True):
                self.running_mean.lerp_(mean_of_view, momentum)
                self.running_var.lerp_(unbiased, momentum)
        return out  # type: ignore[no-any-return]


def replace_modules(root: nn.Module, swap: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace every submodule for which ``swap`` returns another one, in place; returns the (possibly new) root."""
    new = swap(root)
    if new is not None:
        return new
    for name, child in root.named_children():
        setattr(root, name, replace_modules(child, swap))
    return root


def convert_norm(model: nn.Module, norm: str, device: torch.device) -> nn.Module:
    """Turn the BatchNorm layers of a model into what ``model.norm`` asks for, keeping their affine weights.

    Args:
        model: any module; changed in place.
        norm: ``batch`` (per worker), ``sync`` (over all workers) or ``group`` (GroupNorm: no batch statistics at all).
        device: where the model will run; torch's SyncBatchNorm works on GPUs only.
    """
    if norm == "batch" or (norm == "sync" and device.type == "cuda" and world_size() == 1):
        return model

    def swap(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return None
        channels = module.num_features
        new: nn.Module
        if norm == "group":
            # 16 channels a group (Wu and He 2018 found that width as good as 32 groups); one group where it does not divide.
            new = nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels, affine=module.affine)
            if module.affine:
                new.load_state_dict({"weight": module.weight.data, "bias": module.bias.data})
        else:
            cls = nn.SyncBatchNorm if device.type == "cuda" else GlobalBatchNorm
            new = cls(channels, module.eps, module.momentum, module.affine)
            new.load_state_dict(module.state_dict())
        for part in (
            "drop",
            "act",
        ):  # timm's BatchNormAct2d brings its activation along; the keys of the state stay as they are
            if isinstance(after := getattr(module, part, None), nn.Module):
                new.add_module(part, after)
                new.register_forward_hook(_then(part))
        return new

    return replace_modules(model, swap)


def _then(part: str) -> Callable[[nn.Module, Any, Tensor], Any]:
    return lambda module, _, output: module.get_submodule(part)(output)
