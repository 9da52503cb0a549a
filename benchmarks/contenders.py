"""BYOL with a ResNet-18, as others and as rotssl train it: the contenders of end_to_end.py and equal_minutes.py."""

import argparse
import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Work(NamedTuple):
    """A contender.

    Attributes:
        run: does so many steps.
        facts: to be told.
        encoder: the network that it trains.
        optimizer: by which it does.
        waited: seconds in which it had no batch so far.
    """

    run: Callable[[int], None]
    facts: dict[str, Any]
    encoder: Any
    optimizer: Any
    waited: Callable[[], float]


ABOUT = {
    "lightly": "lightly's BYOL example: its data set, transforms, heads, loss and EMA; fp32, contiguous",
    "solo": "solo-learn's CIFAR pipeline, rebuilt: bicubic crops, per-sample transforms of torchvision on PIL images, online "
    "classifier, EMA parameter by parameter; SGD for its LARS, which spares it time; fp32, contiguous",
    "bare-fp32": "bare torch loop on views that lie ready in memory: nothing to load, nothing to augment; the allocator keeps "
    "what is freed, as rotssl's does; fp32, channels_last",
    "bare-bf16": "bare-fp32 with bf16 autocast",
    "rotssl-fp32": "rotssl's Trainer, lightly's parameters of the views, norm batch, one view a pass; fp32, channels_last",
    "rotssl-bf16": "rotssl-fp32 with bf16 autocast",
    "rotssl-rotation": "rotssl-{fast} with rotation in place by a shared angle, at first of all images, in the end of 1 in 8",
    "rotssl-joint": "rotssl-{fast} with all views in one pass (other BatchNorm statistics)",
}
PEERS_OWN = ("lightly", "solo")  # what runs in the peers' environment
SCALE, JITTER, HEADS, RATE = (0.08, 1.0), (0.4, 0.4, 0.2, 0.1), (1024, 256), 0.06
DECAY, EMA = 5e-4, 0.004


def fast(device: str) -> str:
    """bf16, unless this is about a processor that only emulates it."""
    from rotssl.engine.hardware import emulates_bf16

    return "fp32" if device == "cpu" and emulates_bf16() else "bf16"


def suited(names: Sequence[str], device: str) -> list[str]:
    """Those of these that make sense here: a processor that emulates bf16 has nothing to show in it."""
    return [name for name in names if not name.endswith("bf16") or fast(device) == "bf16"]


def precision_of(name: str, device: str) -> str:
    """What a contender computes in."""
    if name in PEERS_OWN:
        return "fp32"
    form = name.partition("-")[2]
    return form if form in ("fp32", "bf16") else fast(device)


def finish(device: str) -> None:
    """Wait for the device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def backbone(stem: str) -> Any:
    """ResNet-18 of torchvision without its last layer; ``cifar``: 3x3 convolution of stride 1 and no pooling in front."""
    import torchvision
    from torch import nn

    net = torchvision.models.resnet18()
    if stem == "cifar":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return nn.Sequential(*list(net.children())[:-1], nn.Flatten())


class Waiting:
    """An iterator over another one's batches that adds up the seconds in which it had none."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __next__(self) -> Any:
        started = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - started
        return batch


def endless(dataset: Any, args: argparse.Namespace) -> Waiting:
    """Batches of a loader that never comes to the end of an epoch, so that none of its starts is timed."""
    import torch

    sampler = torch.utils.data.RandomSampler(dataset, num_samples=10**9)
    return Waiting(
        iter(
            torch.utils.data.DataLoader(
                dataset,
                args.batch,
                sampler=sampler,
                num_workers=args.workers,
                drop_last=True,
                pin_memory=args.device == "cuda",
            )
        )
    )


