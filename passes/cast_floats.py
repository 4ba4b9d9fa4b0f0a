"""Compute in bfloat16 or float16: weights, activations and arithmetic, where that does no harm.

    y = softmax(linear(x, W, b))
      -->
    y = softmax(to(linear(to(x, bfloat16), W', b'), float32))        W' = round(W), b' = round(b)

Inputs and outputs of the program stay float32. What stays in float32 inside is listed in
`float_policy` and can be widened with ``keep``; conversions are ``aten.to.dtype`` calls where the
two meet, one for each tensor and dtype. Weights that only lowered layers read are stored rounded.

float16 ends at 65504. A weight, or an activation on the calibration data (the program's examples,
where there is none), beyond that is refused with the layer's name: one infinity spoils all that
follows. bfloat16 has float32's range.

Beside a noise budget, the pass promises that nothing but dtypes changed: lifted to float64, with
the unrounded weights in place of the rounded ones, the program is the one before.

Runtimes: OpenVINO runs bfloat16 natively on processors that have it, and computes float16 in
float32 on a CPU; ONNX Runtime's CPU kernels convert float16 to float32 around themselves and have
no bfloat16. Certificates say what ran in which precision.

Limits: no fake-quants: integer kernels take float32 around them. Run it after fold-batch-norm: a
batch norm that is left stays in float32 between two conversions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from pruna_ir.calibration import layer_name, runs
from pruna_ir.data import DataSource, TensorData
from pruna_ir.equivalence import LIFTED_TOLERANCE, relative_error, run_float64
from pruna_ir.errors import PassError, UsageError
from pruna_ir.low_precision import COMPUTES_IN
from pruna_ir.passes.float_policy import (
    float_operands,
    follows,
    is_float32,
    lowered,
    why_kept,
)
from pruna_ir.program import Program
from pruna_ir.quantization import fake_quant_op
from pruna_ir.registry import unknown
from pruna_ir.stimuli import stimuli
from pruna_ir.transform import Context, Effect, Finding, Pass, Rewrite

aten = torch.ops.aten

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_BUDGETS = {"bfloat16": 20.0, "float16": 38.0}
"""dB: noise at a tenth of the signal; float16 has three bits more, of 6.02 dB each."""
_SAMPLES = 128
"""How many samples float16's range is checked on."""


@dataclass(frozen=True)
class CastFloats(Pass):
    """Compute in bfloat16 or float16, with norms, softmax and sums left in float32.

    Options:
        dtype: ``bfloat16`` (float32's range, 8 bits of precision) or ``float16`` (up to 65504,
            11 bits).
        keep: globs over module paths or operators that stay in float32 besides, such as ``head``,
            ``layer4*`` or ``aten.gelu``.
        sqnr_db: the lowest signal-to-noise ratio of any output, against the program before, that
            the pipeline accepts; 20 dB for bfloat16 and 38 dB for float16 by default.

    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> program = capture(torch.nn.Linear(4, 3), (torch.zeros(2, 4),))
    >>> changed = apply(CastFloats(), program).program
    >>> [str(node.meta["val"].dtype) for node in changed.calls()]
    ['torch.bfloat16', 'torch.bfloat16', 'torch.float32']
    """

    name: ClassVar[str] = "cast-floats"
    effect: ClassVar[Effect] = Effect.BOUNDED

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    keep: tuple[str, ...] = ()
    sqnr_db: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise UsageError(
                f"{self.name}: {unknown('dtype', self.dtype, _DTYPES)}"
            )

    @property
    def min_sqnr_db(self) -> float:  # type: ignore[override]  # the options decide
        """The budget of the pipeline's check."""
        return _BUDGETS[self.dtype] if self.sqnr_db is None else self.sqnr_db

    def rewrite(self, rw: Rewrite) -> None:
        """Choose, check the range, round weights, insert conversions."""
        _refuse(rw)
        low = self._chosen(rw)
        if not low:
            return
        plan = _Plan(rw, low, _DTYPES[self.dtype])
        if self.dtype == "float16":
            _check_range(rw, plan)
        stored = plan.round_tensors()
        plan.convert()
        rw.assure(OnlyDtypes(stored))
        rw.set_attribute(COMPUTES_IN, self.dtype)
        _note_kept(rw, low)

    def _chosen(self, rw: Rewrite) -> set[fx.Node]:
        """The calls to lower, without those that the user keeps."""
        low = lowered(rw.program)
        for glob in self.keep:
            kept = {node for node in rw.program.calls() if _matches(node, glob)}
            if not kept:
                names = {n for c in rw.program.calls() for n in (layer_name(c), _operator(c))}
                raise UsageError(f"{self.name}: keep: {unknown('layer', glob, names)}")
            low -= kept
        return low


def _operator(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0]


