"""kNN after equal minutes of training: lightly's BYOL loop and rotssl's, without and with rotation, on one device.

    python benchmarks/equal_minutes.py [--minutes 10] [--device cuda] [--images 5000] [--seeds 1] [--contenders lightly ...]

The contenders (contenders.py), one after the other, the first one another in each round. All take SGD with momentum 0.9, weight
decay 5e-4, a teacher's momentum of 0.996, and a rate that falls from 0.06 along a cosine to the end of their minutes (rotssl's
loss is twice lightly's: half the rate and twice the decay are the same updates). Left different: rotssl decays no biases and
norms, and its minutes are rounded to whole epochs; take few --images where an epoch is long for that. Start-up and decoding are
not in the minutes. Then images a second, what share of the device's matrix-multiply rate the counted FLOPs of a step reach, and
kNN (k=200, T=0.1) on every tenth of CIFAR-10's training files, held back, by rotssl's evaluation for all.
Writes benchmarks/results/equal_minutes_DEVICE_DATE.md. Needs $ROTSSL_DATA/cifar10-jpeg.tar.gz.
"""

import argparse
import datetime
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import contenders
from paired import PEERS, peers, versions

CONTENDERS = ("lightly", "rotssl-fp32", "rotssl-bf16", "rotssl-rotation")
MOMENTUM = 0.9


