"""Insertion: calibrated fake-quants put into a program, for the passes that quantise it.

    y = conv2d(x, W, b)
      -->
    y = conv2d(fake_quant(x, s_x, z_x), fake_quant(W, s_W, 0), b)

Which tensors, on which grids, is the target's `QuantScheme` (see `quant_placement`); the bits of
each layer are the caller's (see `bit_widths`). Activation ranges come from one walk over
calibration data (see `calibration`), weight scales from the weights (see `weight_ranges`). Weights
and biases stay float in the program: backends store the integers. Scales and zero points are
buffers next to the layer's parameters (``conv1.weight_scale``).

What is promised of the result beside a noise budget is in `quant_promises`.

Residual adds and average pools are quantised only next to a quantised layer: between layers that
stay float they would cost accuracy and conversions for nothing.

Limits: at most the bits of the target's grids; embedding tables stay float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from pruna_ir.calibration import (
    Histogram,
    Method,
    MinMax,
    Observer,
    calibration_data,
    clipped_fraction,
    estimate,
    layer_name,
    observe,
    sqnr_db,
    too_few,
)
from pruna_ir.call import bind_arguments
from pruna_ir.errors import UsageError
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.passes.bit_widths import (
    MOST_BITS,
    Width,
    WidthRules,
    check_globs,
    end_layers,
    matches,
)
from pruna_ir.passes.fake_quant_nodes import (
    Shared,
    existing,
    parameters_of,
    quantise_activations,
    quantise_weight,
)
from pruna_ir.passes.quant_placement import (
    ATTENTION,
    AVERAGES,
    KINDS,
    Placement,
    candidates,
    is_float,
    is_quantised,
    layers_of,
    place,
    takes_queries,
    wanted_bits,
)
from pruna_ir.passes.quant_promises import Bypassed, OnGrid, WeightErrors
from pruna_ir.passes.weight_ranges import weight_parameters
from pruna_ir.program import Origin, computed_nodes
from pruna_ir.quantization import Grid, QuantParameters, QuantScheme
from pruna_ir.registry import find_backend
from pruna_ir.transform import Pass, Rewrite

aten = torch.ops.aten

QUANTIZED_FOR = "quantized-for"
"""The program attribute that names the target whose grids a program is quantised on."""

DB_PER_BIT = 6.02
"""What one bit more gains: 20 * log10(2)."""
DEFAULT_SAMPLES = 128
"""How many samples are taken where the option does not say."""


def noise_budget(bits: int) -> float:
    """The least SQNR in dB to accept of a program whose narrowest grid has so many bits.

    >>> noise_budget(8)
    20.0
    """
    return Pass.min_sqnr_db - DB_PER_BIT * (MOST_BITS - bits)


@dataclass(frozen=True)
class Insertion:
    """How fake-quants are put into a program; the options are those of insert-fake-quant.

    Attributes:
        owner: the pass that asks, for messages.
    """

    owner: str
    target: str = ""
    ranges: Method = "mse"
    percentile: float = 99.99
    weights: Literal["minmax", "mse"] = "minmax"
    granularity: Literal["channel", "tensor"] = "channel"
    activations: Literal["target", "symmetric", "asymmetric"] = "target"
    scales: Literal["any", "powers-of-two"] = "any"
    bits: tuple[str, ...] = ()
    ends: str = ""
    products: bool | None = None
    samples: int | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.widths()
        if not 50.0 < self.percentile <= 100.0:
            raise UsageError(
                f"{self.owner}: percentile must be above 50 and at most 100, not {self.percentile}"
            )
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"{self.owner}: samples must be at least 1, not {self.samples}")

    def widths(self) -> WidthRules:
        """What the options say of each layer's width."""
        return WidthRules.parse(self.bits, self.ends)

    def insert(self, rw: Rewrite) -> None:
        """Place, calibrate, insert; states what must hold of the result.

        Raises:
            UsageError: there is no target, or no data.
            PassError: the program is quantised for another target, or its data is not finite.
        """
        target = self._target(rw)
        scheme = self._scheme(target)
        _refuse(rw, target)
        check_globs("exclude", self.exclude, list(candidates(rw.program)))
        rules = self.widths()
        rules.check(layers_of(rw.program))
        spelt_out = _unfuse(rw, scheme)
        chosen = self._chosen(rw, scheme, rules)
        _note_float_parts(rw, scheme)
        layers = {node: width for node, width in chosen.items() if node.target in KINDS}
        bits = {node: width.activation for node, width in layers.items()}
        plan = place(rw.program, scheme, list(chosen), bits)
        weights = self._weights(rw, scheme, layers)
        if not plan.readers and not weights:
            return
        parameters = self._calibrate(rw, plan)
        quantise_activations(rw, plan, parameters)
        for node, found in weights.items():
            quantise_weight(rw, node, found)
        for node, width in layers.items():
            rw.applied(node, f"{layer_name(node)}: {width} for {target}")
        self._assure(rw, plan, {n: scheme.weight.with_bits(layers[n].weight) for n in weights})
        rw.assure(Bypassed(spelt_out))
        rw.set_attribute(QUANTIZED_FOR, target)
        rw.set_origin(Origin(rw.before, {}))

    def _target(self, rw: Rewrite) -> str:
        if self.target and rw.context.target and self.target != rw.context.target:
            raise UsageError(
                f"{self.owner}: target={self.target} was asked for, but the pipeline runs for "
                f"'{rw.context.target}'; leave the option out or make them agree"
            )
        if target := self.target or rw.context.target:
            return target
        raise UsageError(
            f"{self.owner} must know its target, since targets need different grids; give "
            f"{self.owner}{{target=onnx}} or a target for the whole pipeline"
        )

    def _scheme(self, target: str) -> QuantScheme:
        """The target's scheme, with what the options change of it."""
        scheme = _scheme(target)
        if self.products is not None:
            scheme = replace(scheme, attention=self.products)
        scheme = self._signs(scheme, target)
        if self.scales == "any":
            return scheme
        return replace(
            scheme,
            activation=replace(scheme.activation, powers=True),
            weight=replace(scheme.weight, powers=True),
        )

    def _signs(self, scheme: QuantScheme, target: str) -> QuantScheme:
        """The scheme with activations of the sort that the option wants."""
        own = scheme.activation
        if self.activations == "target" or (self.activations == "symmetric") == own.symmetric:
            return scheme
        if own.symmetric:
            raise UsageError(
                f"{self.owner}: activations=asymmetric was asked for, but '{target}' takes zero "
                "points of 0 only; leave the option out, or quantise for another target"
            )
        half = 2 ** (own.bits - 1)
        return replace(scheme, activation=Grid(-half, half - 1, symmetric=True))

    def _chosen(
        self, rw: Rewrite, scheme: QuantScheme, rules: WidthRules
    ) -> dict[fx.Node, Width]:
        """The layers, adds and average pools to quantise; remarks say which layers are not."""
        computed = computed_nodes(rw.program)
        ends = end_layers(layers_of(rw.program)) if self.ends else set()
        full = Width(scheme.weight.bits, scheme.activation.bits)
        chosen = {}
        for node in candidates(rw.program):
            if not rw.in_scope(node):
                continue
            rule = rules.rule_for(node, ends)
            width = full if rule is None else rule.width
            reason = self._excluded(node) or ("" if width else f"kept float by '{rule}'")
            if not reason and node.target in KINDS:
                reason = _unquantisable(rw, scheme, node, computed)
            if width is not None and not reason:
                chosen[node] = width
            elif node.target in KINDS:
                rw.skip(node, reason)
        quantised = {node for node in chosen if node.target in KINDS}
        return {
            node: width for node, width in chosen.items()
            if node in quantised or any(n in quantised or _reads_fake_quant(n) for n in near(node))
        }  # fmt: skip

    def _excluded(self, node: fx.Node) -> str:
        hit = next((glob for glob in self.exclude if matches(node, glob)), None)
        return f"excluded by '{hit}'" if hit is not None else ""

    def _assure(self, rw: Rewrite, plan: Placement, weights: Mapping[fx.Node, Grid]) -> None:
        """State which grid everything that was inserted is on, and what rounding costs weights."""
        grids: dict[str, set[Grid]] = {}
        for value, readers in plan.readers.items():
            for reader, bits in readers.items():
                grid = plan.grid(value, bits)
                grids.setdefault(reader.name, set()).add(grid)
        rw.assure(
            OnGrid(
                {node.name: grid for node, grid in weights.items()},
                {name: frozenset(found) for name, found in grids.items()},
                self.granularity == "channel",
            )
        )
        rw.assure(WeightErrors(self.weights, self.scales == "powers-of-two"))

    # -- activations -----------------------------------------------------------------------

    def _calibrate(self, rw: Rewrite, plan: Placement) -> dict[Shared, QuantParameters]:
        """The parameters of each group of tensors, by the group's root and their bits."""
        needed: dict[Shared, list[fx.Node]] = {}
        known: dict[Shared, QuantParameters] = {}
        for value, bits in wanted_bits(plan):
            key = (plan.root(value), bits)
            there = existing(value, plan.grid(value, bits))
            if there is None:
                needed.setdefault(key, []).append(value)
            else:
                known[key] = parameters_of(rw, there)
        unknown_roots = {root for root, bits in needed if (root, bits) not in known}
        observers = {root: self._observer() for root in unknown_roots}
        observed = {
            value: observers[plan.root(value)]
            for value in plan.readers
            if value not in plan.carried and plan.root(value) in unknown_roots
        }
        if observed:
            self._observe(rw, observed)
        for (root, bits), values in needed.items():
            if (root, bits) in known:
                continue
            name, seen = layer_name(values[0]), observers[root]
            found = self._estimate(seen, plan.grid(values[0], bits), name)
            if plan.wants_signed(values, found):
                plan.signed.add(values[0])
                found = self._estimate(seen, plan.grid(values[0], bits), name)
            known[root, bits] = found
            rw.note(values[0], f"{name}: {_summary(seen, found)}")
        return known

    def _estimate(self, seen: Observer, grid: Grid, name: str) -> QuantParameters:
        return estimate(seen, self.ranges, grid, name, self.percentile)

    def _observe(self, rw: Rewrite, observed: Mapping[fx.Node, Observer]) -> None:
        samples = self.samples or DEFAULT_SAMPLES
        data = calibration_data(rw.context.data, self.owner, self.samples)
        done = observe(
            rw.program, observed, data, samples=samples, progress=rw.context.progress
        )
        if self.samples is not None and done < self.samples:
            raise too_few(self.owner, done, self.samples)

    def _observer(self) -> Observer:
        return MinMax() if self.ranges == "minmax" else Histogram()

    # -- weights ---------------------------------------------------------------------------

    def _weights(
        self, rw: Rewrite, scheme: QuantScheme, layers: Mapping[fx.Node, Width]
    ) -> dict[fx.Node, QuantParameters]:
        """The parameters of each layer's weight that is constant and not quantised yet."""
        found = {}
        for node, width in layers.items():
            call, kind = rw.call(node), KINDS[node.target]
            source, weight = call.producer(kind.weight), call.parameter(kind.weight)
            if source is None or weight is None:
                continue
            axis = kind.axis % weight.dim() if self.granularity == "channel" else None
            grid = scheme.weight.with_bits(width.weight)
            found[node] = weight_parameters(weight, grid, axis, str(source.target), self.weights)
        return found