def _matches(node: fx.Node, glob: str) -> bool:
    """Whether a glob names a call, by its module path, one above it, or its operator."""
    path = layer_name(node)
    return any(fnmatchcase(text, glob) for text in (path, _operator(node))) or fnmatchcase(
        path, f"{glob}.*"
    )


def _refuse(rw: Rewrite) -> None:
    for node in rw.program.calls(fake_quant_op()):
        raise rw.error(
            node, "the program is quantised, and integer kernels take float32 around them; cast "
            "the float program, or quantise instead"
        )  # fmt: skip


def _note_kept(rw: Rewrite, low: set[fx.Node]) -> None:
    """Say of each call that stays in float32 between lowered ones why it does."""
    for node in list(rw.program.calls()):
        if node.target is aten.to.dtype or node in low or follows(node) or not is_float32(node):
            continue
        if float_operands(node) and any(s.target is aten.to.dtype for s in node.all_input_nodes):
            rw.note(node, f"stays in float32: {why_kept(node) or 'as asked for, or in between'}")


# -- the plan ------------------------------------------------------------------------------------


class _Plan:
    """Which calls compute in the lower dtype, and what that makes of tensors and edges."""

    def __init__(self, rw: Rewrite, low: set[fx.Node], dtype: torch.dtype) -> None:
        self._rw, self._low, self.dtype = rw, low, dtype
        self._order = list(rw.program.graph.nodes)
        self.lowered_tensors = {
            node for node in self._order
            if node.op == "get_attr" and is_float32(node) and self._only_lowered(node)
        }  # fmt: skip
        self._whole = self._whole_tensors()
        self.result = self._results()

    def _only_lowered(self, node: fx.Node) -> bool:
        """Whether only lowered calls read a value, be it moved on the way."""
        readers = list(node.users)
        return bool(readers) and all(
            reader in self._low
            or (follows(reader) and _alone(reader, node) and self._only_lowered(reader))
            for reader in readers
        )

    def _whole_tensors(self) -> set[str]:
        """The names of tensors of which every reader is lowered."""
        others = {
            str(n.target) for n in self._order
            if n.op == "get_attr" and n not in self.lowered_tensors
        }  # fmt: skip
        return {str(n.target) for n in self.lowered_tensors} - others

    def _results(self) -> dict[fx.Node, torch.dtype]:
        """The dtype of each float value after the pass."""
        found: dict[fx.Node, torch.dtype] = {}
        for node in self._order:
            if not is_float32(node):
                continue
            if follows(node):
                operands = [found[source] for source in float_operands(node)]
                same = bool(operands) and all(d is self.dtype for d in operands)
                found[node] = self.dtype if same else torch.float32
            else:
                goes = node in self._low or node in self.lowered_tensors
                found[node] = self.dtype if goes else torch.float32
        return found

    def wanted(self, node: fx.Node) -> torch.dtype | None:
        """The dtype that a node reads its float operands in; None where it does not matter."""
        if node.op == "output":
            return torch.float32
        if node.op != "call_function":
            return None
        if node.target is fake_quant_op():
            return torch.float32
        return self.dtype if node in self._low else (
            self.result[node] if follows(node) else torch.float32
        )

    def converted(self) -> set[fx.Node]:
        """The values in the lower dtype, and those that are converted to it."""
        found = {node for node, dtype in self.result.items() if dtype is self.dtype}
        for node in self._order:
            if self.wanted(node) is self.dtype:
                found |= set(float_operands(node))
        return found

    def round_tensors(self) -> dict[str, str]:
        """Store rounded weights; returns the old name of the tensor behind each new one.

        A tensor that calls in float32 read too keeps its name for them, and gets a rounded copy.
        """
        places: dict[str, list[fx.Node]] = {}
        for node in self._order:
            if node in self.lowered_tensors:
                places.setdefault(str(node.target), []).append(node)
        stored = {}
        for name, nodes in places.items():
            tensor = self._rw.program.tensor(name)
            value: torch.Tensor = tensor.detach().to(self.dtype)
            if name in self._whole:
                self._rw.set_tensor(name, value)
                stored[name] = name
                continue
            if isinstance(tensor, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
            copy = self._rw.constant(value, name, before=nodes[0])
            stored[str(copy.target)] = name
            self.result[copy] = self.dtype
            for node in nodes:
                self._rw.replace(node, copy)
        return stored

    def convert(self) -> None:
        """Insert a conversion wherever an operand is not in the dtype that its reader wants."""
        made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        for node in list(self._rw.program.graph.nodes):
            wanted = self.wanted(node)
            if wanted is None:
                continue
            mapping = {}
            for source in node.all_input_nodes:
                current = self.result.get(source)
                if current is None or current is wanted or _is_list(source):
                    continue
                if (source, wanted) not in made:
                    made[source, wanted] = self._conversion(source, wanted)
                mapping[source] = made[source, wanted]
            if mapping:
                self._rw.redirect(node, mapping)
        for node in (n for n in self._order if n in self._low):
            self._rw.applied(node, f"computes in {str(self.dtype).removeprefix('torch.')}")

    def _conversion(self, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        after = source.next
        while after.op == "placeholder":
            after = after.next
        return self._rw.insert(
            aten.to.dtype, before=after, like=source, self=source, dtype=dtype
        )


def _alone(reader: fx.Node, node: fx.Node) -> bool:
    """Whether a node is the only float operand of a reader."""
    return float_operands(reader) == [node]


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


# -- float16's range -----------------------------------------------------------------------------


def _check_range(rw: Rewrite, plan: _Plan) -> None:
    """Refuse weights and activations that float16 cannot hold, and remark those that vanish.

    Raises:
        PassError: some are too large.
    """
    largest = torch.finfo(plan.dtype).max
    nodes = plan.converted()
    found = {n: _largest([rw.program.tensor(str(n.target))]) for n in nodes if n.op == "get_attr"}
    data = rw.context.data or TensorData(rw.program.examples, batch_size=10**9)
    found |= _activations(rw.program, {n for n in nodes if n.op != "get_attr"}, data)
    beyond = {node: value for node, value in found.items() if value > largest}
    if beyond:
        shown = [f"{_called(n)} reaches {v:.3g}" for n, v in list(beyond.items())[:5]]
        more = f" and {len(beyond) - len(shown)} more" if len(beyond) > len(shown) else ""
        globs = ", ".join(dict.fromkeys(_reader(node) for node in beyond))
        raise PassError(
            f"cast-floats: float16 ends at {largest:g}, but {'; '.join(shown)}{more}; keep these "
            f"layers in float32 with keep=[{globs}], or give dtype=bfloat16"
        )
    smallest = torch.finfo(plan.dtype).tiny
    for node, value in found.items():
        if 0.0 < value < smallest and node.op == "call_function":
            rw.note(node, f"{layer_name(node)} stays below {value:.2g}, where float16 rounds "
                    f"coarsely or to zero; keep it in float32 if the budget fails")  # fmt: skip


def _called(node: fx.Node) -> str:
    return f"the weight {node.target}" if node.op == "get_attr" else layer_name(node)


def _reader(node: fx.Node) -> str:
    """What to keep in order to spare a value the conversion: its layer, or who reads it."""
    if node.op == "call_function":
        return layer_name(node)
    return ", ".join(layer_name(user) for user in node.users)


def _largest(tensors: Iterable[torch.Tensor]) -> float:
    """The largest finite magnitude: infinities, as in masks, stay what they are."""
    found = 0.0
    for tensor in tensors:
        value = tensor.detach()
        if value.is_floating_point() and value.numel():
            finite = torch.where(torch.isfinite(value), value.abs(), 0.0)
            found = max(found, float(finite.max()))
    return found


def _activations(
    program: Program, nodes: set[fx.Node], data: DataSource
) -> dict[fx.Node, float]:
    found = dict.fromkeys(nodes, 0.0)

    class Walk(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in found:
                values = result if isinstance(result, (tuple, list)) else [result]
                found[n] = max(found[n], _largest(v for v in values if torch.is_tensor(v)))
            return result

    walk = Walk(program.module, garbage_collect_values=True, graph=program.graph)
    with torch.no_grad():
        for inputs in runs(program, data, _SAMPLES):
            walk.run(*inputs)
    return found


# -- the promise ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnlyDtypes:
    """Lifted to float64, with unrounded weights, the program is the one before; outputs float32.

    Attributes:
        stored: for each rounded tensor, the name of the unrounded one in the program before.
    """

    stored: Mapping[str, str]

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:
        """The relative difference, and how many inputs and outputs changed their dtype."""
        exact = {new: before.tensor(old).detach().double() for new, old in self.stored.items()}
        worst = 0.0
        for stimulus in stimuli(before, seed=context.seed):
            old = run_float64(before, stimulus.inputs)
            new = run_float64(after, stimulus.inputs, exact=exact)
            worst = max([worst, *(relative_error(a, b) for a, b in zip(new, old, strict=True))])
        changed = sum(
            a.dtype is not b.dtype
            for a, b in zip((*before.inputs, *before.outputs), (*after.inputs, *after.outputs),
                            strict=True)
        )  # fmt: skip
        wrong = sum(
            not torch.equal(after.tensor(new), before.tensor(old).to(after.tensor(new).dtype))
            for new, old in self.stored.items()
        )
        return [
            Finding("difference in float64 with unrounded weights", worst, LIFTED_TOLERANCE),
            Finding("weights that were not rounded to nearest", float(wrong), 0.0),
            Finding("inputs and outputs of another dtype", float(changed), 0.0),
        ]
