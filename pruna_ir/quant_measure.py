"""What quantisation costs at each layer: a quantised and a float program run side by side.

Both programs are interpreted node by node on the same batches. For a layer y = op(x, W, b) with
fake-quants Q in the quantised program, and x', W', b' the values of the float one:

    own noise          SQNR of op(Q(x), Q(W), b) against op(x, W', b'), x as the quantised program
                       has it: what this layer's own rounding adds
    accumulated noise  SQNR of op(Q(x), Q(W), b) against op(x', W', b'): what all layers up to
                       this one added together
    input noise        SQNR of Q(x) against x
    clipped            the share of x that lies beyond half a step outside of the grid

Sums run over all batches in float64; values at the programs' own precision. The float program is
stepped only as far as the quantised one has come, and values are freed at their last use, so that
memory is that of one batch in two programs, plus a histogram for each fake-quant.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pruna_ir.calibration import Histogram, layer_name, runs
from pruna_ir.call import Call
from pruna_ir.data import DataSource
from pruna_ir.errors import PassError
from pruna_ir.program import Program, computed_nodes
from pruna_ir.quantization import MOVERS, PARTS, fake_quant_op, quantized_operands
from pruna_ir.transform import Progress, no_progress

BINS = 1024
"""Of the histograms of activations."""


@dataclass
class Noise:
    """Sums for a signal-to-quantisation-noise ratio over batches.

    >>> noise = Noise()
    >>> noise.add(torch.tensor([1.0, 1.9]), torch.tensor([1.0, 2.0]))
    >>> round(noise.db, 2)
    26.99
    """

    signal: float = 0.0
    noise: float = 0.0

    def add(self, actual: torch.Tensor, reference: torch.Tensor) -> None:
        """Count one more batch; other shapes and NaN count as infinite noise."""
        if actual.shape != reference.shape:
            self.noise = math.inf
            return
        truth = reference.detach().double()
        lost = float((actual.detach().double() - truth).square().sum())
        self.noise += math.inf if math.isnan(lost) else lost
        self.signal += float(truth.square().sum())

    @property
    def db(self) -> float:
        """10 log10(signal / noise); infinite without noise, minus infinity for noise alone."""
        if self.noise == 0.0:
            return math.inf
        if math.isinf(self.noise) or self.signal == 0.0:
            return -math.inf
        return 10.0 * math.log10(self.signal / self.noise)


@dataclass
class Rounding:
    """What one fake-quant did to all values that it saw."""

    seen: Histogram = field(default_factory=lambda: Histogram(BINS))
    noise: Noise = field(default_factory=Noise)
    clipped: int = 0
    count: int = 0
    scale: tuple[float, float] = (math.inf, -math.inf)
    zero_point: tuple[int, int] = (2**31, -(2**31))
    reach: tuple[float, float] = (math.inf, -math.inf)
    """The smallest and largest number that the grid holds, over channels and batches."""

    def add(self, call: Mapping[str, Any], result: torch.Tensor, where: str) -> None:
        """Count one call of a fake-quant, given by its arguments' values.

        Raises:
            PassError: a value is NaN or infinite.
        """
        x = call["x"].detach()
        if not x.numel():
            return
        if not bool(torch.isfinite(x).all()):
            raise PassError(f"{where} reads NaN or infinity; repair data or model")
        scale, zero = _along(call["scale"], call, x), _along(call["zero_point"], call, x)
        low = (call["qmin"] - zero) * scale
        high = (call["qmax"] - zero) * scale
        outside = (x < low - 0.5 * scale) | (x > high + 0.5 * scale)
        self.clipped += int(outside.sum())
        self.count += x.numel()
        self.noise.add(result, x)
        self.seen.update(x)
        self.scale = _wider(self.scale, scale)
        self.reach = _wider(_wider(self.reach, low), high)
        ends = _wider(self.zero_point, zero)
        self.zero_point = int(ends[0]), int(ends[1])


def _along(parameter: torch.Tensor, call: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """A scale or zero point in float64, shaped to broadcast along its axis."""
    value, axis = parameter.detach().double(), call["axis"]
    if axis is None:
        return value.reshape(())
    return value.reshape([-1] + [1] * (x.dim() - 1 - axis % x.dim()))


def _wider(range_: tuple[float, float], values: torch.Tensor) -> tuple[float, float]:
    return min(range_[0], float(values.min())), max(range_[1], float(values.max()))


@dataclass
class Layer:
    """One layer with fake-quantised operands, and its noise.

    Attributes:
        node: of the quantised program.
        operands: name, node and fake-quant of each quantised operand.
        own: what its own rounding adds; None where the result is no float tensor.
        accumulated: against the float program at the same node; None likewise.
        weights: for each operand that is constant: the SQNR of what the layer reads.
        floats: what the float program has in place of the layer's constant operands.
    """

    node: fx.Node
    operands: list[tuple[str, fx.Node, fx.Node]]
    own: Noise | None = None
    accumulated: Noise | None = None
    weights: dict[str, Noise] = field(default_factory=dict)
    floats: dict[fx.Node, torch.Tensor] = field(default_factory=dict)


@dataclass
class Measured:
    """Everything that was measured.

    Attributes:
        layers: in graph order.
        roundings: what each fake-quant did; those of constants saw them once.
        outputs: the noise of each output of the program, by name.
        samples: how many samples were run.
    """

    layers: list[Layer]
    roundings: dict[fx.Node, Rounding]
    outputs: dict[str, Noise]
    samples: int = 0


def measure(
    program: Program,
    reference: Program,
    data: DataSource,
    *,
    samples: int,
    progress: Progress = no_progress,
) -> Measured:
    """Run both programs on data and compare them layer by layer.

    Args:
        program: the quantised program.
        reference: the float program, with the quantised one's node names; or the quantised one
            itself, which is then run without its fake-quants.
        data: batches of inputs.
        samples: stop after this many.
        progress: called after each batch.

    Raises:
        UsageError: the data is empty or does not fit the program.
        PassError: an activation is NaN or infinite; the layer is named.
    """
    found = Measured(_layers(program, reference), {}, {})
    with torch.no_grad():
        _constants(program, found)
        for inputs in runs(program, data, samples):
            _Pair(program, reference, found).run(inputs)
            found.samples += len(inputs[0]) if inputs[0].dim() else 1
            progress("quantisation report", found.samples, max(found.samples, samples))
    return found


# -- what does not depend on data ----------------------------------------------------------------


def _layers(program: Program, reference: Program) -> list[Layer]:
    others = {node.name: node for node in reference.graph.nodes}
    computed = computed_nodes(program)
    layers = []
    for node in program.calls():
        operands = quantized_operands(node)
        if not operands or node not in computed:
            continue
        layer = Layer(node, operands)
        if isinstance(node.meta.get("val"), torch.Tensor):
            layer.own, layer.accumulated = Noise(), Noise()
        other = others.get(node.name)
        for source in node.all_input_nodes:
            if source not in computed:
                layer.floats[source] = _float_value(program, reference, source, other)
        layers.append(layer)
    return layers


def _float_value(
    program: Program, reference: Program, source: fx.Node, other: fx.Node | None
) -> torch.Tensor:
    """What the float program reads where the quantised one reads a constant."""
    own = evaluated(program, source, bypass=True)
    if reference is program or other is None:
        return own
    target = _first_tensor(source)
    for candidate in other.all_input_nodes:
        if _first_tensor(candidate) == target:
            value = evaluated(reference, candidate, bypass=True)
            return value if value.shape == own.shape else own
    return own


def _first_tensor(node: fx.Node) -> str:
    """The name of the tensor that a constant is a view of; empty where it is none."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else ""


