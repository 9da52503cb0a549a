"""The training loop. It knows the world through a small Runtime: rotssl.runtime's LocalRuntime, or Ray Train's."""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from rotssl import checkpoint, distributed, memory, rng
from rotssl import config as cfg
from rotssl.config import Config
from rotssl.data.augment import Augment
from rotssl.data.datasets import Splits, normalization
from rotssl.evaluation import KNN_K
from rotssl.evaluation.protocol import extract, measure
from rotssl.flops import count_ends
from rotssl.journal import Journal
from rotssl.ledger import Cost, Ledger
from rotssl.loader import Loader
from rotssl.methods.base import StepContext
from rotssl.models.encoders import save_encoder
from rotssl.optim import build_optimizer
from rotssl.pretrainer import Output, Pretrainer, build_pretrainer, compare_gradients, encoder_gradients
from rotssl.reporting.pictures import save_views
from rotssl.runtime import RunFailed, Runtime
from rotssl.schedules import cosine, learning_rate


def precision(config: Config, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``: as configured, or bf16 on GPUs that have it."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def weight_layout(device: torch.device, images: torch.memory_format) -> torch.memory_format:
    """How weights lie in memory: as the images do on GPUs, and on CPUs where that pays.

    oneDNN gives a CPU's weight gradients in the default format, and copies them at each step into that of other weights. With
    AVX2 its convolutions gain more than that by weights that lie as the images do. All workers have one layout, which DDP
    insists on: where their processors differ, the default one.
    """
    if device.type != "cpu":
        return images
    pays = torch.tensor(float(torch.backends.cpu.get_cpu_capability() == "AVX2"))
    return images if bool(distributed.mean(pays) == 1) else torch.contiguous_format


def emulates_bf16() -> bool:
    """Whether this processor has no instructions for bf16, so that steps in it take many times as long as in fp32."""
    # torch 2.11 may not tell what it found; then nothing is said.
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    known = "avx512_bf16", "amx_bf16", "avx_ne_convert"
    return has.get("architecture") == "x86_64" and not any(has.get(name) for name in known)


def _refuse_one_pixel(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if inputs[0].shape[-2:] == (1, 1):
        raise RunFailed(
            "train.precision: got bf16, expected fp32: on CPUs torch computes garbage for convolutions with a stride on maps "
            "of one pixel, to which these views shrink; or take larger views"
        )


def _require_compiler() -> None:
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise RunFailed(f"train.compile: got true, but there is no C++ compiler here ({compiler}; $CXX names another)")


class Trainer:
    """One worker of one run.

    Args:
        config: resolved.
        splits: the images.
        runtime: who runs this.
        journal: the points of the run; only rank 0 writes.

    Raises:
        RunFailed: ``train.compile`` on a CPU without a compiler.
    """

    def __init__(self, config: Config, splits: Splits, runtime: Runtime, journal: Journal) -> None:
        self.config, self.splits, self.runtime, self.journal = config, splits, runtime, journal
        train, device = config.train, runtime.device
        torch.use_deterministic_algorithms(train.deterministic)
        if device.type == "cpu":
            memory.keep_freed()
        self.model: Pretrainer = build_pretrainer(config, device)
        self.layout = torch.channels_last if train.channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=weight_layout(device, self.layout))
        if train.compile:
            if device.type == "cpu":
                _require_compiler()
            self.model.compile_networks()
        method = self.model.method
        constant = [p for name in method.constant_lr for p in method.get_submodule(name).parameters()]
        self.precision = precision(config, device)
        if (device.type, self.precision) == ("cpu", "bf16"):
            for layer in self.model.modules():
                if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and max(layer.kernel_size) > 1:
                    layer.register_forward_pre_hook(_refuse_one_pixel)
        self.optimizer = build_optimizer(self.model, config.optim, constant)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.parallel = runtime.wrap(self.model)
        assert config.data.image_size != "auto" and config.optim.lr != "auto"
        statistics = normalization(config.data.name)
        self.augment = Augment(config.views, config.data.image_size, *statistics, train.seed, self.model.own_crops())
        self.peak_lr = config.optim.lr
        self.loader = Loader(config, splits.train.images, runtime)
        self.steps_per_epoch, self.total_steps = self.loader.steps_per_epoch, self.loader.total_steps
        self.ledger = Ledger(journal, runtime)

    def facts(self) -> dict[str, str]:
        """What the configuration left open, for the tags of the run."""
        bank = len(self.splits.train.images)
        return {"precision": self.precision, "device": self.runtime.device.type, "knn_k": str(min(KNN_K, bank))}

    # --- state -------------------------------------------------------------------------------------------------------------

    def state(self, epoch: int) -> dict[str, Any]:
        """Everything that the next step needs, plain values and tensors. ``epoch`` is the number of epochs done."""
        return {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "cost": vars(self.ledger.cost),
            "config": json.dumps(cfg.to_dict(self.config)),
        }

    def restore(self, state: dict[str, Any]) -> int:
        """Take up a state; returns the number of epochs done."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        # A run may go on on another kind of device, whose weights lie otherwise; fused kernels take moments to lie as those do.
        for param, kept in self.optimizer.state.items():
            moments = {key: v for key, v in kept.items() if torch.is_tensor(v) and v.shape == param.shape}
            kept.update(
                {key: torch.empty_like(param, dtype=value.dtype).copy_(value) for key, value in moments.items()}
            )
        self.scaler.load_state_dict(state["scaler"])
        self.ledger.cost = Cost(**state["cost"])
        return int(state["epoch"])

    # --- the loop ----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, or to ``train.stop_after``, from the newest checkpoint if there is one.

        Raises:
            RunFailed: loss or gradient became infinite or NaN; bf16 on a CPU with views that shrink to a pixel.
        """
        train = self.config.train
        state = next(checkpoint.latest(self.journal.folder), None)
        done = self.restore(state) if state is not None else 0
        if distributed.world_size() > 1:
            # Every worker must have found the same checkpoint: storage that some node doesn't share would split the run.
            seen = distributed.gather(torch.tensor([float(done)]).to(self.runtime.device))
            if not bool((seen == seen[0]).all()):
                raise RunFailed(
                    f"storage.path: the workers see different checkpoints ({seen.tolist()}); it must be shared by all nodes"
                )
        flops = count_ends(self.config) if self.runtime.rank == 0 else (0.0, 0.0)
        if self.runtime.rank == 0:
            self.ledger.count_lost(done)
        if done:
            self.runtime.progress({"note": f"going on after epoch {done}"})
        bank = len(self.splits.train.images)
        if self.splits.validation is not None and bank < KNN_K:
            self.runtime.progress({"note": f"kNN with k={bank} in place of {KNN_K}: there are no more training images"})
        if self.precision == "bf16" and self.runtime.device.type == "cpu" and emulates_bf16():
            note = "train.precision bf16: this processor has no instructions for it; fp32 is many times as fast here"
            self.runtime.progress({"note": note})
        end = min(train.epochs, train.stop_after or train.epochs)
        self.runtime.progress({"facts": self.facts()})
        with self.ledger:
            for epoch in range(done, end):
                started = time.perf_counter()
                sums, steps = self._train_epoch(epoch)
                distributed.follow_first(self.model)
                metrics = {key: float(value) for key, value in sums.items()}
                seconds = time.perf_counter() - started
                metrics["throughput/input_wait"] /= seconds
                metrics.update(self._memory())
                self._check_finite(metrics, epoch)
                samples = steps * train.batch_size
                flops_per_step = cosine(*flops, (epoch + 0.5) / train.epochs)
                metrics.update(self.ledger.book(epoch, samples, seconds, steps * flops_per_step))
                metrics["throughput/images_per_second"] = samples / seconds
                metrics["optim/lr"] = self.optimizer.param_groups[0]["lr"]
                if self._evaluates(epoch):
                    metrics.update(self.evaluate(epoch))
                event = {"step": (epoch + 1) * self.steps_per_epoch, "total_steps": self.total_steps}
                self.ledger.finish(epoch, metrics, self.state(epoch + 1), event)
        if end == train.epochs and self.runtime.rank == 0:
            self.export()

    def _train_epoch(self, epoch: int) -> tuple[dict[str, Tensor], int]:
        """One pass over the training images; returns the means over steps and workers, and the number of steps."""
        self.parallel.train()
        sums: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        started = shown = time.perf_counter()
        waited = self.loader.waited
        for i, (images, ctx) in enumerate(self.batches(epoch)):
            logs = self.step(images, ctx)
            counts.update(logs.keys())
            for key, value in logs.items():
                sums[key] = sums[key] + value if key in sums else value.float()
            if time.perf_counter() - shown > 0.5 or i == 0:
                shown = time.perf_counter()
                if self.runtime.rank == 0:
                    self.ledger.note(epoch, shown - started)
                self.ledger.announce()
                self.runtime.progress({"epoch": epoch, "step": ctx.step + 1, "total_steps": self.total_steps})
        waited = self.loader.waited - waited
        sums["throughput/input_wait"], counts["throughput/input_wait"] = torch.tensor(waited).to(self.runtime.device), 1
        keys = sorted(sums)
        # The mean over the steps that have it; one collective, and the only place where the host waits for the device.
        means = distributed.mean(torch.stack([sums[key] / counts[key] for key in keys]))
        return dict(zip(keys, means.cpu(), strict=True)), self.steps_per_epoch

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, StepContext]]:
        """This worker's uint8 images of each step, and the step's context."""
        return self.loader.batches(epoch)

    def _schedule(self, ctx: StepContext) -> None:
        """Set the rate and the decay of this step."""
        optim = self.config.optim
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            shape = "constant" if group["constant_lr"] else optim.schedule
            ends = optim.warmup_lr, optim.final_lr
            group["lr"] = learning_rate(self.peak_lr, ctx.step, self.total_steps, warmup, shape, *ends)
            if group["decays"] and optim.weight_decay_end is not None:
                group["weight_decay"] = cosine(optim.weight_decay, optim.weight_decay_end, ctx.progress)

    def step(self, images: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """One step of the optimizer; returns what there is to log, on the device."""
        self._schedule(ctx)
        careful, clip = self.config.train.on_nan == "skip", self.config.optim.clip_norm
        before = [buffer.clone() for buffer in self.model.buffers()] if careful else []
        self.optimizer.zero_grad(set_to_none=True)
        logs: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        each = len(images) // ctx.passes
        for first in range(0, len(images), each):
            part = dataclasses.replace(ctx, positions=ctx.positions[first : first + each])
            last = first + each == len(images)
            with self.parallel.no_sync() if isinstance(self.parallel, DDP) and not last else nullcontext():
                found = self._pass(images[first : first + each], part, gradients)
            for key, value in found.items():
                logs[key] = logs.get(key, 0) + value / ctx.passes
        if gradients:
            logs.update(compare_gradients(gradients))
        self.scaler.unscale_(self.optimizer)
        self.model.method.after_backward(ctx)
        params = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
        skip = careful and not bool(torch.isfinite(norm))
        if skip:
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)  # the running statistics have seen what broke
        else:
            self.scaler.step(self.optimizer)
            self.model.after_step(ctx)
        self.scaler.update()
        if not skip:
            logs["optim/grad_norm"] = norm
        elif not bool(torch.isfinite(distributed.mean(logs["loss/total"]))):
            logs = {}  # nothing to be averaged over the epoch, on any worker
        if careful:
            logs["optim/skipped_steps"] = torch.tensor(float(skip), device=self.runtime.device)
        return logs

    def _pass(self, images: Tensor, ctx: StepContext, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward of one part of a step's batch; returns its logs, and adds to the gradients to be compared."""
        device, every = self.runtime.device, self.config.tasks.log_gradients_every
        # Randomness inside the model (drop path) is a function of seed, step and the first sample's place, which tells worker and
        # pass apart; nothing else draws from torch's generator.
        torch.manual_seed(rng.key(ctx.seed, "model", ctx.step, int(ctx.positions[0])) >> 1)
        with torch.no_grad():
            views = self.augment(images, ctx.epoch, ctx.positions)
            views = views.map(lambda view: view.contiguous(memory_format=self.layout))
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with nullcontext() if kind is None else torch.autocast(device.type, kind):
            out: Output = self.parallel(views, ctx)
        if ctx.step == 0 and ctx.positions[0] == 0:
            path = self.journal.folder / "views.png"
            seen = {"global": views.full, "local": views.local, **out.new_views}
            save_views(seen, self.augment.mean, self.augment.std, path)
        if every and ctx.step % every == 0:
            parts = {name: self.scaler.scale(part) for name, part in out.parts.items()}
            for name, gradient in encoder_gradients(parts, self.model.encoder).items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        self.scaler.scale(out.loss / ctx.passes).backward()
        return out.logs

    def _memory(self) -> dict[str, float]:
        """What this worker holds of its node's memory and, since the last call, held at most of its GPU's, in bytes."""
        found, device = {"memory/host_bytes": float(memory.host_bytes())}, self.runtime.device
        if device.type == "cuda":
            found["memory/device_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)
        return found

    def _check_finite(self, metrics: dict[str, float], epoch: int) -> None:
        if self.scaler.is_enabled() and not math.isfinite(metrics.get("optim/grad_norm", 0.0)):
            del metrics["optim/grad_norm"]  # a step whose scale was too large, and which the scaler left out
        bad = [key for key, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise RunFailed(
                f"{bad[0]} became {metrics[bad[0]]} in epoch {epoch + 1} (optim.lr {self.peak_lr:g})"
                + ("; the last checkpoint is kept" if epoch else "")
            )
        backing_off = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if "loss/total" not in metrics or (metrics.get("optim/skipped_steps") == 1.0 and not backing_off):
            raise RunFailed(
                f"every step of epoch {epoch + 1} had a non-finite gradient and was skipped (optim.lr {self.peak_lr:g})"
            )

    # --- evaluation --------------------------------------------------------------------------------------------------------

    def _evaluates(self, epoch: int) -> bool:
        every = self.config.evaluation.knn_every
        last = epoch + 1 == self.config.train.epochs
        return self.splits.validation is not None and every > 0 and ((epoch + 1) % every == 0 or last)

    def evaluate(self, epoch: int) -> dict[str, float]:
        """The measures on validation after an epoch (0-based), on rank 0."""
        bank, queries = self.splits.train, self.splits.validation
        assert queries is not None and bank.labels is not None and queries.labels is not None
        encoder, device = self.model.encoder, self.runtime.device
        features = [extract(encoder, part, self.augment, device, self.layout) for part in (bank, queries)]
        if not all(bool(torch.isfinite(part).all()) for part in features):
            raise RunFailed(f"the encoder's features are no longer finite (optim.lr {self.peak_lr:g})")
        if self.runtime.rank != 0:
            return {}
        labels = [torch.from_numpy(part).to(device) for part in (bank.labels, queries.labels)]
        probe = self.config.evaluation.linear and epoch + 1 == self.config.train.epochs
        kind = torch.bfloat16 if self.config.evaluation.knn_bf16 else torch.float32
        return measure(features[0], labels[0], features[1], labels[1], probe, kind)

    def export(self) -> None:
        """The student encoder alone, with what is needed to use it beside it."""
        config = self.config
        about = {
            "encoder": config.encoder.name,
            "stem": config.encoder.stem,
            "patch_size": config.encoder.patch_size,
            "norm": config.model.norm,
            "image_size": config.data.image_size,
            "mean": self.augment.mean,
            "std": self.augment.std,
        }
        save_encoder(self.model.encoder, about, self.journal.folder)
