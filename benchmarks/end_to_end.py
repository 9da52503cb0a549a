"""From a folder of JPEG files to updated weights: BYOL with a ResNet-18, against lightly, solo-learn's pipeline and a bare loop.

    python benchmarks/end_to_end.py [--steps 50] [--rounds 3] [--device cuda] [--only lightly rotssl-fp32] [--quick]

Every contender trains in a process of its own with the same batch size, the same heads (512 - 1024 - 256, lightly's example's)
and the same number of threads; the data loaders of the peers have as many workers on top. A sample is --steps steps in steady
state: start-up, first batches and the decoding into rotssl's store lie before, and are told apart. Needs
$ROTSSL_DATA/cifar10-jpeg.tar.gz, or --root. The peers' packages are put into an environment of their own (--peers). Writes
benchmarks/results/end_to_end_DATE.md and .csv.
"""

import argparse
import copy
import csv
import datetime
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paired import PEERS, Sample, peers, serve, started, take_turns, versions


class Work(NamedTuple):
    """A contender: does so many steps; facts to be told; the network that it trains, and by what."""

    run: Callable[[int], None]
    facts: dict[str, Any]
    encoder: Any
    optimizer: Any


ABOUT = {
    "lightly": "lightly's BYOL example: its data set, transforms, heads, loss and EMA; fp32, contiguous",
    "solo": "solo-learn's CIFAR pipeline, rebuilt: bicubic crops, per-sample transforms of torchvision on PIL images, online "
    "classifier, EMA parameter by parameter; SGD for its LARS, which spares it time; fp32, contiguous",
    "bare-fp32": "bare torch loop on views that lie ready in memory: nothing to load, nothing to augment; the allocator keeps "
    "what is freed, as rotssl's does; fp32, channels_last",
    "bare-bf16": "bare-fp32 with bf16 autocast",
    "rotssl-fp32": "rotssl's Trainer, lightly's parameters of the views, norm batch, one view a pass; fp32, channels_last",
    "rotssl-bf16": "rotssl-fp32 with bf16 autocast",
    "rotssl-rotation": "rotssl-{fast} with rotation in place by a shared angle",
    "rotssl-joint": "rotssl-{fast} with all views in one pass (other BatchNorm statistics)",
}
PEERS_OWN = ("lightly", "solo")  # what runs in the peers' environment
SCALE, JITTER, HEADS, RATE = (0.08, 1.0), (0.4, 0.4, 0.2, 0.1), (1024, 256), 0.06
DECAY, EMA = 5e-4, 0.004


def fast(device: str) -> str:
    """bf16, unless this is about a processor that only emulates it."""
    from rotssl.engine import emulates_bf16

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


# --- contenders --------------------------------------------------------------------------------------------------------------


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


