"""Fitting: the one training loop, on which fine-tuning, distillation and QAT stand.

    fit(module, groups, loss, data, Recipe(epochs=3, lr=0.01, batch_size=128))

A step draws a global batch, sums the loss over its samples, divides by their number, and lets the
optimiser step. Everything random is a function of the seed and the position: the order of samples
of (seed, epoch), what the module draws of (seed, step, process). So nothing random needs saving,
and a run that was killed continues from its checkpoint to bit-identical results.

Under ``torchrun`` each process takes every n-th sample of the global batch; gradients are summed
and divided by the global batch, ragged last batches included. The result is that of one process to
rounding, whatever the number of processes, and so is it for ``accumulate``. Two things cannot
keep that promise: a batch norm in training mode, whose statistics would be each process's own, is
refused; dropout draws other numbers.

The learning rate of step t (from 0) of T, after w warm-up steps, with u = (t - w) / (T - w):

    warm-up   lr (t + 1) / (w + 1)
    constant  lr
    cosine    lr (1 + cos(pi u)) / 2      (Loshchilov and Hutter, ICLR 2017, equation 5, one cycle)
    step      lr drop^k                   k = how many of ``drops`` are <= u
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from pruna_ir.call import bind_arguments
from pruna_ir.data import Batch
from pruna_ir.errors import PassError, UsageError
from pruna_ir.processes import processes
from pruna_ir.samples import Samples
from pruna_ir.transform import Progress, no_progress

Optimizer = Literal["sgd", "adam", "adamw"]

Loss = Callable[[Batch], torch.Tensor]
"""Maps a batch to one figure a sample, [n], differentiable in what is trained."""


@dataclass(frozen=True)
class Recipe:
    """How to train; passes that train inherit these options.

    Options:
        epochs: how often to go over the data.
        steps: how many optimiser steps to take instead; 0 for whole epochs.
        batch_size: samples a step, over all processes; 0 takes the data's own batch size.
        lr: the learning rate at its highest.
        schedule: how it falls: ``cosine``, ``step`` or ``constant``.
        warmup: steps in which it rises to ``lr``.
        drops: for ``step``: the shares of the run after which it falls.
        drop: for ``step``: the factor by which it falls.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: of SGD.
        weight_decay: of weights; vectors (biases, norms, scales) are left alone.
        accumulate: in how many parts a process runs its share of a batch, to save memory.
        clip: the largest norm of all gradients together; 0 for any.
        checkpoint: the file to continue from and to write; empty for none.
        checkpoint_every: after how many steps it is written; 0 for once an epoch.
    """

    epochs: int = 1
    steps: int = 0
    batch_size: int = 0
    lr: float = 0.01
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: int = 0
    drops: tuple[float, ...] = (0.5, 0.75)
    drop: float = 0.1
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    accumulate: int = 1
    clip: float = 0.0
    checkpoint: str = ""
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not value >= least or not math.isfinite(value):
                raise UsageError(f"{name} must be at least {least}, not {value}")
        if self.lr == 0.0:
            raise UsageError("lr must be above 0: nothing would be trained")
        if any(not 0.0 <= share <= 1.0 for share in self.drops):
            raise UsageError(f"drops are shares of the run, between 0 and 1, not {self.drops}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, of so many in all.

        >>> recipe = Recipe(lr=1.0, warmup=1)
        >>> [round(recipe.rate(step, 5), 3) for step in range(5)]
        [0.5, 1.0, 0.854, 0.5, 0.146]
        """
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(steps - self.warmup, 1)
        if self.schedule == "cosine":
            return self.lr * (1.0 + math.cos(math.pi * done)) / 2.0
        if self.schedule == "step":
            return self.lr * self.drop ** sum(share <= done for share in self.drops)
        return self.lr


