"""The gradients of the parts of a loss at the encoder's weights, and how those of a task and of the method compare."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base import distributed


def encoder_gradients(parts: dict[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """The flat gradient of each part of the loss at the encoder's weights, on this worker; the parts' graph is kept.

    Args:
        parts: losses with gradient, as ``Output.parts``; of a task that is gated (see Balance), what its gate lets through.
        encoder: encoder; of a part that does not reach it, the gradient is 0.
    """
    weights = [p for p in encoder.parameters() if p.requires_grad]

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in found])

    return {name: gradient(loss) for name, loss in parts.items()}


def compare_gradients(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norm ratio and cosine of each task's gradient and the method's, both averaged over all workers.

    Args:
        gradients: flat gradients on this worker of each task's weighted loss, and of the method's loss as ``ssl``.

    Returns:
        For each task ``<task>/grad_ratio``, the norm of its gradient over that of the method's, and ``<task>/grad_cosine``, the
        cosine of the angle between the two; empty if a value is not finite (for example after an overflow in half precision).
    """
    whole = {name: distributed.mean(gradient) for name, gradient in gradients.items()}
    method, logs = whole.pop("ssl"), dict[str, Tensor]()
    for name, task in whole.items():
        logs[f"{name}/grad_ratio"] = task.norm() / method.norm()
        logs[f"{name}/grad_cosine"] = F.cosine_similarity(task, method, dim=0)
    return logs if all(bool(torch.isfinite(value)) for value in logs.values()) else {}
