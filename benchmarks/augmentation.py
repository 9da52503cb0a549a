"""Two random views of an image on one core: ours, against torchvision's transforms a sample at a time and against kornia.

    python benchmarks/augmentation.py [--rounds 7] [--batches 128 256] [--quick]

Crop and resize, flip, colour jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, grayscale with 0.2 and normalisation, of decoded
32 x 32 colour pictures, on one thread; and the same with Gaussian blur with probability 0.5. A process for each contender, timed
in turn, the others stopped. Needs $ROTSSL_DATA/cifar10-jpeg.tar.gz. Writes benchmarks/results/augmentation_DATE.md.
"""

import argparse
import datetime
import functools
import itertools
import os
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paired import PEERS, peers, serve, started, take_turns, versions

ABOUT = {
    "v1": "torchvision.transforms on PIL images, a sample at a time",
    "v2": "torchvision.transforms.v2 on PIL images, a sample at a time",
    "kornia": "kornia.augmentation on the float batch; its own order of colour operations, one for the batch",
    "rotssl": "rotssl.data.augment on the uint8 batch, draws included",
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SCALE, JITTER, P_JITTER, P_GRAY, P_BLUR, SIGMA = (0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, (0.1, 2.0)
IMAGES = {"v1": 512, "v2": 512, "kornia": 1024, "rotssl": 4096}  # of a sample: about a second or less


def pictures(count: int) -> list[Any]:
    """PIL images, decoded."""
    from PIL import Image

    archive = Path(os.environ.get("ROTSSL_DATA", "")) / "cifar10-jpeg.tar.gz"
    if not archive.is_file():
        raise SystemExit("no pictures: put cifar10-jpeg.tar.gz into $ROTSSL_DATA")
    with tarfile.open(archive) as tar:
        files = itertools.islice((member for member in tar if member.isfile()), count)
        return [Image.open(tar.extractfile(member)).convert("RGB") for member in files]


def stacked(images: list[Any]) -> Any:
    """uint8 (B, 3, H, W)."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def per_sample(api: Any, to_tensor: Any, images: list[Any], blur: bool) -> Callable[[int], None]:
    """A torchvision pipeline on PIL images; results are stacked into batches, as a loader does."""
    import torch

    view = api.Compose(
        [
            api.RandomResizedCrop(images[0].size[0], SCALE),
            api.RandomHorizontalFlip(),
            api.RandomApply([api.ColorJitter(*JITTER)], P_JITTER),
            api.RandomGrayscale(P_GRAY),
            *([api.RandomApply([api.GaussianBlur(3, SIGMA)], P_BLUR)] if blur else []),
            to_tensor,
            api.Normalize(MEAN, STD),
        ]
    )

    def batch() -> None:
        for _ in range(2):
            torch.stack([view(image) for image in images])

    return lambda times: [batch() for _ in range(times)] and None


def make(args: argparse.Namespace) -> tuple[Callable[[int], None], dict[str, Any]]:
    """The contender that ``--serve`` names; a unit of work is a batch."""
    import torch

    torch.set_num_threads(1)
    images, blur = pictures(args.batch), args.blur
    if args.serve in ("v1", "v2"):
        from torchvision import transforms
        from torchvision.transforms import v2

        if args.serve == "v1":
            return per_sample(transforms, transforms.ToTensor(), images, blur), {}
        return per_sample(v2, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]), images, blur), {}
    batch = stacked(images)
    if args.serve == "kornia":
        import kornia.augmentation as K

        view = K.AugmentationSequential(
            K.RandomResizedCrop(batch.shape[2:], SCALE),
            K.RandomHorizontalFlip(),
            K.ColorJitter(*JITTER, p=P_JITTER),
            K.RandomGrayscale(p=P_GRAY),
            *([K.RandomGaussianBlur((3, 3), SIGMA, p=P_BLUR)] if blur else []),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )

        @torch.no_grad()
        def work(times: int) -> None:
            for _ in range(times):
                x = batch.float() / 255
                view(x), view(x)

        return work, {}
    import numpy as np

    from rotssl.base.step import StepContext
    from rotssl.config.views import ViewsConfig
    from rotssl.data.augment import Augment

    config = ViewsConfig(
        global_scale=SCALE, jitter=JITTER, jitter_p=P_JITTER, grayscale=P_GRAY, blur=(P_BLUR if blur else 0.0,)
    )
    augment, steps = Augment(config, batch.shape[2], MEAN, STD, 0), itertools.count()

    @torch.no_grad()
    def ours(times: int) -> None:
        for _ in range(times):
            first = args.batch * next(steps)
            augment(batch, StepContext(0, 0, 0, 0.0, np.arange(first, first + args.batch), first, args.batch))

    return ours, {}


def main() -> None:
    """Time all contenders for each size of the batch, without and with blur."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--quick", action="store_true", help="two rounds of one size, and no files")
    parser.add_argument("--peers", type=Path, default=PEERS, help="environment of the peers; made where it is missing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--serve", choices=tuple(ABOUT), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--blur", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(functools.partial(make, args), warm_up=2)
        return
    from common import command, commit, machine, shown

    if args.quick:
        args.rounds, args.batches = 2, args.batches[:1]
    python = peers(args.peers)
    names = [name for name in ABOUT if python is not None or name != "kornia"]
    lines = [
        f"# Two views of 32 x 32 colour pictures on one core, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; one thread. Peers: {versions(python) if python else 'none could be installed'}.",
        f"{args.rounds} interleaved rounds, the others stopped meanwhile. Median (range); ratios are of images a second, "
        "within a round; those of CPU time leave out what other processes took. An image is two views of it.",
        "",
        "| batch | blur | contender | images/s | against v1 | against v1, CPU time | others' share of the cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, blur in itertools.product(args.batches, (False, True)):
        units = {name: max(1, IMAGES[name] // batch) for name in names}
        commands = {}
        for name in names:
            runs_on = python if python is not None and name != "rotssl" else sys.executable
            command = [str(runs_on), __file__, "--serve", name, "--batch", str(batch), *["--blur"] * blur]
            commands[name] = command
        with tempfile.TemporaryDirectory() as scratch, started(commands, 1, Path(scratch)) as contenders:
            samples = take_turns(contenders, units, args.rounds)
        speed = {name: [units[name] * batch / each.seconds for each in own] for name, own in samples.items()}
        by_cpu = {name: [units[name] * batch / each.cpu for each in own] for name, own in samples.items()}
        for name in names:
            ratio, cpu = (
                shown([a / b for a, b in zip(rate[name], rate["v1"], strict=True)]) for rate in (speed, by_cpu)
            )
            foreign = statistics.median(each.foreign for each in samples[name])
            cells = str(batch), "0.5" if blur else "none", name, shown(speed[name], ".0f"), ratio, cpu, f"{foreign:.0%}"
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {ABOUT[name]}." for name in names)]
    print("\n".join(lines))
    if args.quick:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"augmentation_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