def _scheme(target: str) -> QuantScheme:
    scheme = getattr(find_backend(target), "scheme", None)
    if not isinstance(scheme, QuantScheme):
        raise UsageError(f"backend '{target}' states no quantisation scheme; quantise for another")
    return scheme


def _refuse(rw: Rewrite, target: str) -> None:
    """Refuse programs on which the pass would do the wrong thing."""
    earlier = rw.program.attributes.get(QUANTIZED_FOR, target)
    if earlier != target:
        raise UsageError(
            f"the program is already quantised for '{earlier}', whose grids differ from those of "
            f"'{target}'; start from the float program"
        )
    for node in rw.calls():
        fused_by = _FUSED_LINEARS.get(str(node.target))
        if fused_by is not None:
            raise rw.error(
                node,
                f"its linears are fused already; run insert-fake-quant before {fused_by}",
            )


_FUSED_LINEARS = {
    "pruna.attention_block.default": "fuse-attention-blocks",
    "pruna.ffn.default": "fuse-ffn",
    "pruna.pooled_linear.default": "fuse-pooled-heads",
}


def _unfuse(rw: Rewrite, scheme: QuantScheme) -> tuple[str, ...]:
    """Spell out fused convolutions between whose parts the scheme wants a fake-quant.

    Returns their names.
    """
    found = []
    for node in rw.calls(CONV_ACT.op):
        bound = bind_arguments(node)
        residual = bound["residual"] is not None
        keeps_float = bound["activation"] not in ("none", "relu", "relu6", "hardtanh") or (
            bound["activation"] == "hardtanh" and bound["activation_args"][0] != 0
        )
        if (residual and scheme.residual == "both") or (
            scheme.layer_outputs and (residual or keeps_float)
        ):
            rw.note(node, "spelt out again: the target quantises between its parts")
            found.append(node.name)
            rw.inline(node, CONV_ACT.reference, bound)
    return tuple(found)


