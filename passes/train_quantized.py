"""train-quantized: quantisation-aware training of a program that insert-fake-quant has just left.

    y = conv2d(fake_quant(x, s_x, z_x), fake_quant(W, s_W, 0), b)
      -->
    the same operators, with W, b and s (and z, with ``scales=lsq+``) trained

The forward pass of the training is the program itself, fake-quants included, so that what is
trained is what is exported. Gradients go straight through the rounding; see `learned_grids` for
how scales learn, `losses` for what is minimised (the float program is the teacher) and `fit` for
the loop, its checkpoints and ``torchrun``.

Batch norms must be folded before quantisation, as the canonical pipelines do: then there is no
statistic that training and deployment could see differently. A batch norm right behind a quantised
layer is refused; one that cannot be folded (before its layer, say) trains with its running
statistics frozen, as it is deployed.

Promise (checked): on the data, as it iterates, the loss is not higher than before; nothing but
parameters and the grids' scales and zero points changed; scales are positive, and zero points are
integers of their grids.

Limits: the promise about the loss is tested on the first 1,024 samples. A program whose batch size
is fixed at capture trains at that size, alone, and on whole batches only if the data divides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.data import DataSource, TensorData
from pruna_ir.errors import PassError, UsageError, VerificationError
from pruna_ir.fit import Group, Optimizer, Recipe, decay_groups, fit
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.losses import LossOptions, Objective, feature_nodes, return_features
from pruna_ir.passes.learned_grids import LearnedGrids, Method, grids_of
from pruna_ir.passes.promises import Untouched
from pruna_ir.passes.quant_placement import KINDS
from pruna_ir.program import Program
from pruna_ir.samples import Samples, samples_of
from pruna_ir.spec import print_pass
from pruna_ir.training import trainable
from pruna_ir.transform import (
    Context,
    Effect,
    Finding,
    Pass,
    Progress,
    Rewrite,
    no_progress,
)

aten = torch.ops.aten

JUDGED = 1024
"""How many samples the promise about the loss is tested on."""


@dataclass(frozen=True)
class TrainQuantized(Pass, Recipe, LossOptions):
    """Train the weights and grids of a quantised program, by default towards the float program.

    Options:
        scales: how scales learn: ``lsq``, ``lsq+`` (with offsets), ``pact`` (activation clipping
            alone) or ``fixed``.
        scale_lr: the learning rate of scales and offsets, as a multiple of ``lr``.
        optimizer: Adam here, not SGD: batch norms are folded, so that gradients of layers differ
            in magnitude as their norms' factors do, and no rate suits all of them.

    and those of `pruna_ir.fit.Recipe` (epochs, lr, schedule, batch_size, checkpoint, ...) and
    `pruna_ir.losses.LossOptions` (labels, logits, temperature, mse, features, ...).

    Requires: training data in the context, with labels where ``labels`` is set; right after
    insert-fake-quant where another loss is.

    Raises:
        UsageError: there is no data, there are no labels, or an option makes no sense.
        PassError: there is no fake-quant, no float program, or an unfolded batch norm.
    """

    name: ClassVar[str] = "train-quantized"
    effect: ClassVar[Effect] = Effect.FITTED

    optimizer: Optimizer = "adam"
    lr: float = 3e-4
    scales: Method = "lsq"
    scale_lr: float = 0.1

    def rewrite(self, rw: Rewrite) -> None:
        """Check everything, train a copy, and take its tensors over."""
        if rw.context.data is None:
            raise UsageError(
                f"{self.name} trains on data, and there is none; give --data FILE.npz, or "
                "Context(data=...)"
            )
        _refuse(rw)
        found = train(
            rw.before, rw.context.data, self, seed=rw.context.seed, progress=rw.context.progress
        )
        old = rw.program.tensors()
        changed = [name for name, value in found.items() if not torch.equal(old[name], value)]
        for name in changed:
            rw.set_tensor(name, found[name])
        for node in rw.calls(FAKE_QUANT.op):
            rw.applied(node, _moved(rw, node))
        rw.set_origin(rw.before.origin)
        rw.assure(Untouched(tuple(changed)))
        rw.assure(OnTheGrid())
        rw.assure(LossNotHigher(self))


def train(
    program: Program,
    data: DataSource,
    options: TrainQuantized,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
    after_epoch: Callable[[int, float, Mapping[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """All tensors of a quantised program after training, by name; the program stays as it is.

    Args:
        program: quantised; its origin is the teacher where the loss needs one.
        data: what to train on.
        options: how.
        seed: of everything random.
        progress: called after each step.
        after_epoch: called after each epoch with its number, its mean loss, and the tensors so
            far, such as `training.with_state` takes them.

    Raises:
        UsageError, PassError: see `TrainQuantized`.
    """
    options.check_losses()
    samples = samples_of(data)
    recipe = _with_batch_size(options, program, data)
    teacher = _teacher(program, options)
    _check_labels(samples, options)
    names = feature_nodes(program, teacher, options.features) if teacher is not None else []
    module = trainable(program, train=False)
    trained = [p for p in module.parameters() if p.requires_grad]
    return_features(module.graph, names)
    grids = LearnedGrids(program, module, options.scales)
    objective = Objective(options, module, _frozen(teacher, names), len(names))

    def tensors() -> dict[str, Tensor]:
        found = program.tensors()
        for name, weight in module.named_parameters(remove_duplicate=False):
            if name in found:
                found[name] = weight.detach().clone()
        return found | grids.values()

    fit(
        module,
        [*decay_groups(trained), Group(grids.parameters, lr=options.scale_lr)],
        objective,
        samples,
        recipe,
        seed=seed,
        identity=f"{program.hash()} {print_pass(_bare(options))}",
        progress=progress,
        after_step=grids.project,
        after_epoch=after_epoch and (lambda n, loss: after_epoch(n, loss, tensors())),
    )
    return tensors()


def _bare(options: TrainQuantized) -> TrainQuantized:
    """The options without those that a continued run may change."""
    return replace(options, checkpoint="", checkpoint_every=0, accumulate=1)


# -- guards --------------------------------------------------------------------------------------


def _refuse(rw: Rewrite) -> None:
    if next(rw.program.calls(FAKE_QUANT.op), None) is None:
        raise PassError(
            "train-quantized: the program has no fake-quant; run insert-fake-quant before it"
        )
    for node in rw.program.calls(aten.batch_norm.default):
        source = rw.call(node).producer("input")
        while source is not None and source.target is FAKE_QUANT.op:
            source = rw.call(source).producer("x")
        if source is not None and source.target in KINDS:
            raise rw.error(
                node,
                f"it is not folded into {source.name}, so that training would not see the weights "
                "that are deployed; run fold-batch-norm before insert-fake-quant",
            )


def _teacher(program: Program, options: LossOptions) -> Program | None:
    if not options.needs_teacher:
        return None
    if program.origin is None:
        raise PassError(
            "train-quantized: the program does not know the float program that it should be "
            "compared with; run it right after insert-fake-quant in the same pipeline, or train "
            "on labels alone with labels=1,logits=0"
        )
    return program.origin.program


def _check_labels(samples: Samples, options: LossOptions) -> None:
    if not options.labels:
        return
    if samples.count and samples.gather(torch.tensor([0]), 0).labels is None:
        raise UsageError(
            "train-quantized: the loss needs labels, and the data has none; add an array 'labels' "
            "to the data, or set labels=0 and train towards the float program (logits=1)"
        )


def _with_batch_size(options: TrainQuantized, program: Program, data: DataSource) -> Recipe:
    """The recipe, with the data's batch size where none is given."""
    size = options.batch_size
    if not size:
        if isinstance(data, TensorData):
            size = data.batch_size
        else:
            size = next(len(batch.inputs[0]) for batch in data)
    fixed = [spec.shape[0] for spec in program.inputs if spec.shape]
    if fixed and isinstance(fixed[0], int) and fixed[0] != size:
        raise UsageError(
            f"train-quantized: the program takes batches of {fixed[0]} only, not of {size}; set "
            f"batch_size={fixed[0]}, or capture it with a dynamic batch"
        )
    return replace(options, batch_size=size)


