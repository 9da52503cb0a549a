"""Normalisation: BatchNorm of several views in one batch, also over all workers, and the conversion to ``model.norm``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base import distributed
from rotssl.base.precision import full_precision

_views = 1


@contextmanager
def per_view_statistics(views: int) -> Iterator[None]:
    """Within the body, a batch is a sequence of ``views`` views of equal size, each normalised by its own statistics.

    Only for networks for which ``keeps_views_apart`` is true.
    """
    global _views
    before, _views = _views, views
    try:
        yield
    finally:
        _views = before


def keeps_views_apart(network: nn.Module) -> bool:
    """Whether views in one pass give the same output as in separate passes: all BatchNorm layers take statistics of each view."""
    return all(isinstance(m, _ViewsNorm) for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def exchanges(layer: nn.Module) -> int:
    """Exchanges of the forward pass under way, if several workers were to synchronise a BatchNorm layer.

    On GPUs torch's SyncBatchNorm would take the place of a ViewBatchNorm, with a pass for each view.
    """
    return _views if isinstance(layer, ViewBatchNorm) else 1


class _ViewsNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm that takes the statistics of each of several views in one batch.

    It counts no batches, which nothing reads and which would be one more kernel launch per layer: a momentum of None, for which
    torch takes the mean over all batches, means that running statistics stay as they are.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")


class _BatchNormOfViews(torch.autograd.Function):
    """torch's batch normalisation of V views of B samples each, by the statistics of each view, into one tensor.

    The running statistics are updated in place, view by view.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        epsilon: float,
        views: int,
    ) -> Tensor:
        out, found = torch.empty_like(x), running_mean.new_empty(2, views, len(running_mean))
        for view, written, mean_, inv_std in zip(x.chunk(views), out.chunk(views), *found, strict=True):
            torch.native_batch_norm(
                *(view, weight, bias, running_mean, running_var, True, momentum, epsilon), out=(written, mean_, inv_std)
            )
        ctx.save_for_backward(x, weight, found)
        ctx.epsilon = epsilon
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, found = ctx.saved_tensors
        wanted, views = ctx.needs_input_grad[:3], found.shape[1]
        to_x, sums = list[Tensor](), list[Tensor]()
        for grad, view, mean_, inv_std in zip(grads[0].chunk(views), x.chunk(views), *found, strict=True):
            own = torch.ops.aten.native_batch_norm_backward(
                grad, view, weight, None, None, mean_, inv_std, True, ctx.epsilon, wanted
            )
            to_x += own[:1]
            affine = [part for part, needed in zip(own[1:], wanted[1:], strict=True) if needed]
            sums = list(torch._foreach_add(sums, affine)) if sums else affine
        rest = iter(sums)
        to_affine = [next(rest) if needed else None for needed in wanted[1:]]
        return torch.cat(to_x) if wanted[0] else None, *to_affine, *[None] * 5