def _unquantisable(
    rw: Rewrite, scheme: QuantScheme, node: fx.Node, computed: Collection[fx.Node]
) -> str:
    """Why a layer stays float; empty where it can be quantised."""
    call, kind = rw.call(node), KINDS[node.target]
    value, weight = call.producer(kind.input), call.producer(kind.weight)
    if value is None or weight is None or not is_float(value) or not is_float(weight):
        return "its operands are no float tensors"
    if value not in computed:
        return "its first operand is a constant; only weights on the second are quantised"
    if weight.meta["val"].dim() < 2:
        return "its weight is a vector: there are no output channels"
    if weight.op == "get_attr" or is_quantised(weight):
        return ""
    if weight not in computed:
        if _is_behind_a_grid(weight):
            return "its weight is on a grid in blocks already; its input stays float"
        return "its weight is computed from constants; run fold-constants first"
    return "" if scheme.attention else "a product of two activations: the target keeps it float"


def _is_behind_a_grid(weight: fx.Node) -> bool:
    """Whether a weight is rearranged from one that is quantised."""
    behind = [weight]
    while behind:
        node = behind.pop()
        if is_quantised(node):
            return True
        behind += node.all_input_nodes
    return False


def near(node: fx.Node) -> set[fx.Node]:
    """The layers whose results an add or average pool reads, and those that read its result.

    Nothing but operators that are no layer, add or pool may stand between.
    """
    found: set[fx.Node] = set()
    for step in (_operands, _readers):
        pending, seen = step(node), {node}
        while pending:
            other = pending.pop()
            if other in seen:
                continue
            seen.add(other)
            if other.target in KINDS:
                found.add(other)
            elif not _is_border(other):
                pending += step(other)
    return found


