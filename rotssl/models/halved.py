"""Weights of frozen networks in half precision, cast once for all layers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

CAST = (nn.Linear, nn.modules.conv._ConvNd)  # layers whose weights autocast casts


class Halved:
    """Casts a frozen network's weights for autocast in one operation a step.

    autocast keeps its casts of trained weights for the length of a step, and casts those of a frozen network at each call of each
    layer. The results are the same to the bit. The first pass is as before and shows which layers are called: a layer whose
    weights are used otherwise keeps them.

    Args:
        network: that is not trained by gradients.
        kind: of half precision that the run trains in.
    """

    def __init__(self, network: nn.Module, kind: torch.dtype) -> None:
        self.network, self.kind = network, kind
        self._slots: list[tuple[nn.Module, str]] | None = None
        self._halves: list[Tensor] = []

    @contextmanager
    def cast(self) -> Iterator[None]:
        """Within the body, which passes data through the network, the layers have half weights of the present values."""
        if self._slots is None:
            with self._watched():
                yield
            return
        whole = [module._parameters[name] for module, name in self._slots]
        torch._foreach_copy_(self._halves, [each.detach() for each in whole if each is not None])
        try:
            for (module, name), half in zip(self._slots, self._halves, strict=True):
                module._parameters[name] = nn.Parameter(half, requires_grad=False)
            yield
        finally:
            for (module, name), value in zip(self._slots, whole, strict=True):
                module._parameters[name] = value

    @contextmanager
    def _watched(self) -> Iterator[None]:
        called: dict[nn.Module, None] = {}
        layers = [module for module in self.network.modules() if isinstance(module, CAST)]
        handles = [layer.register_forward_pre_hook(lambda module, _: called.setdefault(module)) for layer in layers]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code would not call the hooks
                yield
        finally:
            for handle in handles:
                handle.remove()
        names = ("weight", "bias")
        found = [(module, name, module._parameters[name]) for module in called for name in names]
        self._slots = [(module, name) for module, name, value in found if value is not None]
        self._halves = [torch.empty_like(value, dtype=self.kind) for _, _, value in found if value is not None]