def evaluated(program: Program, node: fx.Node, *, bypass: bool) -> torch.Tensor:
    """The value of a constant node; ``bypass`` leaves fake-quants out."""
    op = fake_quant_op()

    def value(current: fx.Node) -> Any:
        if current.op == "get_attr":
            return program.tensor(str(current.target)).detach()
        if bypass and current.target is op:
            source = Call(program, current).producer("x")
            assert source is not None
            return value(source)
        args, kwargs = fx.map_arg((current.args, current.kwargs), value)
        target: Any = current.target
        return target(*args, **kwargs)

    result: torch.Tensor = value(node)
    return result


def _constants(program: Program, found: Measured) -> None:
    """The roundings of weights, and the noise of what layers read of them."""
    for layer in found.layers:
        for name, operand, fake in layer.operands:
            exact = layer.floats.get(operand)
            if exact is None:
                continue
            layer.weights[name] = Noise()
            layer.weights[name].add(evaluated(program, operand, bypass=False), exact)
            if fake in found.roundings:
                continue
            call = Call(program, fake)
            bound: dict[str, Any] = {k: call.arg(k) for k in ("axis", "qmin", "qmax")}
            for key in ("x", "scale", "zero_point"):
                source = call.producer(key)
                assert source is not None
                bound[key] = evaluated(program, source, bypass=False)
            rounding = found.roundings[fake] = Rounding()
            rounding.add(bound, evaluated(program, fake, bypass=False), layer_name(layer.node))


# -- the two walks -------------------------------------------------------------------------------


