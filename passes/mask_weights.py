"""mask-weights: zeros inside of weights, as masks that train and become zeros at lowering.

    y = linear(x, W, b)   -->   y = linear(x, W * M, b)      M in {0, 1}, a buffer named W_mask

The weight keeps its name, its dense values and its gradient, which reaches the entries that stay
only. `fold-constants` stores W * M under the weight's name, and so every backend gets the zeros.
Which entries go together is the pattern (`pruna_ir.passes.sparsity_patterns`); which are weakest,
the criterion, for entry W[o, i] of output o and input i:

    magnitude   |W[o, i]|                  Han et al., Learning both Weights and Connections for
                                           Efficient Neural Networks, NeurIPS 2015
    wanda       |W[o, i]| * ||x[i]||_2     Sun et al., A Simple and Effective Pruning Approach for
                                           Large Language Models, ICLR 2024, equation (1)

x[i] is input i of the layer over all calibration samples and positions (tokens, pixels). The paper
compares the entries of one output with one another: ``ranking=output``.

Zeros alone make nothing faster: the report says what each backend does with them. Limits: weights
of convolutions and matrix products, two-dimensional for products; a weight that something else
reads too (a tied embedding) stays dense, since the embedding would lose the entries as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import fx

from pruna_ir.calibration import layer_name, observe
from pruna_ir.call import bind_arguments
from pruna_ir.equivalence import run_float64
from pruna_ir.errors import UsageError
from pruna_ir.passes.sparsity_patterns import Grouped, Pattern, kept, parse_pattern
from pruna_ir.program import Program, computed_nodes, dtype_of
from pruna_ir.registry import unknown
from pruna_ir.sparse_layouts import LAYERS, Layout, layout_of, masked, shape_refusals
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten

Criterion = Literal["magnitude", "wanda"]
Rank = Literal["layer", "output", "global"]
Accepted = Literal["any", "tensorrt", "cusparselt"]


@dataclass(frozen=True)
class MaskWeights(Pass):
    """Mask the weakest entries of the weights of convolutions and matrix products.

    Rewrite:
        y = linear(x, W, b)
          -->
        y = linear(x, mul(W, W_mask), b)

    Options:
        pattern: ``unstructured``; ``N:M``, at most N non-zeros in M consecutive inputs, such as
            ``2:4``; or blocks of outputs x inputs such as ``16x16``.
        sparsity: the share of entries (or of blocks) that become zero, in [0, 1); 0.5 by default.
            N:M states it itself, 1 - N/M.
        criterion: ``magnitude``, or ``wanda``, which needs calibration data.
        ranking: entries compete within their ``layer``, their ``output`` channel, or with those
            of all layers (``global``). N:M compares within each group of M.
        include: globs of weights or module paths; none for all.
        exclude: globs of weights or module paths that stay dense, such as ``head``.
        accepted_by: mask 2:4 only where ``tensorrt`` or ``cusparselt`` takes the weight's shape.
        samples: how many samples of the data ``wanda`` looks at.

    A layer whose inputs are no multiple of M stays dense. Masks compose: entries that an earlier
    mask zeroed count among the share and stay zero. Run it after fold-batch-norm, and before
    operators are fused or quantised: fold-constants, then insert-fake-quant, keeps the zeros.

    Raises:
        UsageError: an option is out of its range, a glob matches nothing, or data is missing.
        PassError: the program is fused or quantised, or a weight holds NaN or infinity.

    >>> from pruna_ir import apply, capture
    >>> program = capture(torch.nn.Linear(4, 2), (torch.ones(2, 4),))
    >>> result = apply(MaskWeights(pattern="2:4"), program)
    >>> result.program.tensor("weight_mask").sum(1)
    tensor([2., 2.])
    """

    name: ClassVar[str] = "mask-weights"
    effect: ClassVar[Effect] = Effect.ORACLE

    pattern: str = "unstructured"
    sparsity: float | None = None
    criterion: Criterion = "magnitude"
    ranking: Rank = "layer"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    accepted_by: Accepted = "any"
    samples: int = 128

    def __post_init__(self) -> None:
        chosen = parse_pattern(self.pattern)
        for option, value, known in (
            ("criterion", self.criterion, get_args(Criterion)),
            ("ranking", self.ranking, get_args(Rank)),
            ("library", self.accepted_by, get_args(Accepted)),
        ):
            if value not in known:
                raise UsageError(f"{self.name}: {unknown(option, value, known)}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise UsageError(f"{self.name}: sparsity must be in [0, 1), not {self.sparsity}")
        if self.accepted_by != "any" and chosen != Grouped(2, 4):
            raise UsageError(f"{self.name}: {self.accepted_by} accepts pattern 2:4 only")
        if isinstance(chosen, Grouped) and self.sparsity not in (None, self._share(chosen)):
            raise UsageError(
                f"{self.name}: pattern {chosen} makes {self._share(chosen):g} of the entries "
                f"zero, not {self.sparsity:g}; leave sparsity out"
            )

    def _share(self, pattern: Pattern) -> float:
        if isinstance(pattern, Grouped):
            return 1 - pattern.kept / pattern.group
        return 0.5 if self.sparsity is None else self.sparsity

    def rewrite(self, rw: Rewrite) -> None:
        """Choose the weights, score their entries, mask the weakest, promise."""
        _refuse(rw)
        pattern = parse_pattern(self.pattern)
        chosen = self._chosen(rw, pattern)
        scores = self._scores(rw, chosen)
        masks = kept(
            scores, [w.layout for w in chosen], pattern, self._share(pattern), self.ranking
        )
        promised: dict[str, torch.Tensor] = {}
        for weight, mask in zip(chosen, masks, strict=True):
            whole = mask if weight.old is None else mask & weight.old
            if weight.old is not None and torch.equal(whole, weight.old):
                continue
            if bool(whole.all()):
                rw.skip(weight.layers[0], f"{weight.name} is too small: nothing of it goes")
                continue
            _put(rw, weight, whole)
            promised[weight.name] = whole
            rw.applied(weight.layers[0], _summary(weight, whole, pattern))
            if not bool(whole.any()):
                rw.note(weight.layers[0], f"all of {weight.name} is zero; lower the sparsity")
        if promised:
            rw.promise(MaskedWeights(promised))

    # -- which weights -----------------------------------------------------------------------

    def _chosen(self, rw: Rewrite, pattern: Pattern) -> list[_Weight]:
        found = _collect(rw)
        self._check_globs(found)
        chosen = []
        for weight in found:
            reason = self._why_not(rw, weight, pattern)
            if reason:
                rw.skip(weight.layers[0], f"{weight.name} stays dense: {reason}")
            else:
                chosen.append(weight)
        return chosen

    def _check_globs(self, found: Sequence[_Weight]) -> None:
        names = [name for weight in found for name in (weight.name, *weight.paths())]
        for option in ("include", "exclude"):
            for glob in getattr(self, option):
                if not any(_matches(name, glob) for name in names):
                    raise UsageError(f"{self.name}: {option}: {unknown('weight', glob, names)}")

    def _why_not(self, rw: Rewrite, weight: _Weight, pattern: Pattern) -> str:
        names = (weight.name, *weight.paths())
        hit = next((g for g in self.exclude for n in names if _matches(n, g)), None)
        if hit is not None:
            return f"excluded by '{hit}'"
        if self.include and not any(_matches(n, g) for g in self.include for n in names):
            return "not included"
        if weight.reason:
            return weight.reason
        shape = tuple(rw.program.tensor(weight.name).shape)
        inputs = shape[weight.layout.inputs] // weight.layout.groups
        if isinstance(pattern, Grouped) and inputs % pattern.group:
            return f"{inputs} inputs are no multiple of {pattern.group}"
        if self.accepted_by != "any":
            refused = shape_refusals(shape, weight.layout, self.accepted_by)
            return f"{self.accepted_by}: {'; '.join(refused)}" if refused else ""
        return ""

    # -- scores ------------------------------------------------------------------------------

    def _scores(self, rw: Rewrite, chosen: Sequence[_Weight]) -> list[torch.Tensor]:
        """The score of every entry, in at least float32; what is masked already scores -inf."""
        norms = self._norms(rw, chosen) if self.criterion == "wanda" else {}
        scores = []
        for weight in chosen:
            value = rw.program.tensor(weight.name).detach()
            if not bool(torch.isfinite(value).all()):
                raise rw.error(weight.layers[0], f"{weight.name} holds NaN or infinity")
            score = value.abs().to(torch.promote_types(value.dtype, torch.float32))
            if norms:
                score = score.double() * norms[weight.name]
            if weight.old is not None:
                score = score.masked_fill(~weight.old, -torch.inf)
            scores.append(score)
        return scores

    def _norms(self, rw: Rewrite, chosen: Sequence[_Weight]) -> dict[str, torch.Tensor]:
        """The norm of the input that each entry of each weight meets, broadcast to the weight."""
        if rw.context.data is None:
            raise UsageError(
                f"{self.name}: criterion wanda weighs entries by the layers' inputs on data, and "
                "there is none; give calibration data (--data FILE.npz, or Context(data=...)), or "
                "use criterion=magnitude"
            )
        squares: dict[fx.Node, ChannelSquares] = {}
        for weight in chosen:
            for node in weight.layers:
                source, dim = _input(rw, node)
                squares.setdefault(source, ChannelSquares()).dims.add(dim)
        observe(
            rw.program, squares, rw.context.data,
            samples=self.samples, progress=rw.context.progress,
        )  # fmt: skip
        return {weight.name: _weight_norms(rw, weight, squares) for weight in chosen}


@dataclass(frozen=True)
class MaskedWeights:
    """The oracle: what the program before the pass computes with these entries of weights zero.

    It runs the program as it was, in float64, and only puts other values behind the weights'
    names; it knows nothing of the masks in the graph.

    Attributes:
        masks: for each weight, a bool tensor of its shape: True for what stays.
    """

    masks: Mapping[str, torch.Tensor]

    def __call__(
        self, program: Program, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """The float64 outputs that the masked program must have."""
        return self.trace(program, inputs)

    def trace(
        self, program: Program, inputs: Sequence[torch.Tensor], observe: Any = None
    ) -> tuple[torch.Tensor, ...]:
        """The outputs; ``observe`` sees every call with its value."""
        values = {
            name: torch.where(mask, program.tensor(name).detach().double(), 0.0)
            for name, mask in self.masks.items()
        }
        return run_float64(program, inputs, observe, values)


@dataclass
class ChannelSquares:
    """The sum of squares of each index of some dimensions of a tensor, over everything seen.

    >>> seen = ChannelSquares({-1})
    >>> seen.update(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    >>> seen.sums[-1].sqrt()
    tensor([5., 1.], dtype=torch.float64)
    """

    dims: set[int] = field(default_factory=set)
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    low: float = 0.0
    high: float = 0.0

    def update(self, x: torch.Tensor) -> None:
        """Take in the finite, non-empty tensor ``x``."""
        for dim in self.dims:
            rows = x.detach().double().movedim(dim, 0).flatten(1)
            found = rows.square().sum(1).cpu()
            self.sums[dim] = self.sums[dim] + found if dim in self.sums else found


# -- the weights of a program ---------------------------------------------------------------------


@dataclass
class _Weight:
    """A stored weight with the layers that multiply by it.

    Attributes:
        old: the entries that an earlier mask keeps; None where there is no mask.
        mask: the name of that mask.
        reason: why it cannot be masked; empty where it can.
    """

    name: str
    layout: Layout
    layers: list[fx.Node]
    old: torch.Tensor | None = None
    mask: str = ""
    reason: str = ""

    def paths(self) -> list[str]:
        """The module paths of its layers."""
        return [layer_name(node) for node in self.layers]


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")


def _refuse(rw: Rewrite) -> None:
    """Refuse programs whose weights are behind fused or quantised operators."""
    for node in rw.calls():
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "pruna":
            raise rw.error(
                node,
                f"{node.name} is fused or quantised already; run mask-weights before fuse-* and "
                "insert-fake-quant",
            )


def _collect(rw: Rewrite) -> list[_Weight]:
    """Every weight of a layer in scope, in graph order, with why it may not be masked."""
    computed = computed_nodes(rw.program)
    found: dict[str, _Weight] = {}
    for node in rw.calls(*LAYERS):
        source = rw.call(node).producer(LAYERS[node.target].weight)
        if source is None:
            continue
        mask = masked(rw.program, source)
        stored = mask.weight if mask is not None else source
        if stored.op != "get_attr":
            if stored not in computed:
                path = layer_name(node)
                rw.skip(
                    node,
                    f"the weight of {path} is computed from constants; run fold-constants first",
                )
            continue
        name = str(stored.target)
        weight = found.setdefault(name, _Weight(name, layout_of(node), []))
        weight.layers.append(node)
        if mask is not None:
            weight.mask = str(mask.mask.target)
            weight.old = rw.program.tensor(weight.mask) != 0
        weight.reason = weight.reason or _unfit(rw, weight, node, source)
    for weight in found.values():
        weight.reason = weight.reason or _read_elsewhere(rw, weight)
    return list(found.values())


def _unfit(rw: Rewrite, weight: _Weight, node: fx.Node, source: fx.Node) -> str:
    """Why one layer's reading of a weight rules a mask out."""
    tensor, dtype = rw.program.tensor(weight.name), dtype_of(source)
    if dtype is None or not dtype.is_floating_point:
        return "it holds no floating-point numbers"
    if weight.layout.kind == "linear" and tensor.dim() != 2:
        return f"a product with {tensor.dim()}-dimensional weights has no inputs and outputs here"
    if layout_of(node) != weight.layout:
        return "two layers read it in different layouts"
    return ""


def _read_elsewhere(rw: Rewrite, weight: _Weight) -> str:
    """Names a reader of the weight that is not one of its layers (or its mask)."""
    for get in rw.graph.find_nodes(op="get_attr", target=weight.name):
        for user in get.users:
            if user in weight.layers and _reads_as_weight_only(user, get):
                continue
            if weight.mask and masked(rw.program, user) is not None:
                if outside := [u for u in user.users if u not in weight.layers]:
                    return f"{outside[0].name} reads it too"
                continue
            return f"{user.name} reads it too"
    return ""


def _reads_as_weight_only(layer: fx.Node, get: fx.Node) -> bool:
    bound = bind_arguments(layer)
    return [key for key, value in bound.items() if value is get] == [LAYERS[layer.target].weight]


def _put(rw: Rewrite, weight: _Weight, keep: torch.Tensor) -> None:
    """Multiply the weight by its mask, for all of its layers."""
    tensor = rw.program.tensor(weight.name)
    mask = keep.to(tensor.dtype)
    if weight.mask:
        rw.set_tensor(weight.mask, mask)
        return
    first = weight.layers[0]
    stored = rw.call(first).producer(LAYERS[first.target].weight)
    node = rw.constant(mask, f"{weight.name}_mask", before=first)
    product = rw.insert(
        aten.mul.Tensor, before=first, like=first, self=stored, other=node
    )
    for layer in weight.layers:
        rw.update(layer, **{LAYERS[layer.target].weight: product})


def _summary(weight: _Weight, keep: torch.Tensor, pattern: Pattern) -> str:
    zeros, total = keep.numel() - int(keep.sum()), keep.numel()
    return f"{weight.name}: {zeros} of {total} entries masked ({zeros / total:.1%}), {pattern}"


# -- inputs of layers -----------------------------------------------------------------------------


def _input(rw: Rewrite, node: fx.Node) -> tuple[fx.Node, int]:
    """The node that a layer multiplies by its weight, and the dimension of its channels."""
    operands = LAYERS[node.target]
    source = rw.call(node).producer(operands.input)
    if source is None:
        raise rw.error(node, "its input is no tensor")
    if operands.layout.kind == "linear":
        return source, -1
    weight = rw.call(node).producer(operands.weight)
    assert weight is not None
    return source, 1 - weight.meta["val"].dim()


def _weight_norms(
    rw: Rewrite, weight: _Weight, squares: Mapping[fx.Node, ChannelSquares]
) -> torch.Tensor:
    """||x[i]|| for each entry's input i, in a shape that broadcasts over the weight.

    The layers that share a weight count together.
    """
    total: torch.Tensor | None = None
    for node in weight.layers:
        source, dim = _input(rw, node)
        found = squares[source].sums[dim]
        total = found if total is None else total + found
    assert total is not None
    shape = rw.program.tensor(weight.name).shape
    ones = [1] * len(shape)
    inputs = weight.layout.inputs
    if weight.layout.kind != "conv":
        ones[inputs] = shape[inputs]
        return total.sqrt().reshape(ones)
    # [groups, inputs of a group]: output o belongs to group o * groups // outputs.
    by_group = total.sqrt().reshape(-1, shape[inputs])
    rows = by_group.repeat_interleave(shape[0] // len(by_group), 0)
    ones[0], ones[inputs] = shape[0], shape[inputs]
    return rows.reshape(ones)
