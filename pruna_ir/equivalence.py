"""Equivalence: programs lifted to float64, compared on inputs that exercise their gates.

In float32 a wrong epsilon hides in rounding. Lifted to float64, two programs that compute the
same real-number function agree to about 1e-13 relative; one that differs in anything does not.
The lift changes no program: an interpreter casts tensors as it reads them and rewrites dtype
arguments as it calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from pruna_ir.call import Call, bind_values
from pruna_ir.depthwise import ShiftedDepthwise
from pruna_ir.program import Program, source_line
from pruna_ir.registry import kernels

aten = torch.ops.aten

LIFTED_TOLERANCE = 1e-9
"""Largest relative difference of two lifted programs that counts as the same function."""

ROUNDING_FACTOR = 8.0
"""How much larger than the reference's own float32 rounding error a rewrite's may be."""

_LOW = (torch.float32, torch.float16, torch.bfloat16)


class Lifted(fx.Interpreter):
    """Runs a program with every floating-point tensor in float64; the program stays as it is.

    Intermediate values are freed as soon as nobody needs them. ``observe``, where given, sees each
    call's node and result. ``exact`` gives, by name, the float64 values of tensors that a pass
    computed and rounded.
    """

    def __init__(
        self,
        program: Program,
        observe: Callable[[fx.Node, Any], None] | None = None,
        exact: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self._observe = observe
        self._exact = exact or {}
        self.extra_traceback = False

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter, in float64 where it is a floating-point one."""
        if target in self._exact:
            return self._exact[target]
        return _lift(super().get_attr(target, args, kwargs))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input, in float64 where it is a floating-point one."""
        return _lift(super().placeholder(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A call whose dtype arguments say float64 wherever they said a lower precision."""
        args = tuple(_lift_dtype(a) for a in args)
        kwargs = {key: _lift_dtype(value) for key, value in kwargs.items()}
        if (kernel := kernels().get(target)) is not None and not kernel.primitive:
            # The reference is the ground truth; fast implementations are not what is lifted.
            return kernel.reference(**bind_values(target, args, kwargs))
        if target is aten.rms_norm.default:
            # Its default epsilon is float32's at every lower precision, but not in float64.
            bound = bind_values(target, args, kwargs)
            epsilon = torch.finfo(torch.float32).eps if bound["eps"] is None else bound["eps"]
            return target(**bound | {"eps": epsilon})
        if target is aten.view.default:
            # Kernels may give a float64 result other strides than the captured ones.
            target = aten.reshape.default
        return pytree.tree_map(_lift, target(*args, **kwargs))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """All outputs."""
        with ShiftedDepthwise():
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """One node, shown to the observer."""
        result = super().run_node(n)
        if self._observe is not None and n.op == "call_function":
            self._observe(n, result)
        return result