class _Steps:
    """Runs a graph node by node and frees every value at its last use."""

    def __init__(self, program: Program, inputs: Sequence[torch.Tensor]) -> None:
        self.interpreter = fx.Interpreter(
            program.module, garbage_collect_values=True, graph=program.graph
        )
        self.interpreter.args_iter = iter(inputs)
        self.interpreter.extra_traceback = False
        self.values = self.interpreter.env

    def compute(self, node: fx.Node) -> Any:
        """The node's value, which is kept until `free`."""
        self.values[node] = self.interpreter.run_node(node)
        return self.values[node]

    def free(self, node: fx.Node) -> list[fx.Node]:
        """Forget the values that nobody reads after this node; returns whose they were."""
        gone = self.interpreter.user_to_last_uses.get(node, [])
        for dead in gone:
            del self.values[dead]
        return gone


def _float_steps(
    program: Program, inputs: Sequence[torch.Tensor], *, bypass: bool
) -> Iterator[tuple[str, Any]]:
    """The names and values of a program's nodes, as they are computed."""
    steps, op = _Steps(program, inputs), fake_quant_op()
    for node in program.graph.nodes:
        if bypass and node.target is op:
            source = Call(program, node).producer("x")
            assert source is not None
            steps.values[node] = steps.values[source]
            yield node.name, steps.values[node]
        else:
            yield node.name, steps.compute(node)
        steps.free(node)


class _Pair:
    """A quantised program on one batch, with the float program behind it, step by step."""

    def __init__(self, program: Program, reference: Program, found: Measured) -> None:
        self._program, self._reference, self._found = program, reference, found
        self._layers = {layer.node: layer for layer in found.layers}
        names = {node.name for node in reference.graph.nodes}
        self._shared = {layer.node.name for layer in found.layers} & names
        self._computed = computed_nodes(program)
        self._op = fake_quant_op()
        self._plain: dict[fx.Node, Any] = {}
        """The values before their rounding, of fake-quants and movers behind them."""

    def run(self, inputs: Sequence[torch.Tensor]) -> None:
        """One batch."""
        steps = _Steps(self._program, inputs)
        others = _float_steps(
            self._reference, inputs, bypass=self._reference is self._program
        )
        ahead: dict[str, Any] = {}
        for node in self._program.graph.nodes:
            result = steps.compute(node)
            if node.op == "output":
                break
            self._unrounded(node, result, steps.values)
            layer = self._layers.get(node)
            if layer is not None:
                self._compare(layer, result, steps.values, self._until(node.name, others, ahead))
            for dead in steps.free(node):
                self._plain.pop(dead, None)
        self._outputs(result, self._until("output", others, ahead))

    def _until(self, name: str, others: Iterator[tuple[str, Any]], ahead: dict[str, Any]) -> Any:
        """The float program's value of this name; None where it has no such node."""
        if name not in self._shared and name != "output":
            return None
        while name not in ahead:
            own, value = next(others)
            if own in self._shared or own == "output":
                ahead[own] = value
        return ahead.pop(name)

    def _unrounded(self, node: fx.Node, result: Any, values: Mapping[fx.Node, Any]) -> None:
        """Note what stood before a fake-quant, and what a mover makes of that."""
        if node not in self._computed:
            return
        if node.target is self._op:
            call = Call(self._program, node)
            source = call.producer("x")
            assert source is not None
            self._plain[node] = values[source]
            bound = {k: call.arg(k) for k in ("x", "scale", "zero_point", "axis", "qmin", "qmax")}
            bound = {k: values[v] if isinstance(v, fx.Node) else v for k, v in bound.items()}
            rounding = self._found.roundings.setdefault(node, Rounding())
            reader = next(iter(node.users), node)
            rounding.add(bound, result, f"{layer_name(reader)} ({node.name})")
        elif _moves(node) and any(source in self._plain for source in node.all_input_nodes):
            self._plain[node] = _called(node, self._plain, values)

    def _compare(
        self, layer: Layer, result: Any, values: Mapping[fx.Node, Any], other: Any
    ) -> None:
        if layer.own is not None:
            layer.own.add(result, _called(layer.node, {**self._plain, **layer.floats}, values))
        if not isinstance(other, torch.Tensor):
            layer.accumulated = None
        elif layer.accumulated is not None:
            layer.accumulated.add(result, other)

    def _outputs(self, results: Sequence[Any], others: Sequence[Any]) -> None:
        for spec, value, other in zip(self._program.outputs, results, others, strict=True):
            if spec.dtype.is_floating_point:
                self._found.outputs.setdefault(spec.name, Noise()).add(value, other)


def _moves(node: fx.Node) -> bool:
    """Whether a node gives out values of its operands and no others."""
    return node.target in MOVERS | PARTS or node.target is operator.getitem


def _called(node: fx.Node, first: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any]) -> Any:
    """A call's result on other operands, where ``first`` names some."""
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: first[n] if n in first else values[n]
    )
    target: Any = node.target
    return target(*args, **kwargs)
