"""The training loop. It runs in a small Runtime: LocalRuntime of rotssl.engine.runtime, or RayRuntime in a Ray Train worker."""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from rotssl import config as cfg
from rotssl.base import distributed, memory, rng
from rotssl.base.precision import HALF, autocast
from rotssl.base.step import StepContext
from rotssl.config import ResolvedConfig
from rotssl.config.methods import METHODS
from rotssl.data.augment import Augment
from rotssl.data.datasets import Splits, normalization
from rotssl.data.images import sketch
from rotssl.data.loader import Loader
from rotssl.data.views_grid import save_views
from rotssl.engine import hardware, midway, opening, resume
from rotssl.engine.alarm import Alarm
from rotssl.engine.averages import Averages, check_finite
from rotssl.engine.breakdown import Breakdown
from rotssl.engine.evaluator import Evaluator
from rotssl.engine.events import Facts, Missing, Note, StepDone
from rotssl.engine.flops import epoch_flops
from rotssl.engine.gradients import compare_gradients, encoder_gradients
from rotssl.engine.guard import Guard
from rotssl.engine.midway import Begun, Clock
from rotssl.engine.optim import build_optimizer, schedule_rates
from rotssl.engine.pretrainer import Output, Pretrainer, build_pretrainer
from rotssl.engine.recorder import Cost, EpochRecorder
from rotssl.engine.runtime import Runtime
from rotssl.evaluation.protocol import protocols
from rotssl.models.encoders import facts, save_encoder
from rotssl.runs import checkpoint
from rotssl.runs.journal import Journal