class ViewBatchNorm(_ViewsNorm):
    """BatchNorm over the batch of one worker, for several views in one batch (``per_view_statistics``); state as torch's.

    Accepts (B, C) and (B, C, H, W).

    Attributes:
        splits: parts of each view that have statistics of their own, as on so many GPUs; a view whose samples they do not divide
            evenly is one part.
    """

    splits: int = 1

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (B, C, ...) by the statistics of each view (training) or the running ones (evaluation).

        Raises:
            ValueError: a channel of a view has a single value, in training.
        """
        if not self.training:
            return super().forward(input)
        mean_, var = self.running_mean, self.running_var
        assert mean_ is not None and var is not None
        momentum = 0.0 if self.momentum is None else self.momentum
        parts = _views
        if self.splits > 1 and len(input) % (_views * self.splits) == 0 and len(input) >= 2 * _views * self.splits:
            parts *= self.splits
            # All parts together move the running statistics as one would.
            momentum = 1 - (1 - momentum) ** (1 / self.splits)
        if parts == 1:
            return F.batch_norm(input, mean_, var, self.weight, self.bias, True, momentum, self.eps)
        if input.numel() <= parts * input.shape[1]:
            raise ValueError(
                f"expected more than 1 value per channel in each of {parts} views, got {tuple(input.shape)}"
            )
        if torch.compiler.is_compiling():
            return self._fused(input, mean_, var, momentum, parts)
        how = momentum, self.eps, parts
        return _BatchNormOfViews.apply(input, self.weight, self.bias, mean_, var, *how)  # type: ignore[no-any-return]

    def _fused(self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, parts: int) -> Tensor:
        """The same in operations that torch.compile joins with what is around them."""
        apart = full_precision(x.unflatten(0, (parts, -1)))
        dims = [d for d in range(apart.dim()) if d not in (0, 2)]
        var, mean_ = torch.var_mean(apart, dims, correction=0, keepdim=True)
        out = (apart - mean_) * torch.rsqrt(var + self.eps)
        if self.weight is not None and self.bias is not None:
            shape = [-1] + [1] * (x.dim() - 2)
            out = out * self.weight.view(shape) + self.bias.view(shape)
        with torch.no_grad():
            count = x.numel() // (parts * x.shape[1])
            for mean_of_view, var_of_view in zip(mean_.flatten(1), var.flatten(1), strict=True):
                running_mean.lerp_(mean_of_view, momentum)
                running_var.lerp_(var_of_view * (count / (count - 1)), momentum)
        return out.flatten(0, 1).to(x.dtype)


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch normalisation by the statistics of all workers' samples, separately for V views of B samples each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, views: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        apart = x.unflatten(0, (views, -1))  # (V, B, C, ...)
        dims, shape = [d for d in range(apart.dim()) if d not in (0, 2)], [views, 1, -1] + [1] * (x.dim() - 2)
        # Two passes, because E[x^2] - E[x]^2 is lost in rounding if x is nearly constant over the batch (for example a
        # projector's input at the start); the workers' parts are then combined in double precision.
        wide = full_precision(apart)
        own_mean = wide.mean(dims)  # (V, C)
        own_square = (wide - own_mean.view(shape)).square_().sum(dims).double()
        count = own_square.new_full((1,), x.numel() // (views * x.shape[1]))
        own_mean = own_mean.double()
        parts = own_mean * count, own_square + own_mean.square() * count
        sums = distributed.all_reduce(torch.cat([*(part.flatten() for part in parts), count]))
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
        mean_grad, mean_grad_x = distributed.all_reduce(torch.stack([grad_bias, grad_weight])) / total.to(
            grad_bias.dtype
        )
        # dx = w/s (g - mean(g) - x_hat mean(g x_hat)), with x_hat = (x - m)/s, as a*g + b*(x - m) + c.
        scale = weight * inv_std
        slope, offset = -scale * inv_std * mean_grad_x, -scale * mean_grad
        grad_x = grad * scale.view(shape) + centred.mul_(slope.view(shape)).add_(offset.view(shape))
        return grad_x.flatten(0, 1).to(x.dtype), grad_weight.sum(0), grad_bias.sum(0), None, None


class GlobalBatchNorm(_ViewsNorm):
    """BatchNorm over the batch of all workers, on any device that can all-reduce; same state as torch's BatchNorm.

    torch's SyncBatchNorm does not support CPUs. This layer is also used in a single process, because torch's CPU kernel sums a
    channels_last batch naively, with a relative error of 1e-5 (torch 2.15), which would make one worker differ from two.
    Accepts (B, C) and (B, C, H, W), and several views in one batch (``per_view_statistics``), which need one exchange.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (B, C, ...) by the statistics over all workers (training) or the running ones (evaluation)."""
        if not self.training:
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            assert self.running_mean is not None
            weight, bias = torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean)
        out, mean_, var, total = _GlobalBatchNorm.apply(input, weight, bias, self.eps, _views)
        with torch.no_grad():
            momentum = 0.0 if self.momentum is None else self.momentum
            assert self.running_mean is not None and self.running_var is not None
            for mean_of_view, unbiased in zip(mean_, var * (total / (total - 1)).to(var.dtype), strict=True):
                self.running_mean.lerp_(mean_of_view, momentum)
                self.running_var.lerp_(unbiased, momentum)
        return out  # type: ignore[no-any-return]


# torch's picks out the workers that have images, for which the host waits at each call; GlobalBatchNorm never waits.
SYNC_ON_GPUS: type[nn.modules.batchnorm._BatchNorm] = nn.SyncBatchNorm


def replace_modules(root: nn.Module, swap: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace every submodule for which ``swap`` returns another one, in place; returns the (possibly new) root."""
    new = swap(root)
    if new is not None:
        return new
    for name, child in root.named_children():
        setattr(root, name, replace_modules(child, swap))
    return root


def convert_norm(model: nn.Module, norm: str, device: torch.device, splits: int = 1) -> nn.Module:
    """Convert the BatchNorm layers of a model to the kind set by ``model.norm``, keeping their affine weights.

    Args:
        model: any module; changed in place.
        norm: ``batch`` (per worker), ``sync`` (over all workers), ``group`` (GroupNorm: no batch statistics at all) or ``split``
            (over parts of the batch).
        device: where the model will run; torch's SyncBatchNorm works on GPUs only. One worker on a GPU needs no exchange.
        splits: number of the parts of all workers together, with ``split``.
    """
    alone = norm in ("batch", "split") or (device.type == "cuda" and distributed.world_size() == 1)

    def swap(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return None
        channels = module.num_features
        new: nn.Module
        if norm == "group":
            # 16 channels per group (as good as 32 groups, Wu and He 2018); one group if 16 does not divide the channels.
            new = nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels, affine=module.affine)
            if module.affine:
                new.load_state_dict({"weight": module.weight.data, "bias": module.bias.data})
        else:
            cls = ViewBatchNorm if alone else SYNC_ON_GPUS if device.type == "cuda" else GlobalBatchNorm
            new = cls(channels, module.eps, module.momentum, module.affine)
            new.load_state_dict(module.state_dict())
            if norm == "split" and isinstance(new, ViewBatchNorm):
                new.splits = splits // distributed.world_size()
        # timm's BatchNormAct2d contains its activation; the keys of the state do not change.
        for part in ("drop", "act"):
            if isinstance(after := getattr(module, part, None), nn.Module):
                new.add_module(part, after)
                new.register_forward_hook(_apply_submodule_after(part))
        return new

    return replace_modules(model, swap)


def _apply_submodule_after(part: str) -> Callable[[nn.Module, Any, Tensor], Any]:
    return lambda module, _, output: module.get_submodule(part)(output)