_LEAST: dict[str, float] = {
    "epochs": 1, "steps": 0, "batch_size": 0, "lr": 0.0, "warmup": 0, "drop": 0.0,
    "momentum": 0.0, "weight_decay": 0.0, "accumulate": 1, "clip": 0.0, "checkpoint_every": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Parameters that share their learning rate, ``lr`` times the recipe's, and weight decay."""

    parameters: tuple[nn.Parameter, ...]
    lr: float = 1.0
    decay: bool = False


def decay_groups(parameters: Sequence[nn.Parameter]) -> list[Group]:
    """Two groups: weights (two dimensions or more), which decay, and vectors, which do not.

    >>> [len(group.parameters) for group in decay_groups(list(nn.Linear(2, 3).parameters()))]
    [1, 1]
    """
    weights = tuple(p for p in parameters if p.dim() > 1)
    vectors = tuple(p for p in parameters if p.dim() <= 1)
    return [Group(weights, decay=True), Group(vectors)]


# -- the loop ------------------------------------------------------------------------------------


@dataclass
class Fitted:
    """What a run did: its steps, and the mean loss of each epoch as it was trained."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)


def fit(
    module: nn.Module,
    groups: Sequence[Group],
    loss: Loss,
    data: Samples,
    recipe: Recipe,
    *,
    seed: int = 0,
    identity: str = "",
    progress: Progress = no_progress,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Train the parameters of ``groups`` in place until the recipe is through.

    Args:
        module: what holds the parameters; its state goes into the checkpoint.
        groups: what is trained.
        loss: one figure a sample, computed with ``module``.
        data: what to train on.
        recipe: how; its batch size must be set.
        seed: of the order of samples and of what the module draws.
        identity: what else the result depends on; a checkpoint of another is refused.
        progress: called after each step.
        after_step: called after each step of the optimiser: projections belong here.
        after_epoch: called after each epoch with its number, from 1, and its mean loss; not
            called for epochs that lie before the checkpoint.

    Raises:
        UsageError: there is no sample or nothing to train, the checkpoint belongs to another run,
            or several processes train a batch norm.
        PassError: the loss became NaN or infinite.

    >>> from pruna_ir.samples import Held
    >>> layer = nn.Linear(1, 1)
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> line = lambda batch: (layer(batch.inputs[0]) - 3 * batch.inputs[0]).square().mean(1)
    >>> groups = decay_groups(list(layer.parameters()))
    >>> done = fit(layer, groups, line, Held((x,)), Recipe(steps=100, lr=0.1, batch_size=8))
    >>> done.steps, round(layer.weight.item(), 1)
    (100, 3.0)
    """
    run = _Run(module, groups, loss, data, recipe, seed, identity)
    run.resume()
    with torch.random.fork_rng(devices=[]), freed_memory_kept():
        while run.state.step < run.steps:
            epoch, total = run.epoch, run.step()
            if after_step is not None:
                after_step()
            progress(f"train: epoch {epoch + 1}, loss {total:.4g}", run.state.step, run.steps)
            ended = run.end_epoch()
            run.save(ended=ended)
            if ended and after_epoch is not None:
                after_epoch(len(run.state.losses), run.state.losses[-1])
    return Fitted(run.state.step, list(run.state.losses))


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the C library keep memory that is freed inside, for the next step to use.

    By default glibc gives the top of the heap back at the end of each step; having it mapped again
    costs a quantised step a fifth of its time. Other C libraries are left as they are.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM)
        library.malloc_trim(0)


# From glibc's malloc.h and the limits that mallopt(3) states.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD, _DEFAULT_TRIM = 32 << 20, 64 << 20