def train(args: argparse.Namespace) -> None:
    """The contender's side: train for so many minutes, save the encoder, tell on standard output."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    ours = args.serve.startswith("rotssl")
    images = sum(1 for _ in (args.root / "train").rglob("*.jpg"))
    args.epochs = 1000
    probe = contenders.build(args)
    probe.run(3 + 4 * args.workers)  # more than a data loader has ready
    started = time.perf_counter()
    probe.run(20)
    step = (time.perf_counter() - started) / 20
    total = max(10, round(60 * args.minutes / step))
    work = probe
    if ours:  # whose schedule is in epochs
        per_epoch = images // args.batch
        args.epochs = max(1, round(total / per_epoch))
        total = args.epochs * per_epoch
        work = contenders.build(args)
    for group in work.optimizer.param_groups:
        group["momentum"] = MOMENTUM
        if not ours:
            group["weight_decay"] = contenders.DECAY
    started, before = time.perf_counter(), work.waited()
    done = 0
    while done < total:
        if not ours:
            for group in work.optimizer.param_groups:
                group["lr"] = contenders.RATE * (1 + math.cos(math.pi * done / total)) / 2
        count = min(10, total - done)
        work.run(count)
        done += count
    seconds = time.perf_counter() - started
    torch.save(work.encoder.state_dict(), args.save)
    print(json.dumps({"steps": total, "seconds": seconds, "waited": work.waited() - before}))


def hold_back(root: Path) -> Path:
    """Make every tenth training picture one of validation, in place of the test split, which is nobody's to choose by."""
    shutil.rmtree(root / "val", ignore_errors=True)  # the first pictures of train/ come without
    for folder in sorted((root / "train").iterdir()):
        (root / "val" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[::10]:
            file.rename(root / "val" / folder.name / file.name)
    return root


def knn(args: argparse.Namespace, name: str, file: Path, splits: Any) -> float:
    """Top-1 of a saved encoder."""
    import torch

    from rotssl.config.views import ViewsConfig
    from rotssl.data.augment import Augment
    from rotssl.evaluation.knn import knn_top1
    from rotssl.evaluation.measure import encode_share
    from rotssl.models.encoders import build_encoder

    ours = name.startswith("rotssl")
    encoder = build_encoder("resnet18", args.stem, 32)[0] if ours else contenders.backbone(args.stem)
    encoder.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    device = torch.device(args.device)
    # The peers' own mean and deviation: ImageNet's, as rotssl takes them for folders.
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    augment = Augment(ViewsConfig(), 32, mean, std, 0)
    bank, queries = splits
    features = [encode_share(encoder.to(device), part, augment, device, torch.contiguous_format) for part in splits]
    labels = [torch.from_numpy(part.labels).to(device) for part in (bank, queries)]
    return knn_top1(features[0], labels[0], features[1], labels[1])


def flops_an_image(args: argparse.Namespace, rotation: bool) -> float:
    """Of a training step of rotssl's BYOL, which is lightly's."""
    from rotssl import config as cfg
    from rotssl.engine.flops import count_step

    hidden, out = contenders.HEADS
    overrides = {
        "data.name": "synthetic",
        "encoder.name": "resnet18",
        "encoder.stem": args.stem,
        "method.hidden_dim": hidden,
        "method.out_dim": out,
        "rotation.weight": float(rotation),
        "train.batch_size": 64,
    }
    return count_step(cfg.resolve(cfg.build(overrides), 32, 1024)) / 64


def main() -> None:
    """Train the contenders, evaluate what they trained, write the table."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default=None, help="default: imagenet, on a GPU cifar")
    parser.add_argument("--batch", type=int, default=None, help="images a step; default: 128, on a GPU 512")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--workers", type=int, default=cores, help="of lightly's data loader")
    parser.add_argument("--images", type=int, default=None, help="of CIFAR-10's training pictures; default: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: those that this device suits")
    parser.add_argument("--peers", type=Path, default=PEERS, help="environment of the peers; made where it is missing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    for name in ("serve", "scratch"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or (512 if args.device == "cuda" else 128)
    args.stem = args.stem or ("cifar" if args.device == "cuda" else "imagenet")
    if args.serve:
        train(args)
        return
    import torch
    from common import cifar10_folder, command, commit, import_path, machine, spread

    from rotssl.config.sections import DataConfig
    from rotssl.data import datasets
    from rotssl.engine.timing import matmul_rate

    python = peers(args.peers, contenders.PEERS_OWN[:1])
    names = args.contenders or contenders.suited(CONTENDERS, args.device)
    names = [name for name in names if python is not None or name not in contenders.PEERS_OWN]
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}  # epochs, minutes, images/s, waited, kNN
    with tempfile.TemporaryDirectory() as scratch:
        root = hold_back(cifar10_folder(Path(scratch) / "pictures", args.images))
        config = DataConfig(name="imagefolder", root=str(root), image_size=32)
        loaded = datasets.load(config, 0.1)
        splits = loaded.train, loaded.validation
        same = ["--device", args.device, "--stem", args.stem, "--batch", args.batch, "--threads", args.threads]
        same += ["--workers", args.workers, "--minutes", args.minutes, "--root", root, "--scratch", scratch]
        for seed in range(args.seeds):
            for k in range(len(names)):
                name, file = names[(k + seed) % len(names)], Path(scratch) / f"{k}-{seed}.pt"
                own = python if python is not None and name in contenders.PEERS_OWN else sys.executable
                words = [own, __file__, *same, "--serve", name, "--save", file, "--seed", seed]
                env = {**os.environ, "PYTHONPATH": import_path(), "LIGHTLY_DID_VERSION_CHECK": "True"}
                done = subprocess.run([*map(str, words)], check=True, stdout=subprocess.PIPE, text=True, env=env)
                told = json.loads(done.stdout.splitlines()[-1])
                images = told["steps"] * args.batch
                minutes, speed = told["seconds"] / 60, images / told["seconds"]
                waited = told["waited"] / told["seconds"]
                row = images / len(loaded.train), minutes, speed, waited, knn(args, name, file, splits)
                found[name].append(row)
                print(f"{name}, seed {seed}: {row[0]:.1f} epochs, {speed:.0f} images/s, kNN {row[4]:.1%}", flush=True)
    device = torch.device(args.device)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    used = {name: contenders.precision_of(name, args.device) for name in names}
    rates = {kind: matmul_rate(device, kinds[kind]) for kind in sorted(set(used.values()))}
    lines = [
        f"# kNN after {args.minutes:g} minutes, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine(args.device)}. Peers: {versions(python) if python else 'none could be installed'}.",
        f"BYOL, ResNet-18 with the {args.stem} stem, CIFAR-10 as JPEG files, batch {args.batch}, {args.seeds} seeds; top-1 on "
        f"{len(splits[1])} validation images, %: mean (range). FLOPs as torch counts them; rates of square matrix products: "
        + ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in rates.items()),
        "",
        "| contender | epochs | minutes taken | images/s | waits for its batches | of the matrix-multiply rate | kNN |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        epochs, minutes, speed, waited, accuracy = (list(column) for column in zip(*rows, strict=True))
        kind = used[name]
        share = sum(speed) / len(speed) * flops_an_image(args, name == "rotssl-rotation") / rates[kind]
        taken = f"{min(minutes):.1f} to {max(minutes):.1f}"
        shown = f"{sum(epochs) / len(epochs):.1f} | {taken} | {sum(speed) / len(speed):.0f} | {sum(waited) / len(waited):.1%} "
        shown += f"| {share:.0%} of {kind}"
        lines.append(f"| {name} | {shown} | {spread(accuracy)} |")
    lines += ["", *(f"- {name}: {contenders.ABOUT[name].format(fast=contenders.fast(args.device))}." for name in names)]
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / f"equal_minutes_{args.device}_{datetime.date.today()}.md"
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