def endless(dataset: Any, args: argparse.Namespace) -> Iterator[Any]:
    """Batches of a loader that never comes to the end of an epoch, so that none of its starts is timed."""
    import torch

    sampler = torch.utils.data.RandomSampler(dataset, num_samples=10**9)
    return iter(
        torch.utils.data.DataLoader(
            dataset,
            args.batch,
            sampler=sampler,
            num_workers=args.workers,
            drop_last=True,
            pin_memory=args.device == "cuda",
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

    return Work(work, {}, encoder, optimizer)


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

    return Work(work, {}, encoder, optimizer)


def bare(args: argparse.Namespace, precision: str) -> Work:
    """The least that a step of BYOL needs."""
    import torch
    from torch.nn import functional as F

    from rotssl import memory

    memory.keep_freed()
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

    return Work(work, {}, encoder, optimizer)


def rotssl(args: argparse.Namespace, form: str) -> Work:
    """The engine, from its configuration on."""
    import torch

    from rotssl import config as cfg
    from rotssl import journal
    from rotssl.data import datasets
    from rotssl.engine import Trainer
    from rotssl.runtime import LocalRuntime

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
    return Work(work, facts, trainer.model.encoder, trainer.optimizer)


def contender(args: argparse.Namespace) -> Work:
    """The one that ``--serve`` names."""
    import torch

    torch.set_num_threads(args.threads)
    name, _, form = args.serve.partition("-")
    if not form:
        return {"lightly": lightly, "solo": solo}[name](args)
    return {"bare": bare, "rotssl": rotssl}[name](args, form)


# --- driver ------------------------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, samples: dict[str, list[Sample]], facts: dict[str, Any], peer: str) -> list[str]:
    """The tables."""
    from common import command, commit, machine, shown

    speed = {name: [args.steps * args.batch / each.seconds for each in own] for name, own in samples.items()}

    def ratio(name: str, base: str) -> str:
        if base not in speed or name == base:
            return ""
        return shown([a / b for a, b in zip(speed[name], speed[base], strict=True)])

    foreign = [each.foreign for own in samples.values() for each in own]
    lines = [
        f"# From JPEG files to updated weights, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine(args.device)}. Peers: {peer}.",
        f"BYOL, ResNet-18 with the {args.stem} stem, 32 x 32, batch {args.batch}, heads 512 - {HEADS[0]} - {HEADS[1]}, "
        f"{args.threads} threads, {args.workers} loader workers where there are loaders. {args.rounds} rounds of "
        f"{args.steps} steps, interleaved; the other contenders are stopped meanwhile. Other processes used "
        f"{statistics.median(foreign):.0%} of the cores (median; at most {max(foreign):.0%}).",
        "Median (range) of the rounds; ratios are of images a second, within a round.",
        "",
        "| contender | images/s | CPU ms an image | against lightly | against solo | against the bare loop of its precision "
        "| start-up, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in samples.items():
        cpu = [1000 * each.cpu / (args.steps * args.batch) for each in own]
        precision = precision_of(name, args.device)
        start = facts[name]["built"] + facts[name]["warmed_up"]
        lines.append(
            f"| {name} | {shown(speed[name], '.0f')} | {shown(cpu, '.1f')} | {ratio(name, 'lightly')} | {ratio(name, 'solo')} "
            f"| {ratio(name, 'bare-' + precision)} | {start:.1f} |"
        )
    lines += ["", *(f"- {name}: {ABOUT[name].format(fast=fast(args.device))}." for name in samples)]
    if args.device == "cpu" and fast("cpu") == "fp32":
        lines.append("- This processor has no instructions for bf16: nothing in it was measured.")
    lines.append("- All solarise the second view with probability 0.2. solo-learn's own heads are 4096 wide.")
    for name in samples:
        if "decoded" in facts[name]:
            seconds, images = facts[name]["decoded"], facts[name]["images"]
            lines.append(
                f"- {name} decoded {images} files in {seconds:.1f} s ({images / seconds:.0f} images/s) at its start, "
                f"outside of the samples: as long as {seconds * statistics.median(speed[name]) / images:.2f} of its epochs, "
                "once a run; the peers decode in every epoch."
            )
    return lines


def write(args: argparse.Namespace, samples: dict[str, list[Sample]], lines: list[str]) -> None:
    """The dated files."""
    args.output.mkdir(parents=True, exist_ok=True)
    parts = [
        "end_to_end",
        *([] if args.device == "cpu" else [args.device]),
        *([] if len(samples) == len(suited(list(ABOUT), args.device)) else ["part"]),
    ]
    target = args.output / "_".join([*parts, str(datetime.date.today())])
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["contender", "round", "images", "seconds", "cpu_seconds", "others"])
        for name, own in samples.items():
            for i, each in enumerate(own):
                row = [f"{each.seconds:.3f}", f"{each.cpu:.3f}", f"{each.foreign:.3f}"]
                writer.writerow([name, i + 1, args.steps * args.batch, *row])
    print("\n".join(lines))


def main() -> None:
    """Start the contenders, let them take turns, write the tables."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of a sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=None, help="images a step; default: 128, on a GPU 512")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default=None, help="default: imagenet, on a GPU cifar")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--workers", type=int, default=cores, help="of a peer's data loader")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(ABOUT),
        help="contenders; all of them are on the device at a time, so take few on a small one",
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of 3 steps, to see that it works")
    parser.add_argument("--images", type=int, default=10000, help="of CIFAR-10's")
    parser.add_argument("--root", type=Path, default=None, help="folder with train/CLASS/*.jpg, instead of CIFAR-10")
    parser.add_argument("--peers", type=Path, default=PEERS, help="environment of the peers; made where it is missing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first sample")
    parser.add_argument("--epochs", type=int, default=1000, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or (512 if args.device == "cuda" else 128)
    args.stem = args.stem or ("cifar" if args.device == "cuda" else "imagenet")
    if args.serve:
        serve(lambda: contender(args)[:2], args.warm_up)
        return
    from common import cifar10_folder

    if args.quick:
        args.steps, args.rounds, args.warm_up = 3, 2, 1
    python = peers(args.peers, PEERS_OWN[:1])
    names = args.only or suited(list(ABOUT), args.device)
    names = [name for name in names if python is not None or name != "lightly"]
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or cifar10_folder(Path(scratch), args.images)
        shared = ["--device", args.device, "--stem", args.stem, "--batch", args.batch, "--threads", args.threads]
        shared += [
            "--workers",
            args.workers,
            "--warm-up",
            args.warm_up,
            "--root",
            root.absolute(),
            "--scratch",
            scratch,
        ]
        commands = {
            name: [
                *map(
                    str,
                    [python if python and name in PEERS_OWN else sys.executable, __file__, "--serve", name, *shared],
                )
            ]
            for name in names
        }
        with started(commands, args.threads, Path(scratch)) as contenders:
            samples = take_turns(contenders, dict.fromkeys(names, args.steps), args.rounds)
    facts = {each.name: each.facts for each in contenders}
    write(args, samples, report(args, samples, facts, versions(python) if python else "none could be installed"))


if __name__ == "__main__":
    main()
