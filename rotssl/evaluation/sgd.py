"""Training by SGD: a linear classifier on the frozen encoder, or encoder and classifier together. One loop for both."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base import heartbeat, rng
from rotssl.base.schedules import cosine
from rotssl.config import ResolvedConfig
from rotssl.config.evaluating import SGD_EPOCHS, SGD_RATES, FinetuneOptions, SgdOptions, finetune_epochs
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet
from rotssl.data.loader import Loader

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # inputs and labels of an epoch (0-based)


@dataclass(frozen=True)
class Recipe:
    """How to train. Rates fall along a cosine, epoch by epoch; momentum is 0.9; a last part of a batch is dropped.

    Attributes:
        epochs: length.
        batch_size: images per step.
        lr: first rate of the classifier.
        encoder_lr: first rate of the encoder; 0: it is frozen, and so are BatchNorm's statistics.
        weight_decay: of all weights.
        scale: smallest and largest random crop, as shares of the area, with random flips; None: whole images.
        source: where it is from.
    """

    epochs: int
    batch_size: int
    lr: float
    encoder_lr: float = 0.0
    weight_decay: float = 0.0
    scale: tuple[float, float] | None = None
    source: str = ""


_PAPER = (
    "Addepalli et al. 2021, section A3: rate, 100 epochs, batch 512, BatchNorm frozen; momentum and cosine are ours"
)
PRESETS = {
    "paper": Recipe(SGD_EPOCHS, 512, SGD_RATES["paper"], source=_PAPER),
    "paper-crop": Recipe(
        SGD_EPOCHS, 512, SGD_RATES["paper-crop"], scale=(0.2, 1.0), source=f"{_PAPER}, and so is the crop's scale"
    ),
    "swav": Recipe(
        SGD_EPOCHS,
        256,
        SGD_RATES["swav"],
        weight_decay=1e-6,
        scale=(0.08, 1.0),
        source="SwAV's eval_linear.py (8 GPUs of 32 images), but the last epoch in place of the best one on test",
    ),
}


def linear_recipe(options: SgdOptions) -> tuple[Recipe, tuple[float, ...]]:
    """The recipe of a linear classifier, and the rates to try."""
    preset = PRESETS[options.preset]
    return dataclasses.replace(preset, epochs=options.epochs or preset.epochs), options.lr or (preset.lr,)


def finetune_recipe(options: FinetuneOptions, share: float, images: int) -> Recipe:
    """The recipe of fine-tuning on a share of the labels, which is so many images; its rates are those of the first try."""
    return Recipe(
        options.epochs or finetune_epochs(share),
        min(images, options.batch_size or min(256, max(16, images // 8))),
        options.lr[0] * options.head_lr,
        options.lr[0],
        scale=options.scale,
        source="SwAV's eval_semisup.py: two rates, no decay of weights; a cosine, and the rates are chosen",
    )


class Classifier(nn.Module):
    """An encoder and a linear layer, (B, 3, S, S) -> (B, C); without an encoder (B, D) -> (B, C).

    Args:
        encoder: a copy is taken; None: the inputs are features.
        width: D.
        classes: C.
        seed: of the layer's weights, of deviation 0.01 as SwAV's; the bias is 0.
        frozen: whether the encoder stays as it is, in evaluation mode.
    """

    def __init__(self, encoder: nn.Module | None, width: int, classes: int, seed: int, frozen: bool) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(not frozen) if encoder is not None else nn.Identity()
        with rng.seeded(seed, "classifier"):
            self.head = nn.Linear(width, classes)
            nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.frozen, self.seed = frozen, seed

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode, of the encoder only if it is trained."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if self.frozen:
            with torch.no_grad():
                x = self.encoder(x)
            return self.head(x)  # type: ignore[no-any-return]
        return self.head(self.encoder(x))  # type: ignore[no-any-return]


def fit(network: Classifier, batches: Batches, recipe: Recipe) -> Classifier:
    """Train a classifier; returns it in evaluation mode."""
    groups = [{"params": list(network.head.parameters()), "lr": recipe.lr}]
    if not network.frozen:
        groups.append({"params": list(network.encoder.parameters()), "lr": recipe.encoder_lr})
    peaks = [recipe.lr, recipe.encoder_lr]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    network.train()
    # Some of timm's encoders drop at random.
    with torch.enable_grad(), rng.seeded(network.seed, "model"):
        for epoch in range(recipe.epochs):
            for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                group["lr"] = cosine(peak, 0.0, epoch / recipe.epochs)
            for inputs, labels in batches(epoch):
                loss = F.cross_entropy(network(inputs), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                heartbeat.beat()
    return network.eval()


def feature_batches(features: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> Batches:
    """Batches of features, (N, D), in an order that is a function of seed and epoch."""
    size = min(recipe.batch_size, len(features))

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(rng.permutation(rng.key(seed, epoch, "order"), len(features))).to(features.device)
        for index in order[: len(order) // size * size].split(size):
            yield features[index], labels[index]

    return batches


def view_batches(
    config: ResolvedConfig, data: ImageSet, augment: Augment, recipe: Recipe, seed: int, device: torch.device
) -> Batches:
    """Batches of one random crop, flipped or not, of each image; functions of the seed, the epoch and the positions.

    Args:
        config: of the run, for the side and the layout of the images.
        data: the images.
        augment: provides the normalisation.
        recipe: batch size and scale.
        seed: of order and crops.
        device: of the batches.
    """
    assert recipe.scale is not None and data.labels is not None
    views = dataclasses.replace(
        config.views,
        global_count=1,
        global_scale=recipe.scale,
        local_count=0,
        split=1,
        size_start=None,
        jitter=(0.0, 0.0, 0.0, 0.0),
        jitter_p=0.0,
        grayscale=0.0,
        blur=(0.0,),
        solarize=(0.0,),
        flip=0.5,
        good_crops=0.0,
        log_saliency=False,
    )
    train = dataclasses.replace(
        config.train, seed=seed, batch_size=min(recipe.batch_size, len(data)), epochs=recipe.epochs, accumulate=1
    )
    ours = dataclasses.replace(config, views=views, train=train)
    crops = Augment(views, augment.size, augment.mean, augment.std, seed)
    loader = Loader(ours, data.images, device, augment=crops)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    labels = torch.from_numpy(data.labels).to(device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(rng.permutation(rng.key(seed, epoch, "order"), len(data)))
        for images, ctx in loader.batches(epoch):
            index = order[torch.from_numpy(ctx.positions)].to(device)
            yield crops(images, ctx).full[0].contiguous(memory_format=layout), labels[index]

    return batches


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss on held-out images, the first of equal ones. Diverged ones count as infinite."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
