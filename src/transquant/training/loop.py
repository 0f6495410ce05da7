"""The loop: steps of an optimizer over epochs, whatever happens in between.

batch ─ micro-batches ─ loss ─ gradients ─┬─ summed up ─ clipped ─ Adam ─┬─ Moment
                         network.penalty ─┘                             └─ now and then a checkpoint
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transquant.errors import InputError
from transquant.guard import unchanged
from transquant.modules import run_batch
from transquant.processes import Processes
from transquant.training.checkpoint import Checkpoints
from transquant.training.distributed import Buffers, Share, shares, summed
from transquant.training.feed import Batch, Feed, cut, length
from transquant.training.hints import Hints
from transquant.training.history import Epoch, Moment, impatient
from transquant.training.network import SoftNetwork
from transquant.training.randomness import seed_all
from transquant.training.recipe import Recipe

EVERY = 30.0  # seconds between two checkpoints, at least
_log = logging.getLogger("transquant")


@dataclass(slots=True)
class Tally:
    """Sums over the samples of an epoch so far. `hits` is negative where labels are no classes."""

    loss: float = 0.0
    hits: float = 0.0
    samples: int = 0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Top-1 in per cent."""
        return 100 * self.hits / self.samples if self.samples and self.hits >= 0 else None


class Loop:
    """A prepared `model` in training. What `state` gives and `load` takes is all that a later step depends on."""

    def __init__(
        self, model: nn.Module, network: SoftNetwork, teacher: nn.Module | None, feed: Feed, recipe: Recipe, job: Processes,
        checkpoints: Checkpoints | None, watch: Callable[[Moment], None],
    ) -> None:  # fmt: skip
        self.model, self.network, self.teacher, self.feed, self.recipe = model, network, teacher, feed, recipe
        self.job, self.checkpoints, self.watch = job, checkpoints, watch
        self.steps = recipe.epochs * feed.count
        self.optimizer = torch.optim.Adam(network.parameter_groups(recipe.rate, recipe.vector_rate))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.buffers = Buffers(model)
        self.hints = Hints(model, teacher, recipe.hints) if teacher is not None and recipe.hints else None
        self.history: list[Epoch] = []
        self.tally = Tally()

    def run(self, save: Callable[[], None]) -> bool:
        """Train until the end, or until patience does; whether that was early. `save` keeps a checkpoint.

        Raises InputError where the loss is no longer a number, and for bad data; TargetError."""
        self.model.train()
        while self.network.step < self.steps:
            if self._impatient():
                return True
            self._epoch(self.network.step // self.feed.count, self.network.step % self.feed.count, save)
        return False

    def state(self) -> dict[str, Any]:
        """Numbers, and tensors by name."""
        optimizer = self.optimizer.state_dict()["state"]
        return {
            "model": self.model.state_dict(),
            "optimizer": {str(k): state for k, state in optimizer.items()},
            "network": self.network.state(),
            "first_price": self.network.price.first,
            "history": [asdict(epoch) for epoch in self.history],
            "tally": asdict(self.tally),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The mirror of `state`."""
        self.network.load(state["network"])
        self.network.price.first = state["first_price"]
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {int(k): s for k, s in state["optimizer"].items()}, "param_groups": groups})
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.tally = Tally(**state["tally"])

    def _epoch(self, epoch: int, skip: int, save: Callable[[], None]) -> None:
        before = saved = time.monotonic()
        for number, batch in enumerate(self.feed.epoch(epoch, skip), skip + 1):
            self._step(batch)
            now = time.monotonic()
            self.tally.seconds, before = self.tally.seconds + now - before, now
            self.watch(self._moment(epoch))
            if number < self.feed.count and now - saved >= EVERY:
                save()
                saved = now
        score = self._score()
        moment = self._moment(epoch)
        seconds = self.tally.seconds + time.monotonic() - before
        self.history.append(Epoch(epoch + 1, moment.step, moment.loss, moment.accuracy, score, moment.bytes, moment.price, seconds))
        _log.info("%s", self.history[-1])
        self.tally = Tally()
        save()

    def _step(self, batch: Batch) -> None:
        recipe, network, step = self.recipe, self.network, self.network.step
        share = network.share
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.zero_grad()
        samples = length(batch)
        own = shares(samples, recipe.micro_batches, self.job)
        loss = hits = 0.0
        alone = recipe.micro_batches == 1
        if not alone:
            self.buffers.begin()
        for part in own:
            seed_all("step", recipe.seed, step, part.number)
            value, right = self._forward(batch if alone else (cut(batch[0], *_ends(part)), cut(batch[1], *_ends(part))))
            (value * part.weight).backward()  # type: ignore[no-untyped-call]
            loss, hits = loss + float(value.detach()) * part.weight, hits + right * (part.weight > 0)
            if not alone:
                self.buffers.add(part.weight, part is own[-1])
        sums, (loss, hits) = summed(self.parameters, self.buffers.sums, (loss, hits), self.job)
        if not alone:
            self.buffers.end(sums)
        if not isfinite(loss):
            self._diverged(step, "loss", loss)
        penalty = network.penalty()
        if penalty.requires_grad:
            penalty.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not isfinite(norm):
            self._diverged(step, "gradient's norm", float(norm))
        if recipe.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, recipe.clip, norm)
        self.optimizer.step()
        tally = self.tally
        tally.loss, tally.hits, tally.samples = tally.loss + loss * samples, tally.hits + hits, tally.samples + samples

    def _forward(self, batch: Batch) -> tuple[Tensor, float]:
        """Loss of a micro-batch, a mean over its samples, and how many it has right (−1 where labels are no classes)."""
        recipe, (inputs, labels) = self.recipe, batch
        device = self.parameters[0].device
        if recipe.channels_last and isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        labels = labels.to(device) if isinstance(labels, Tensor) else labels
        with self._precision(device.type), nullcontext() if self.hints is None else self.hints.seen():
            output = run_batch(self.model, inputs, recipe.forward, recipe.output, finite=False)
            if self.teacher is not None:
                with torch.no_grad():
                    taught = run_batch(self.teacher, inputs, recipe.forward, recipe.output, finite=False)
        output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        loss = self._task(output, labels)
        if self.teacher is not None:
            heat = recipe.temperature
            loss = (1 - recipe.distill) * loss + recipe.distill * heat**2 * _divergence(taught.to(output) / heat, output / heat)
        if self.hints is not None:
            loss = loss + self.network.share * recipe.hint * self.hints.loss()
        classes = (
            isinstance(labels, Tensor) and output.ndim == 2 and labels.shape == output.shape[:1] and not labels.is_floating_point()
        )
        return loss, float((output.argmax(1) == labels).sum()) if classes else -1.0

    def _task(self, output: Tensor, labels: Any) -> Tensor:
        try:
            loss = (self.recipe.loss or cross_entropy)(output, labels)
        except Exception as error:
            name = "cross-entropy" if self.recipe.loss is None else "loss"
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise InputError(f"{name} refuses outputs {tuple(output.shape)} with labels {shape}: {error}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise InputError(f"loss returned {type(loss).__name__}, expected a floating tensor with one value")
        return loss.reshape(())

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        return nullcontext() if self.recipe.autocast is None else torch.autocast(device, torch.bfloat16)

    def _score(self) -> float | None:
        evaluate = self.recipe.evaluate
        if evaluate is None:
            return None

        def scored() -> Any:
            with unchanged(self.model), torch.no_grad():
                return evaluate(self.model.eval())

        score = self.job.once(scored)
        if isinstance(score, bool) or not isinstance(score, Real) or not isfinite(score):
            raise InputError(f"evaluate returned {score!r}, expected a finite number, higher is better")
        return float(score)

    def _moment(self, epoch: int) -> Moment:
        network, tally = self.network, self.tally
        price = 0.0 if network.settled or network.target is None else network.price.now
        score = self.history[-1].score if self.history else None
        loss = tally.loss / max(tally.samples, 1)
        return Moment(epoch + 1, self.recipe.epochs, network.step, self.steps, loss, tally.accuracy, score, network.bytes, price)

    def _impatient(self) -> bool:
        sized = self.network.target is not None
        return impatient(self.history, self.recipe.patience, int(self.network.schedule.reached * self.steps) if sized else 0)

    def _diverged(self, step: int, what: str, value: float) -> None:
        """Raises InputError; the checkpoint of the very weights that came to this goes."""
        kept = "there is no work folder, so nothing is kept"
        if self.checkpoints is not None:
            if self.job.rank == 0:
                self.checkpoints.drop(step)
            steps = self.job.once(lambda: self.checkpoints.steps() if self.checkpoints else [])
            kept = f"the last good checkpoint is of step {steps[-1]}, in {self.checkpoints.path}" if steps else "nothing is kept"
        raise InputError(
            f"training stopped in step {step + 1} of {self.steps}, whose {what} is {value}: {kept}; "
            "a smaller rate or clip=1.0 may help"
        )


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """The mean over samples, and positions where there are some: outputs (N, C), (N, T, C) or (N, C, ...)."""
    if labels.ndim > 1 and labels.shape == output.shape[:-1]:
        output, labels = output.flatten(0, -2), labels.flatten()
    return functional.cross_entropy(output, labels)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student), a mean over all but the last dimension."""
    p, q = (t.reshape(-1, t.shape[-1]).log_softmax(1) for t in (teacher, student))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


def _ends(part: Share) -> tuple[int, int]:
    return part.first, part.last