@dataclass
class _State:
    """Where a run stands, besides module and optimiser."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    sum: float = 0.0
    samples: int = 0


class _Run:
    """One run of `fit`: position, optimiser, and the numbers that follow from the recipe."""

    def __init__(
        self, module: nn.Module, groups: Sequence[Group], loss: Loss, data: Samples,
        recipe: Recipe, seed: int, identity: str,
    ) -> None:  # fmt: skip
        self._module, self._loss, self._data = module, loss, data
        self._recipe, self._seed = recipe, seed
        self._among = processes()
        self._parameters = [p for group in groups for p in group.parameters]
        self.state = _State()
        self._check()
        self._per_epoch = -(-data.count // recipe.batch_size)
        self.steps = recipe.steps or recipe.epochs * self._per_epoch
        self._optimizer = _optimizer(groups, recipe)
        self._factors = [group.lr for group in groups if group.parameters]
        self._order = (-1, torch.arange(0))
        self._key = _key(recipe, identity, seed, data.count)
        self._among.agree([*module.parameters(), *module.buffers()])

    def _check(self) -> None:
        if not self._data.count:
            raise UsageError("the training data holds no sample")
        if not self._parameters:
            raise UsageError("there is nothing to train: no group has a parameter")
        if self._recipe.batch_size < 1:
            raise UsageError("batch_size must be set; give for example batch_size=32")
        if self._among.count > 1 and (norm := _training_norm(self._module)):
            raise UsageError(
                f"{norm} is a batch norm in training mode, whose statistics would be each of the "
                f"{self._among.count} processes' own; freeze it, fold it (fold-batch-norm) or "
                "train in one process"
            )

    @property
    def epoch(self) -> int:
        """The number of the epoch, from 0, that the next step belongs to."""
        return self.state.step // self._per_epoch

    def step(self) -> float:
        """Train on the next batch; returns its mean loss."""
        step, recipe = self.state.step, self._recipe
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = factor * recipe.rate(step, self.steps)
        torch.manual_seed(_mixed(self._seed, "step", step, self._among.rank))
        if self._order[0] != self.epoch:
            self._order = (self.epoch, _order(self._seed, self.epoch, self._data.count))
        order = self._order[1]
        start = step % self._per_epoch * recipe.batch_size
        batch = order[start : start + recipe.batch_size]
        self._optimizer.zero_grad()
        total = self._gather(self._backward(self._among.share(batch), len(batch)))
        if not math.isfinite(total):
            raise PassError(self._diverged(total))
        if recipe.clip:
            nn.utils.clip_grad_norm_(self._parameters, recipe.clip)
        self._optimizer.step()
        self.state.step += 1
        self.state.sum += total * len(batch)
        self.state.samples += len(batch)
        return total

    def _backward(self, indices: torch.Tensor, size: int) -> float:
        """Add the gradients of some samples' losses over the global batch size; returns these."""
        total = 0.0
        for part in indices.tensor_split(min(self._recipe.accumulate, max(len(indices), 1))):
            if len(part):
                loss = self._loss(self._data.gather(part, self.epoch)).sum() / size
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total

    def _gather(self, loss: float) -> float:
        """Sum gradients and loss over the processes."""
        if self._among.count == 1:
            return loss
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat = torch.cat([*(g.reshape(-1).double() for g in parts), torch.tensor([loss]).double()])
        self._among.sum(flat)
        *sums, total = torch.split(flat, [*(g.numel() for g in parts), 1])
        for parameter, found in zip(self._parameters, sums, strict=True):
            parameter.grad = found.reshape(parameter.shape).to(parameter.dtype)
        return float(total)

    def _diverged(self, loss: float) -> str:
        recipe, step = self._recipe, self.state.step
        kept = f"; {recipe.checkpoint} keeps an earlier state" if recipe.checkpoint else ""
        return (
            f"the training loss became {loss} in step {step + 1} of {self.steps}, at learning "
            f"rate {recipe.rate(step, self.steps):.3g}; lower lr, or bound the gradients with "
            f"clip=1.0{kept}"
        )

    def end_epoch(self) -> bool:
        """Whether an epoch, or the run, ended with the last step; if so its mean loss is kept."""
        state = self.state
        if state.step % self._per_epoch and state.step < self.steps:
            return False
        state.losses.append(state.sum / state.samples)
        state.sum, state.samples = 0.0, 0
        return True

    # -- checkpoints -----------------------------------------------------------------------

    def save(self, *, ended: bool) -> None:
        """Write the checkpoint where it is due: to a file beside it, which is then renamed."""
        every, state = self._recipe.checkpoint_every, self.state
        due = ended if not every else state.step % every == 0 or state.step == self.steps
        if not (self._recipe.checkpoint and due and self._among.first):
            return
        path = Path(self._recipe.checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        torch.save(
            {
                "key": self._key, "position": dict(vars(state)),
                "module": self._module.state_dict(), "optimizer": self._optimizer.state_dict(),
            },
            partial,
        )  # fmt: skip
        partial.replace(path)

    def resume(self) -> None:
        """Continue from the checkpoint, where there is one."""
        path = Path(self._recipe.checkpoint)
        if not self._recipe.checkpoint or not path.exists():
            return
        found = _read(path)
        for name, value in self._key.items():
            if found["key"].get(name) != value:
                raise UsageError(
                    f"{path} belongs to another run: its {name} is {found['key'].get(name)}, here "
                    f"it is {value}; name another checkpoint, or remove it to start anew"
                )
        self._module.load_state_dict(found["module"])
        self._optimizer.load_state_dict(found["optimizer"])
        self.state = _State(**found["position"])


def _optimizer(groups: Sequence[Group], recipe: Recipe) -> torch.optim.Optimizer:
    settings = [
        {"params": list(g.parameters), "weight_decay": recipe.weight_decay if g.decay else 0.0}
        for g in groups
        if g.parameters
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=recipe.lr, momentum=recipe.momentum)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(settings, lr=recipe.lr)


_FREE = ("checkpoint", "checkpoint_every", "accumulate")
"""Options that a run may change when it continues."""


def _key(recipe: Recipe, identity: str, seed: int, samples: int) -> dict[str, str]:
    """What a checkpoint must agree on with the run that continues from it."""
    options = {f.name: repr(getattr(recipe, f.name)) for f in fields(Recipe)}
    kept = {name: text for name, text in options.items() if name not in _FREE}
    return {**kept, "program": identity, "seed": str(seed), "number of samples": str(samples)}


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found["key"], found["position"], found["module"], found["optimizer"]
    except Exception as error:
        raise UsageError(
            f"{path} is no checkpoint of a training run; name another file: {error}"
        ) from error
    return found


def _mixed(seed: int, *position: object) -> int:
    """A seed for a position in a run; those of different positions are unrelated."""
    digest = hashlib.sha256(repr((seed, *position)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _order(seed: int, epoch: int, samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_mixed(seed, "epoch", epoch))
    return torch.randperm(samples, generator=generator)


def _training_norm(module: nn.Module) -> str:
    """A batch norm that would take its statistics from the batch; empty where there is none."""
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if node.op == "call_function" and "batch_norm" in str(node.target):
                bound = bind_arguments(node)
                if bound.get("training") or bound.get("running_mean") is None:
                    return str(node.name)
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            return str(name)
    return ""