def _lift(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _LOW:
        return value.detach().double()
    if isinstance(value, torch.Tensor) and value.dtype == torch.complex64:
        return value.detach().to(torch.complex128)
    return value


def _lift_dtype(value: Any) -> Any:
    if value is torch.complex64:
        return torch.complex128
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOW else value


def run_float64(
    program: Program,
    inputs: Sequence[torch.Tensor],
    observe: Callable[[fx.Node, Any], None] | None = None,
    exact: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The program's outputs on these inputs, computed in float64; the inputs stay as they are."""
    own = [value.clone() for value in inputs]
    with torch.no_grad():
        result: tuple[torch.Tensor, ...] = Lifted(program, observe, exact).run(*own)
    return tuple(result)


def run_native(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The program's outputs on these inputs, at its own precision, without gradients.

    The inputs stay as they are, also where the program writes into them.
    """
    with torch.no_grad():
        return program(*(value.clone() for value in inputs))


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max |actual - reference| / max |reference|; infinite where shapes or NaN disagree.

    Equal infinities agree (masks). NaN never agrees with anything, not even with NaN.

    >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    0.5
    """
    if actual.shape != reference.shape:
        return math.inf
    if not reference.dtype.is_floating_point:
        return 0.0 if torch.equal(actual, reference) else math.inf
    a, r = actual.detach().double(), reference.detach().double()
    if bool(torch.isnan(a).any()) or bool(torch.isnan(r).any()):
        return math.inf
    infinite = torch.isinf(r) | torch.isinf(a)
    if bool((a[infinite] != r[infinite]).any()):
        return math.inf
    difference = torch.where(infinite, 0.0, a - r).abs()
    largest = float(torch.where(infinite, 0.0, r).abs().max()) if r.numel() else 0.0
    error = float(difference.max()) if r.numel() else 0.0
    return error / largest if largest > 0 else (math.inf if error > 0 else 0.0)


def sqnr_db(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal-to-quantisation-noise ratio, 10 log10(sum r^2 / sum (a - r)^2), in dB.

    Infinite for equal tensors, minus infinity where shapes or NaN disagree.
    """
    if actual.shape != reference.shape or bool(torch.isnan(actual).any()):
        return -math.inf
    r = reference.detach().double()
    noise = float((actual.detach().double() - r).square().sum())
    signal = float(r.square().sum())
    if noise == 0.0:
        return math.inf
    if not math.isfinite(noise):
        return -math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass(frozen=True)
class Gates:
    """Which gates (relu, clamp, where, max...) the inputs drove to both sides.

    ``one_sided`` maps a gate's node name to a sentence: the side never seen and its source.
    """

    total: int = 0
    one_sided: Mapping[str, str] = field(default_factory=dict)


class GateRecorder:
    """Observes a lifted run and records on which sides each gate was seen."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._seen: dict[fx.Node, set[str]] = {}
        self._wanted: dict[fx.Node, frozenset[str]] = {}
        self._values: dict[fx.Node, Any] = {}

    def __call__(self, node: fx.Node, result: Any) -> None:
        """Record one call's result."""
        bounds = gate_bounds(self._program, node)
        if bounds is None or not isinstance(result, torch.Tensor) or not result.numel():
            return
        low, high = bounds
        seen = self._seen.setdefault(node, set())
        self._wanted[node] = frozenset(
            (["low"] if low is not None else []) + (["high"] if high is not None else [])
        )
        if low is not None and bool((result <= low).any()):
            seen.add("low")
        if high is not None and bool((result >= high).any()):
            seen.add("high")
        inside = torch.ones_like(result, dtype=torch.bool)
        if low is not None:
            inside &= result > low
        if high is not None:
            inside &= result < high
        if bool(inside.any()):
            seen.add("inside")

    def gates(self) -> Gates:
        """What was seen over all runs."""
        missing = {
            node.name: f"never {', '.join(sorted((self._wanted[node] | {'inside'}) - seen))}"
            + (f" ({source_line(node)})" if source_line(node) else "")
            for node, seen in self._seen.items()
            if (self._wanted[node] | {"inside"}) - seen
        }
        return Gates(len(self._seen), missing)


def gate_bounds(program: Program, node: fx.Node) -> tuple[float | None, float | None] | None:
    """The values at which a gate saturates (below, above), None for what is no gate."""
    target = node.target
    if target in (aten.relu.default, aten.relu_.default, aten.hardswish.default,
                  aten.hardswish_.default):  # fmt: skip
        return 0.0, None
    if target in (aten.relu6.default, aten.relu6_.default):
        return 0.0, 6.0
    if target in (aten.hardsigmoid.default, aten.hardsigmoid_.default):
        return 0.0, 1.0
    if target in (aten.hardtanh.default, aten.hardtanh_.default):
        call = Call(program, node)
        return call.number("min_val"), call.number("max_val")
    if target in (aten.clamp.default, aten.clamp_.default, aten.clamp_min.default):
        call = Call(program, node)
        low = call.arg("min")
        high = call.arg("max") if target is not aten.clamp_min.default else None
        return tuple(float(v) if isinstance(v, (int, float)) else None for v in (low, high))  # type: ignore[return-value]
    if str(target) == "pruna.conv_act.default":
        return _fused_bounds(Call(program, node))
    return None


def _fused_bounds(call: Call) -> tuple[float | None, float | None] | None:
    if call.arg("residual") is not None and call.flag("residual_last"):
        return None
    if call.arg("activation") == "hardtanh":
        low, high = call.arg("activation_args")
        return float(low), float(high)
    return _FUSED_BOUNDS.get(str(call.arg("activation")))


_FUSED_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "relu": (0.0, None),
    "relu6": (0.0, 6.0),
    "hardswish": (0.0, None),
}


def differences(
    actual: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> Iterator[float]:
    """The relative error of each output; one infinity where the numbers of outputs differ."""
    if len(actual) != len(reference):
        yield math.inf
        return
    for a, r in zip(actual, reference, strict=True):
        yield relative_error(a, r)