class Trainer:
    """One worker of one run.

    Args:
        config: resolved.
        splits: the images.
        runtime: environment that this runs in.
        journal: points of the run; only rank 0 writes.

    Raises:
        RunFailed: ``train.compile`` is set, but there is no compiler.
    """

    def __init__(self, config: ResolvedConfig, splits: Splits, runtime: Runtime, journal: Journal) -> None:
        self.config, self.splits, self.runtime, self.journal = config, splits, runtime, journal
        train, device = config.train, runtime.device
        hardware.be_deterministic(train.deterministic)
        if device.type == "cpu":
            memory.tune_malloc()
        self.model: Pretrainer = build_pretrainer(config, device)
        self.layout = torch.channels_last if train.channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=hardware.weight_layout(device, self.layout))
        if train.compile:
            hardware.require_compiler(device)
            self.model.compile_networks()
        method = self.model.method
        constant = [p for name in method.constant_lr for p in method.get_submodule(name).parameters()]
        self.precision = hardware.precision(config, device)
        if (device.type, self.precision) == ("cpu", "bf16"):
            for layer in self.model.modules():
                if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and max(layer.kernel_size) > 1:
                    layer.register_forward_pre_hook(hardware.refuse_one_pixel)
        self.optimizer = build_optimizer(self.model, config.optim, constant)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        # Whether a step may be skipped because its gradient is not finite; decided on the device, without a host sync.
        self.guarded = train.on_nan == "skip" or self.scaler.is_enabled()
        self.breakdown = Breakdown(device)
        self._one = torch.ones((), device=device)  # a backward pass begins with it, and else makes its own
        self.parallel = runtime.wrap(self.model)
        normal, own = normalization(config.data.name), self.model.own_crops()
        self.augment = Augment(config.views, config.data.image_size, *normal, train.seed, own)
        if train.compile and device.type == "cuda":  # on CPUs sorted samples are faster
            self.augment.compile()
        ours = runtime.rank, runtime.world_size, self.augment, opening.labels_of(config, splits)
        self.loader = Loader(config, splits.train.images, device, *ours)
        self.steps_per_epoch, self.total_steps = self.loader.steps_per_epoch, self.loader.total_steps
        self.recorder = EpochRecorder(journal, runtime, train.keep_every, train.save_every)
        self.alarm = Alarm(train.on_collapse, journal.points, runtime)
        self.clock = Clock(train.save_minutes, device, journal.folder / checkpoint.ASKED)
        self.end = min(train.epochs, train.stop_after or train.epochs)
        self.warmup = round(config.optim.warmup_epochs * self.steps_per_epoch)
        steps = config.tasks.guard
        self.guard = Guard(dict(self.model.named_tasks()), steps and self.warmup + steps, steps // 2)
        self.model.off = self.guard.off
        self.images = sketch(splits.train, splits.classes)
        self.evaluator = Evaluator(config, splits, self.augment, self.layout, self.precision, runtime)

    def facts(self) -> dict[str, str]:
        """Facts that the configuration leaves open, for the tags of the run."""
        found = {"precision": self.precision, "evaluation_precision": self.evaluator.precision}
        found |= {"device": self.runtime.device.type, "knn_k": str(self.evaluator.neighbours)}
        if self.splits.test is not None:
            found |= protocols(self.config.evaluation, "test")
        return found | ({"switched_off": "; ".join(self.guard.off.values())} if self.guard.off else {})

    def state(self, epoch: int, begun: Begun | None = None) -> dict[str, Any]:
        """Everything that the next step needs, as plain values and tensors.

        Args:
            epoch: number of epochs done.
            begun: what has been done of the next one, if it is saved within it.
        """
        return {
            **({} if begun is None else {"within": vars(begun)}),
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "balance": self.model.balance.state(),
            "guard": self.guard.state(),
            "cost": vars(self.recorder.cost),
            "config": json.dumps(cfg.to_dict(self.config)),
            "images": self.images,
        }

    def restore(self, state: dict[str, Any]) -> int:
        """Restore a state; returns the number of epochs done.

        Raises:
            RunFailed: the state belongs to other images or to another model.
        """
        opening.check_images(self.splits, self.images, state, self.journal.folder)
        with resume.fitting(self.journal.folder, state):
            resume.load_tensors(self.model, self.optimizer, state)
            self.scaler.load_state_dict(state["scaler"])
            self.model.balance.restore(state.get("balance", {}))
            self.guard.restore(state.get("guard", {}), self.runtime.device)
            self.recorder.resume(Cost(**state["cost"]))
        return int(state["epoch"])

    def run(self) -> None:
        """Train to the end, or to ``train.stop_after``, from the newest checkpoint if there is one.

        Raises:
            RunFailed: a loss or gradient became infinite or NaN; a step does not fit into memory; views shrink to one pixel in
                bf16 on a CPU; the checkpoint belongs to another run.
        """
        train = self.config.train
        state = resume.newest(self.journal.folder, self.config)
        resume.begin(self.model, train.init_from if state is None else None)
        self.recorder.resume(Cost())
        done, begun = self.restore(state) if state is not None else 0, Begun.of(state)
        resume.agree(done, begun.step, self.runtime.device)
        if self.runtime.rank == 0 and self.splits.record is not None:
            self.splits.record.save(self.journal.folder)
        for line in opening.lines(self.splits, self.config, self.runtime.device.type, done, begun.step):
            self.runtime.progress(Note(line))
        self.runtime.progress(Facts(self.facts()))
        with self.recorder:
            if done:
                self._evaluate_late(done - 1)
            for epoch in range(done, self.end):
                self._epoch(epoch, begun if epoch == done else Begun(), first=epoch == done)
        if self.end == train.epochs and self.runtime.rank == 0:
            self.export()
            last = self.journal.point(train.epochs) or {}
            self.runtime.progress(Missing(sorted(self.evaluator.wanted(train.epochs - 1) - last.keys())))

    def _epoch(self, epoch: int, begun: Begun, first: bool) -> None:
        """Train an epoch from where it was begun, save it, evaluate it and report it; ``first``: of this start."""
        train, started = self.config.train, time.perf_counter()
        with hardware.enough_memory(train.batch_size, METHODS[self.config.method.name].per_image, self._attempt):
            metrics = self._train_epoch(epoch, begun)
        distributed.broadcast_running_stats(self.model)
        seconds = begun.seconds + time.perf_counter() - started
        metrics["throughput/input_wait"] /= seconds
        backing_off = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        with self.breakdown.noted(self.journal.folder) as step:
            check_finite(metrics, self.config, epoch, self.steps_per_epoch, backing_off, step)
        samples = self.steps_per_epoch * train.batch_size
        guard = self.guard
        rank_0 = self.runtime.rank == 0
        flops = epoch_flops(self.config, epoch, self.steps_per_epoch, guard.off, guard.at) if rank_0 else 0.0
        metrics.update(self.recorder.book(epoch, samples, seconds, flops, begun.seconds))
        metrics["throughput/images_per_second"] = samples / seconds
        metrics["optim/lr"] = self.optimizer.param_groups[0]["lr"]
        # All workers ask the clock, which asks all of them.
        save = (train.save_every != 1 and self.clock.due()) or self.recorder.due(epoch)
        save = save or first or epoch + 1 == self.end
        self.recorder.keep(epoch, metrics, self.state(epoch + 1) if save else None)
        if save:
            self.clock.restart()
        found: dict[str, float] = {}
        if self.evaluator.due(epoch, seconds - begun.seconds, self.recorder.saving):
            if first or epoch + 1 == train.epochs:
                # Running out of memory usually happens at the first evaluation or at the probe, and may kill the process: save
                # this epoch first, so that the next start does not repeat it and fail in the same way.
                self.recorder.wait_for_checkpoint()
                float(distributed.mean(torch.zeros((), device=self.runtime.device)))  # the others wait for rank 0
            skipped = round(metrics.get("optim/skipped_steps", 0.0) * self.steps_per_epoch)
            found = self.evaluate(epoch, skipped)
        self.recorder.finish(epoch, metrics, self._done(epoch), found)
        self.alarm.see(epoch + 1, metrics | found)

    def _done(self, epoch: int) -> StepDone:
        return StepDone(epoch + 1, (epoch + 1) * self.steps_per_epoch, self.total_steps)

    def _evaluate_late(self, epoch: int) -> None:
        """Add the measures that the previous start did not make on its last epoch."""
        point = self.journal.point(epoch + 1)
        missing = point is not None and bool(self.evaluator.wanted(epoch) - point.keys())
        if float(distributed.mean(torch.tensor(float(missing), device=self.runtime.device))) > 0:
            found = self.evaluate(epoch)
            if found:
                self.recorder.amend(epoch, found, self._done(epoch))

    def _train_epoch(self, epoch: int, begun: Begun) -> dict[str, float]:
        """One pass over the training images, or the rest of it; returns the means over steps and workers."""
        self.parallel.train()
        averages = Averages(self._may_break)
        if begun.averages is not None:
            averages.restore(begun.averages, self.runtime.device)
        started = shown = time.perf_counter()
        waited = self.loader.waited - begun.waited
        for i, (images, ctx) in enumerate(self.batches(epoch, begun.step), begun.step):
            averages.add(self.step(images, ctx))
            if i + 1 < self.steps_per_epoch and (i + 1) % midway.LOOK == 0:
                if self.breakdown.step is not None:
                    break  # _epoch says so
                if self.clock.due():
                    seconds = begun.seconds + time.perf_counter() - started
                    so_far = Begun(i + 1, seconds, self.loader.waited - waited, averages.state())
                    self.recorder.keep_within(self.state(epoch, so_far))
            if time.perf_counter() - shown > 0.5 or i == begun.step:
                shown = time.perf_counter()
                if self.runtime.rank == 0:
                    self.recorder.note(shown - started)
                self.recorder.announce()
                self.runtime.progress(StepDone(epoch + 1, ctx.step + 1, self.total_steps))
        waited = self.loader.waited - waited
        averages.add({"throughput/input_wait": torch.tensor(waited).to(self.runtime.device)})
        return averages.means()  # one collective, and the only place where the host waits for the device

    def _may_break(self, name: str) -> bool:
        """Whether this metric may be non-finite in a step; with fp16, too large a scale breaks gradients, never a loss."""
        return self.config.train.on_nan == "skip" or (self.scaler.is_enabled() and "grad_" in name)

    def batches(self, epoch: int, begin: int = 0) -> Iterator[tuple[Tensor, StepContext]]:
        """This worker's uint8 images of each step from ``begin`` on, with the step's context."""
        return self.loader.batches(epoch, begin)

    def set_rates(self, ctx: StepContext) -> None:
        """Set the learning rate and the weight decay of a step."""
        schedule_rates(self.optimizer, self.config.optim, ctx, self.total_steps, self.warmup)

    def step(self, images: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Take one step of the optimizer; returns the scalars to log, on the device."""
        self.set_rates(ctx)
        logs = self.update(images, ctx)
        for reason in self.guard.see(ctx, logs):
            self.runtime.progress(Note(reason))
            self.runtime.progress(Facts(self.facts()))
        return logs | {f"{name}/off": torch.ones_like(logs["optim/grad_norm"]) for name in self.guard.off}

    def update(self, images: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """The part of a step that the device does, at the rates that the optimizer has."""
        clip = self.config.optim.clip_norm
        held = [*self.model.buffers(), *self.model.method.parameters()] if self.guarded else []
        before = [value.detach().clone() for value in held]
        self.optimizer.zero_grad(set_to_none=True)
        logs, gradients = dict[str, Tensor](), dict[str, Tensor]()
        each = len(images) // ctx.passes
        for first in range(0, len(images), each):
            part, last = ctx.part(first, first + each), first + each == len(images)
            with self.parallel.no_sync() if isinstance(self.parallel, DDP) and not last else nullcontext():
                found = self._pass(images[first : first + each], part, gradients)
            for key, value in found.items():
                logs[key] = logs[key] + value if key in logs else value
        if gradients:
            logs.update(compare_gradients(gradients))
        self.scaler.unscale_(self.optimizer)
        self.model.method.after_backward(ctx)
        params = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
        logs["optim/grad_norm"] = norm
        skipped = None
        if self.guarded:
            skipped = ~torch.isfinite(norm)
            logs["optim/skipped_steps"] = skipped.float()
            # Fused optimizers and LARS then keep weights and moments. (The scaler's own step would too, but syncs for others.)
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        else:  # from the step that breaks down on, weights and moments stay as they were before it
            self.optimizer.found_inf = self.breakdown.see(ctx.step, norm)  # type: ignore[attr-defined]
        self.optimizer.step()
        logs.update(self.model.after_step(ctx, skipped))
        if skipped is not None:
            # Undo the updates of running statistics and of the method, which saw the broken batch.
            for value, kept in zip(held, before, strict=True):
                value.detach().copy_(kept.where(skipped, value.detach()))
        self.scaler.update()
        return logs

    def _pass(self, images: Tensor, ctx: StepContext, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward pass of one part of a step's batch; returns its logs and adds to the gradients to compare."""
        device, every = self.runtime.device, self.config.tasks.log_gradients_every
        # Randomness inside the model (drop path) is a function of seed, step and the first sample's position, which identifies
        # worker and pass; nothing else draws from torch's generator.
        if self.config.encoder.name.startswith("timm/"):  # some of timm's drop without being asked to
            torch.manual_seed(rng.key(ctx.seed, "model", ctx.step, int(ctx.positions[0])) >> 1)
        with torch.no_grad():
            views = self.augment(images, ctx)
            views = views.map(lambda view: view.contiguous(memory_format=self.layout))
        with autocast(device, HALF.get(self.precision)):
            out: Output = self.parallel(views, ctx)
        if ctx.step == 0 and ctx.positions[0] == 0:
            path = self.journal.folder / "views.png"
            seen = {"global": views.full, "local": views.local, **out.new_views}
            save_views(seen, self.augment.mean, self.augment.std, path)
        if every and ctx.step % every == 0:
            parts = {name: self.scaler.scale(part) for name, part in out.parts.items()}
            with self.model.balance.pause():
                found = encoder_gradients(parts, self.model.encoder)
            for name, gradient in found.items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        loss = out.loss if ctx.passes == 1 else out.loss / ctx.passes
        self.scaler.scale(loss).backward(self._one.to(loss.dtype))
        logs = {**out.logs, **views.logs}
        return logs if ctx.passes == 1 else {key: value / ctx.passes for key, value in logs.items()}

    def _attempt(self, count: int) -> None:
        """Compute a step of so many images, without changing weights."""
        images, ctx = next(self.batches(0))
        self.optimizer.zero_grad(set_to_none=True)
        part = dataclasses.replace(ctx.part(0, count), batch_size=count, passes=1)
        self._pass(images[:count], part, {})

    def evaluate(self, epoch: int, skipped: int = 0) -> dict[str, float]:
        """The measures of an epoch (0-based), ``skipped`` of whose steps were skipped; see Evaluator."""
        return self.evaluator.evaluate(self.model.chosen(self.config.evaluation.network), epoch, skipped)

    def export(self) -> None:
        """Save the encoder that is evaluated, with the facts that are needed to use it."""
        about = facts(self.config) | {"stored": self.splits.train.images.shape[2:]}
        save_encoder(self.model.chosen(self.config.evaluation.network), about, self.journal.folder)