def _is_border(node: fx.Node) -> bool:
    """Whether a node is an average pool, or an add of two computed values."""
    if node.target is aten.add.Tensor:
        return sum(source.op != "get_attr" for source in node.all_input_nodes) > 1
    return node.target in AVERAGES


def _operands(node: fx.Node) -> list[fx.Node]:
    return [other for other in node.all_input_nodes if other.op == "call_function"]


def _readers(node: fx.Node) -> list[fx.Node]:
    return [other for other in node.users if other.op == "call_function"]


def _reads_fake_quant(node: fx.Node) -> bool:
    """Whether a layer was quantised before, by a run on another scope."""
    return any(is_quantised(source) for source in node.all_input_nodes)


def _note_float_parts(rw: Rewrite, scheme: QuantScheme) -> None:
    """Say which parts around the layers stay float by design, or stand in the way of speed."""
    for node in rw.calls(*ATTENTION):
        if takes_queries(scheme, node):
            rw.note(node, "its first product is quantised; probabilities and value stay float")
        else:
            rw.skip(
                node,
                "fused attention stays float, its projections are quantised; to quantise its "
                "products run spell-out-attention first, with products=true",
            )
    for node in rw.calls(aten.embedding.default):
        rw.skip(node, "embedding tables stay float")
    for node in rw.calls(aten.batch_norm.default):
        source = rw.call(node).producer("input")
        if source is not None and source.target in KINDS:
            rw.note(node, f"not folded into {source.name}; run fold-batch-norm first for speed")


def _summary(seen: Observer, parameters: QuantParameters) -> str:
    scale, zero = float(parameters.scale), int(parameters.zero_point)
    low, high = (parameters.grid.qmin - zero) * scale, (parameters.grid.qmax - zero) * scale
    text = f"range [{low:.4g}, {high:.4g}] of [{seen.low:.4g}, {seen.high:.4g}] observed"
    if isinstance(seen, Histogram):
        clipped = 100.0 * clipped_fraction(seen, parameters)
        text += f", {clipped:.3g} % clipped, {sqnr_db(seen, parameters):.1f} dB"
    return text