def _frozen(teacher: Program | None, features: list[str]) -> fx.GraphModule | None:
    """The teacher, which shares its tensors and returns its features behind its outputs."""
    if teacher is None:
        return None
    graph = copy.deepcopy(teacher.graph)
    return_features(graph, features)
    return fx.GraphModule(dict(teacher.tensors()), graph, class_name="Teacher")


def _moved(rw: Rewrite, node: fx.Node) -> str:
    """How a grid moved."""
    source, new = rw.call(node).producer("scale"), rw.call(node).parameter("scale")
    assert source is not None
    assert new is not None
    ratio = new.double() / rw.before.tensor(str(source.target)).double()
    return f"{source.target} times {float(ratio.min()):.3g} to {float(ratio.max()):.3g}"


# -- promises ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnTheGrid:
    """Scales are positive and finite; zero points are int32 and lie in their grids."""

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """The number of scales and zero points that are not so, which must be 0."""
        wrong_scales = wrong_zeros = 0
        for grid in grids_of(after):
            scale, zero = after.tensor(grid.scale), after.tensor(grid.zero_point)
            qmin, qmax = grid.bounds
            wrong_scales += int((~(torch.isfinite(scale) & (scale > 0))).sum())
            wrong_zeros += int(((zero < qmin) | (zero > qmax)).sum())
            wrong_zeros += zero.numel() * (zero.dtype != torch.int32)
        return [
            Finding("scales that are not positive", float(wrong_scales), 0.0),
            Finding("zero points off their grid", float(wrong_zeros), 0.0),
        ]


@dataclass(frozen=True)
class LossNotHigher:
    """On the data, the loss is not higher than it was."""

    options: TrainQuantized

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:
        """The mean loss, whose limit is that of the program before."""
        if context.data is None:
            raise VerificationError("the data that the pass was trained on is not there")
        teacher = _teacher(after, self.options)
        names = feature_nodes(after, teacher, self.options.features) if teacher else []
        objectives = [
            Objective(self.options, module, _frozen(teacher, names), len(names))
            for module in (_frozen(before, names), _frozen(after, names))
            if module is not None
        ]
        old, new, count = 0.0, 0.0, 0
        for batch in context.data:
            with torch.no_grad():
                was, now = (objective(batch) for objective in objectives)
            old, new, count = old + float(was.sum()), new + float(now.sum()), count + len(was)
            if count >= JUDGED:
                break
        return [Finding(f"loss over {count} samples", new / count, old / count)]