def lightly(args: argparse.Namespace) -> Work:
    """As lightly's documentation puts its parts together."""
    import torch
    from lightly.data import LightlyDataset
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    views = BYOLTransform(
        view_1_transform=BYOLView1Transform(input_size=32, gaussian_blur=0.0),
        view_2_transform=BYOLView2Transform(input_size=32, gaussian_blur=0.0),
    )
    hidden, out = HEADS
    encoder = backbone(args.stem).to(args.device)
    projector, predictor = (
        head.to(args.device) for head in (BYOLProjectionHead(512, hidden, out), BYOLPredictionHead(out, hidden, out))
    )
    teacher, teacher_projector = copy.deepcopy(encoder), copy.deepcopy(projector)
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(teacher_projector)
    criterion = NegativeCosineSimilarity()
    parameters = [*encoder.parameters(), *projector.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    batches = endless(LightlyDataset(str(args.root / "train"), transform=views), args)

    def student(x: Any) -> Any:
        return predictor(projector(encoder(x)))

    def work(steps: int) -> None:
        total = torch.zeros((), device=args.device)
        for _ in range(steps):
            (x0, x1), _, _ = next(batches)
            update_momentum(encoder, teacher, m=0.996)
            update_momentum(projector, teacher_projector, m=0.996)
            x0, x1 = x0.to(args.device), x1.to(args.device)
            p0, z0 = student(x0), teacher_projector(teacher(x0)).detach()
            p1, z1 = student(x1), teacher_projector(teacher(x1)).detach()
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        float(total)
        finish(args.device)

    return Work(work, {}, encoder, optimizer, lambda: batches.seconds)


def heads(args: argparse.Namespace) -> tuple[Any, Any]:
    """BYOL's projector and predictor."""
    from torch import nn

    hidden, out = HEADS

    def mlp(width: int) -> Any:
        layers = nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
        return nn.Sequential(*layers).to(args.device)

    return mlp(512), mlp(out)


def solo(args: argparse.Namespace) -> Work:
    """solo-learn's CIFAR recipe for BYOL: what a step does, from torch's and torchvision's parts."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    def pipeline(solarize: float) -> Any:
        return T.Compose(
            [
                T.RandomResizedCrop(32, SCALE, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomApply([T.ColorJitter(*JITTER)], 0.8),
                T.RandomGrayscale(0.2),
                T.RandomSolarize(128, solarize),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            ]
        )

    first, second = pipeline(0.0), pipeline(0.2)
    dataset = ImageFolder(args.root / "train", transform=lambda image: (first(image), second(image)))
    batches = endless(dataset, args)
    encoder, (projector, predictor) = backbone(args.stem).to(args.device), heads(args)
    teacher, teacher_projector = copy.deepcopy(encoder), copy.deepcopy(projector)
    classifier = nn.Linear(512, len(dataset.classes)).to(args.device)
    trained = nn.ModuleList([encoder, projector, predictor, classifier])
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-5)
    pairs = [*zip(encoder.parameters(), teacher.parameters(), strict=True)]
    pairs += zip(projector.parameters(), teacher_projector.parameters(), strict=True)

    def work(steps: int) -> None:
        for _ in range(steps):
            views, labels = next(batches)
            views, labels = [view.to(args.device) for view in views], labels.to(args.device)
            features = [encoder(view) for view in views]
            predictions = [predictor(projector(feature)) for feature in features]
            with torch.no_grad():
                targets = [teacher_projector(teacher(view)) for view in views]
            loss = sum(
                2 - 2 * F.cosine_similarity(predictions[i], targets[1 - i].detach(), dim=-1).mean() for i in (0, 1)
            )
            loss = loss + sum(F.cross_entropy(classifier(feature.detach()), labels) for feature in features) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for ours, theirs in pairs:
                    theirs.copy_(0.99 * theirs + 0.01 * ours)
        finish(args.device)

    return Work(work, {}, encoder, optimizer, lambda: batches.seconds)


def bare(args: argparse.Namespace, precision: str) -> Work:
    """The least that a step of BYOL needs."""
    import torch
    from torch.nn import functional as F

    from rotssl.base import memory

    memory.tune_malloc()
    encoder, (projector, predictor) = backbone(args.stem).to(args.device), heads(args)
    encoder = encoder.to(memory_format=torch.channels_last)
    teacher, teacher_projector = copy.deepcopy(encoder), copy.deepcopy(projector)
    ours = [*encoder.parameters(), *projector.parameters()]
    theirs = [*teacher.parameters(), *teacher_projector.parameters()]
    optimizer = torch.optim.SGD([*ours, *predictor.parameters()], lr=RATE, momentum=0.9, weight_decay=DECAY)
    ready = [torch.randn(8, args.batch, 3, 32, 32, device=args.device) for _ in range(2)]
    pool = [
        [view.contiguous(memory_format=torch.channels_last) for view in batch] for batch in zip(*ready, strict=True)
    ]
    feed = itertools.cycle(pool)

    def work(steps: int) -> None:
        for _ in range(steps):
            views = next(feed)
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
                predictions = [predictor(projector(encoder(view))) for view in views]
                with torch.no_grad():
                    targets = [teacher_projector(teacher(view)) for view in views]
            loss = sum(-F.cosine_similarity(predictions[i].float(), targets[1 - i].float()).mean() for i in (0, 1))
            (loss / 2).backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(theirs, ours, EMA)
        finish(args.device)

    return Work(work, {}, encoder, optimizer, lambda: 0.0)


def rotssl(args: argparse.Namespace, form: str) -> Work:
    """The engine, from its configuration on."""
    import torch

    from rotssl import config as cfg
    from rotssl.data import datasets
    from rotssl.engine.runtime import LocalRuntime
    from rotssl.engine.trainer import Trainer
    from rotssl.runs import journal

    hidden, out = HEADS
    work_folder = tempfile.mkdtemp(dir=args.scratch)
    overrides = {
        "data.name": "imagefolder",
        "data.root": str(args.root),
        "data.image_size": 32,
        "views.global_scale": list(SCALE),
        "views.jitter": list(JITTER),
        "views.solarize": [0.0, 0.2],
        "encoder.name": "resnet18",
        "encoder.stem": args.stem,
        "model.norm": "batch",
        "method.name": "byol",
        "method.hidden_dim": hidden,
        "method.out_dim": out,
        "rotation.weight": 0.0,
        "optim.name": "sgd",
        # 2 - 2cos is twice the loss of the others, so half the rate and twice the decay are the same updates.
        "optim.lr": RATE / 2,
        "optim.weight_decay": 2 * DECAY,
        "optim.warmup_epochs": 0,
        "method.momentum": 1 - EMA,
        "method.momentum_end": 1 - EMA,
        "train.batch_size": args.batch,
        "train.epochs": args.epochs,
        "train.seed": args.seed,
        "train.precision": precision_of(f"rotssl-{form}", args.device),
        "scaling.num_workers": 0,
        "storage.path": work_folder,
    }
    overrides |= {"joint": {"model.joint_views": True}, "rotation": {"rotation.weight": 1.0}}.get(form, {})
    config = cfg.build(overrides)
    info = datasets.inspect(config.data, config.evaluation.holdout)
    config = cfg.resolve(config, info.image_size, info.train_size)
    config.run_dir.mkdir(parents=True)
    started = time.perf_counter()
    splits = datasets.load(config.data, config.evaluation.holdout)
    decoded = time.perf_counter() - started
    runtime = LocalRuntime(config.run_dir, torch.device(args.device))
    trainer = Trainer(config, splits, runtime, journal.Journal(config.run_dir))
    trainer.parallel.train()
    batches = itertools.chain.from_iterable(trainer.batches(epoch) for epoch in itertools.count())

    def work(steps: int) -> None:
        sums: dict[str, Any] = {}
        for images, ctx in itertools.islice(batches, steps):
            for key, value in trainer.step(images, ctx).items():
                sums[key] = sums[key] + value if key in sums else value.float()
        {key: float(value) for key, value in sums.items()}
        finish(args.device)

    facts = {"decoded": decoded, "images": len(splits.train.images) + len(splits.validation or [])}
    return Work(work, facts, trainer.model.encoder, trainer.optimizer, lambda: trainer.loader.waited)


def build(args: argparse.Namespace) -> Work:
    """The one that ``--serve`` names."""
    import torch

    torch.set_num_threads(args.threads)
    name, _, form = args.serve.partition("-")
    if not form:
        return {"lightly": lightly, "solo": solo}[name](args)
    return {"bare": bare, "rotssl": rotssl}[name](args, form)
