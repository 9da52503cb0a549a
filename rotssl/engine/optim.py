"""Optimizers: parameter groups, and LARS."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rotssl.base.schedules import cosine, learning_rate
from rotssl.base.step import StepContext
from rotssl.config.resolved import ResolvedOptim


class LARS(torch.optim.Optimizer):
    """SGD with momentum, with the learning rate of each layer scaled by the ratio of the norms of weight and gradient.

    You, Gitman, Ginsburg 2017 (arXiv 1708.03888), algorithm 1, in the form used by SimCLR, BYOL and EffSSL: momentum is applied
    to the scaled gradient, and groups with ``adapt`` False (biases and norm layers) take plain SGD steps. As with
    torch's fused optimizers, a step changes nothing if the attribute ``found_inf``, a scalar on the device, is not 0.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: momentum of SGD.
        weight_decay: added to the gradient before the norms are computed.
        trust: trust coefficient eta.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; a closure is not supported."""
        assert closure is None
        skipped = None if self.found_inf is None else self.found_inf != 0
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [p.grad for p in params]
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            if group["adapt"]:
                w, g = (torch.stack(list(torch._foreach_norm(each))) for each in (params, grads))
                ratios = torch.where((w > 0) & (g > 0), group["trust"] * w / g, torch.ones_like(w))
                grads = list(torch._foreach_mul(grads, list(ratios.unbind())))
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            if skipped is None:
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, grads)
                torch._foreach_add_(params, buffers, alpha=-group["lr"])
                continue
            # Non-finite values times 0 are not 0, so replace such gradients before any product.
            grads = [grad.masked_fill(skipped, 0.0) for grad in grads]
            torch._foreach_mul_(buffers, torch.where(skipped, 1.0, group["momentum"]))
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, torch._foreach_mul(buffers, torch.where(skipped, 0.0, -group["lr"])))


def build_optimizer(
    model: nn.Module, config: ResolvedOptim, constant: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters; biases and norm layers get neither decay nor adaptation by default.

    Args:
        model: model whose parameters with ``requires_grad`` are trained.
        config: the resolved section; the engine sets rates and decay at every step.
        constant: parameters whose learning rate does not decay; their groups have ``constant_lr`` set.
    """
    kept = {id(p) for p in constant}
    groups: list[dict[str, Any]] = []
    for fixed in (False, True):
        params = [p for p in model.parameters() if p.requires_grad and (id(p) in kept) == fixed]
        for matrix in (True, False):
            chosen = [p for p in params if (p.ndim > 1) == matrix]
            decays = matrix or config.decay_norms
            decay = config.weight_decay if decays else 0.0
            groups.append({"params": chosen, "weight_decay": decay, "decays": decays, "constant_lr": fixed})
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
    if config.name == "lars":
        for group in groups:
            group["adapt"] = group["decays"]
        return LARS(groups, lr=config.lr, momentum=config.momentum, trust=config.trust)
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.momentum:
        # The fused kernel would create the buffers at the first step, but it fails for a parameter that gets its first gradient
        # later, and uses uninitialised buffers if the fp16 scaler skips that step (torch 2.15).
        sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for group in groups for p in group["params"]})
    return sgd


def schedule_rates(
    optimizer: torch.optim.Optimizer, config: ResolvedOptim, ctx: StepContext, total_steps: int, warmup: int
) -> None:
    """Set the learning rate and the weight decay of a step.

    Args:
        optimizer: from ``build_optimizer``.
        config: the resolved section.
        ctx: context of the step.
        total_steps: number of steps of the run.
        warmup: number of warm-up steps.
    """
    for group in optimizer.param_groups:
        shape = "constant" if group["constant_lr"] else config.schedule
        ends = config.warmup_lr, config.final_lr
        group["lr"] = learning_rate(config.lr, ctx.step, total_steps, warmup, shape, *ends)
        if group["decays"] and config.weight_decay_end is not None:
            group["weight_decay"] = cosine(config.weight_decay, config.weight_decay_end, ctx.progress)
