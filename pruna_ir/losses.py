"""Losses: one figure a sample, from labels, from a teacher's outputs, or from its features.

With z the student's scores, t the teacher's, and T the temperature:

    labels    -log softmax(z)[label]
    logits    T^2 KL(softmax(t / T) || softmax(z / T))        (Hinton et al., 2015, section 2)
    mse       mean of (z - t)^2, over all floating-point outputs
    features  mean of (a - b)^2 over mean of b^2, over the values of chosen modules

Each is averaged over the positions of a sample, so that samples weigh alike. Classes lie on
dimension 1 of scores with four dimensions or more (images of scores), else on the last. Labels
and logits read the program's first output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from pruna_ir.data import Batch
from pruna_ir.errors import UsageError
from pruna_ir.program import Program, dtype_of, module_path, shape_of
from pruna_ir.registry import unknown

Runs = Callable[..., Sequence[Tensor]]
"""A module that maps positional inputs to outputs."""


@dataclass(frozen=True)
class LossOptions:
    """Which losses, with which weights; passes that train inherit these options.

    Options:
        labels: the weight of the cross entropy with the labels.
        logits: the weight of the divergence from the float program's scores.
        temperature: of ``logits``.
        mse: the weight of the squared difference from the float program's outputs.
        features: globs over module paths whose values are compared with the float program's.
        feature_weight: the weight of that comparison.
    """

    labels: float = 0.0
    logits: float = 1.0
    temperature: float = 1.0
    mse: float = 0.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any of the losses compares with the float program."""
        return bool(self.logits or self.mse or self.features)

    def check_losses(self) -> None:
        """Refuse weights that say nothing or the wrong thing.

        Raises:
            UsageError: a weight is negative, all are 0, or the temperature is not above 0.
        """
        for name in ("labels", "logits", "mse", "feature_weight"):
            if not getattr(self, name) >= 0.0:
                raise UsageError(f"{name} is a weight, at least 0, not {getattr(self, name)}")
        if not (self.labels or self.needs_teacher):
            raise UsageError("no loss is asked for; give labels, logits, mse or features")
        if not self.temperature > 0.0:
            raise UsageError(f"temperature must be above 0, not {self.temperature}")


@dataclass(frozen=True)
class Objective:
    """The losses of a batch, added up with their weights.

    Attributes:
        options: which, and their weights.
        student: what is trained; its outputs, then its features.
        teacher: what it is compared with, likewise; None where no loss needs one.
        features: how many features there are.
    """

    options: LossOptions
    student: Runs = field(repr=False)
    teacher: Runs | None = field(default=None, repr=False)
    features: int = 0

    def __call__(self, batch: Batch) -> Tensor:
        """One figure a sample, [n]."""
        return self.of(self.student(*batch.inputs), batch)

    def of(self, found: Sequence[Tensor], batch: Batch) -> Tensor:
        """The same, of what the student has already returned."""
        options, count = self.options, len(found) - self.features
        total = found[0].new_zeros(len(found[0]))
        if options.labels:
            if batch.labels is None:
                raise UsageError("the loss needs labels, and a batch has none; set labels=0")
            total = total + options.labels * cross_entropy(found[0], batch.labels)
        if self.teacher is None:
            return total
        with torch.no_grad():
            wanted = self.teacher(*batch.inputs)
        if options.logits:
            total = total + options.logits * divergence(found[0], wanted[0], options.temperature)
        if options.mse:
            pairs = zip(found[:count], wanted[:count], strict=True)
            errors = [squared_error(a, b) for a, b in pairs if a.is_floating_point()]
            total = total + options.mse * torch.stack(errors).mean(0)
        if self.features:
            pairs = zip(found[count:], wanted[count:], strict=True)
            shares = [squared_error(a, b) / (_power(b) + _LEAST_POWER) for a, b in pairs]
            total = total + options.feature_weight * torch.stack(shares).mean(0)
        return total


_LEAST_POWER = 1e-12
"""Keeps the error of a feature that is 0 throughout a sample finite."""


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each sample, averaged over its positions: [n].

    Args:
        scores: [n, classes], [n, positions, classes] or [n, classes, height, width].
        labels: int64, [n] or one per position.

    Raises:
        UsageError: the labels do not have one entry per position of the scores.

    >>> cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 3]))
    tensor([1.3863, 1.3863, 1.3863])
    """
    dim = _classes(scores)
    moved = scores.movedim(dim, -1)
    if labels.shape != moved.shape[:-1]:
        raise UsageError(
            f"labels are {list(labels.shape)}, but scores {list(scores.shape)} need one per "
            f"position: {list(moved.shape[:-1])}"
        )
    flat = F.cross_entropy(moved.reshape(-1, moved.shape[-1]), labels.reshape(-1),
                           reduction="none")  # fmt: skip
    return flat.reshape(len(scores), -1).mean(1)


def divergence(scores: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(wanted || scores) of each sample at a temperature T: [n].

    >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([0.])
    """
    dim = _classes(scores)
    ours = torch.log_softmax(scores / temperature, dim)
    theirs = torch.log_softmax(wanted / temperature, dim)
    found = (theirs.exp() * (theirs - ours)).sum(dim)
    return found.reshape(len(scores), -1).mean(1) * temperature**2


def squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared difference of each sample: [n].

    >>> squared_error(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    tensor([2.5000])
    """
    return (found - wanted).square().reshape(len(found), -1).mean(1)


def _power(value: Tensor) -> Tensor:
    return value.square().reshape(len(value), -1).mean(1)


def _classes(scores: Tensor) -> int:
    """The dimension of classes."""
    return 1 if scores.dim() >= 4 else scores.dim() - 1


# -- features ------------------------------------------------------------------------------------


def feature_nodes(program: Program, teacher: Program, globs: Sequence[str]) -> list[str]:
    """The nodes whose values stand for the modules that globs name: the last ones inside of each.

    Nodes are matched by name; both programs must have them, in the same shape.

    Raises:
        UsageError: a glob matches no module, or one whose value the teacher does not have.
    """
    last = _last_nodes(program)
    counterparts = {node.name: node for node in teacher.calls()}
    found: dict[str, None] = {}
    for glob in globs:
        paths = [path for path in last if fnmatchcase(path, glob)]
        if not paths:
            raise UsageError(f"features: {unknown('module', glob, last)}")
        for path in paths:
            node = last[path]
            other = counterparts.get(node.name)
            if other is None or _sizes(other) != _sizes(node):
                raise UsageError(
                    f"features: {path} has no counterpart in the float program to compare with; "
                    "name other modules"
                )
            found[node.name] = None
    return list(found)


def _last_nodes(program: Program) -> dict[str, fx.Node]:
    """The last floating-point node inside of every module, by its path."""
    found: dict[str, fx.Node] = {}
    for node in program.calls():
        dtype = dtype_of(node)
        if dtype is None or not dtype.is_floating_point or str(node.target).startswith("pruna.f"):
            continue
        parts = module_path(node).split("@")[0].split(".")
        for length in range(1, len(parts) + 1):
            found[".".join(parts[:length])] = node
    found.pop("", None)
    return found


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) if isinstance(size, int) else "*" for size in shape_of(node) or ()]


def return_features(graph: fx.Graph, names: Sequence[str]) -> None:
    """Let a graph return the values of named nodes behind its outputs."""
    by_name = {node.name: node for node in graph.nodes}
    output = graph.output_node()
    (returned,) = output.args
    assert isinstance(returned, (tuple, list))
    output.args = ((*returned, *(by_name[name] for name in names)),)
