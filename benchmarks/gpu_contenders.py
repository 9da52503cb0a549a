"""What is timed on a device: the least that a step of BYOL needs, and rotssl's engine."""

import copy
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import contenders
import torch
from gpu_cell import Cell
from torch import nn
from torch.nn import functional as F

Run = Callable[[int], None]  # does so many steps, and does not wait for them


class Bare:
    """The least that a step of BYOL needs, on views that lie ready in memory.

    Args:
        cell: for the device.
        encoder: name of the network.
        batch: images a step.
        captured: whether the networks are compiled, and on a GPU the whole step is one CUDA graph.
    """

    def __init__(self, cell: Cell, encoder: str, batch: int, captured: bool) -> None:
        from rotssl.models.encoders import build_encoder
        from rotssl.models.heads import mlp

        device, layout = cell.device, torch.channels_last
        net, dim = build_encoder(encoder, "cifar" if encoder.startswith("resnet") else "imagenet", 32)
        hidden, out = contenders.HEADS
        self.student = nn.Sequential(net, mlp([dim, hidden, out])).to(device, memory_format=layout)
        self.predictor = mlp([out, hidden, out]).to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        weights = [*self.student.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.SGD(weights, lr=contenders.RATE, momentum=0.9, weight_decay=1e-4, fused=True)
        self.views = [torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=layout) for _ in range(2)]
        self.kind, self.half = device.type, cell.cuda
        self.ours: list[torch.Tensor] = [*self.student.parameters()]
        self.theirs: list[torch.Tensor] = [*self.teacher.parameters()]
        self.loss = torch.compile(self._loss) if captured else self._loss
        self.step: Callable[[], None] = self._step
        if captured and cell.cuda:
            self.step = self._capture()

    def _loss(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        # The cache of casts would be made inside of one graph and read outside of it.
        with torch.autocast(self.kind, torch.bfloat16, enabled=self.half, cache_enabled=False):
            predictions = [self.predictor(self.student(view)) for view in (first, second)]
            with torch.no_grad():
                targets = [self.teacher(view) for view in (first, second)]
        terms = [-F.cosine_similarity(predictions[i].float(), targets[1 - i].float()).mean() for i in (0, 1)]
        return (terms[0] + terms[1]) / 2

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(*self.views).backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.theirs, self.ours, contenders.EMA)

    def _capture(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(5):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        # Others' threads, which load batches, may use the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph.replay

    def run(self, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            self.step()


# What differs from plain BYOL, by contender.
FORMS: dict[str, dict[str, Any]] = {
    "rotssl": {},
    "rotssl, a pass for each view": {},
    "rotssl, compiled": {"train.compile": True},
    "rotssl, compiled but for views": {"train.compile": True},
    "rotssl, rotation in place": {"rotation.weight": 1.0},
    "rotssl, paper's recipe": {"rotation.weight": 1.0, "rotation.mode": "extra", "rotation.head_on": "projector"},
}


class Rotssl:
    """rotssl's engine from images in memory to updated weights, batch after batch."""

    def __init__(
        self, cell: Cell, encoder: str, batch: int, form: dict[str, Any], splits: Any, name: str = "rotssl"
    ) -> None:
        hidden, out = contenders.HEADS
        fields = {
            "encoder.name": encoder,
            "method.hidden_dim": hidden,
            "method.out_dim": out,
            "model.norm": "batch",
            "rotation.weight": 0.0,
            "optim.name": "sgd",
            "optim.lr": contenders.RATE,
            "optim.warmup_epochs": 0,
            "train.batch_size": batch,
            "train.epochs": 1000,
            "storage.path": str(cell.scratch / "speed"),
            "tracking.run_name": uuid.uuid4().hex,
            **form,
        }
        self.config = cell.config(len(splits.train), fields)
        self.trainer = cell.trainer(self.config, splits)
        self.split = name.endswith("a pass for each view")
        if name.endswith("but for views"):  # they are made as without compilation
            self.trainer.augment.masked = None
        self.trainer.parallel.train()
        self.batches = (batch for epoch in range(1000) for batch in self.trainer.batches(epoch))

    def run(self, steps: int) -> None:
        """Take so many steps; what they log is added up, as in an epoch."""
        from rotssl.engine.averages import Averages
        from rotssl.models import norm

        averages = Averages(lambda name: False)
        with mock.patch.object(norm, "keeps_views_apart", lambda _: False) if self.split else nullcontext():
            for _ in range(steps):
                averages.add(self.trainer.step(*next(self.batches)))

    def augment(self, steps: int) -> None:
        """Make the views of so many batches, which are on the device already."""
        images, ctx = self.images
        for _ in range(steps):
            self.trainer.augment(images, ctx)

    def flops(self) -> float:
        """Of a step, for each image."""
        from rotssl.engine.flops import count_step

        return count_step(self.config) / self.config.train.batch_size

    def ready(self) -> "Rotssl":
        """Keep a batch for ``augment``."""
        self.images = next(self.batches)
        return self
