"""Insert calibrated fake-quants: static int8 post-training quantisation for one target.

    y = conv2d(x, W, b)
      -->
    y = conv2d(fake_quant(x, s_x, z_x), fake_quant(W, s_W, 0), b)

Which tensors, on which grids, is the target's `QuantScheme` (see `quant_placement`); activation
ranges come from one walk over calibration data (see `calibration`); weights get one scale per
output channel, max|w| / qmax or the one of least squared error. Weights and biases stay float in
the program: backends store the integers. Scales and zero points are buffers next to the layer's
parameters (``conv1.weight_scale``).

Limits: 8-bit grids as the target states them; attention through
``scaled_dot_product_attention`` and embedding tables stay float.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from pruna_ir.calibration import (
    Histogram,
    Method,
    MinMax,
    Observer,
    clipped_fraction,
    estimate,
    layer_name,
    observe,
    sqnr_db,
)
from pruna_ir.call import bind_arguments
from pruna_ir.errors import UsageError
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.quant_placement import (
    ATTENTION,
    KINDS,
    Placement,
    candidates,
    is_float,
    is_quantised,
    place,
)
from pruna_ir.program import Origin, computed_nodes, module_path
from pruna_ir.quantization import Grid, QuantParameters, QuantScheme, choose_parameters
from pruna_ir.registry import find_backend, unknown
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten

QUANTIZED_FOR = "quantized-for"
"""The program attribute that names the target whose grids a program is quantised on."""


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Quantise layers to int8 for one target, with ranges from calibration data.

    Options:
        target: the backend whose grids and placement to use; the pipeline's target by default.
        ranges: how activation ranges are chosen: ``mse``, ``minmax``, ``percentile`` or ``kl``.
        percentile: the share of values, in percent, that ``percentile`` keeps on each side.
        weights: how weight scales are chosen: ``minmax``, or ``mse`` per channel.
        samples: how many samples of the data to calibrate on.
        exclude: globs over module paths whose layers stay float, such as ``head`` or ``layer4*``.
        min_sqnr_db: the lowest signal-to-quantisation-noise ratio of any output, against the
            program before, that the pipeline accepts. 20 dB (noise at a tenth of the signal) is a
            net for wrong grids, axes and ranges, not a statement about accuracy: trained CNNs
            reach 25 to 40 dB, and one spoiled layer in a residual branch can stay above 20.

    Requires: calibration data in the context; folded batch norms for full speed.
    """

    name: ClassVar[str] = "insert-fake-quant"
    effect: ClassVar[Effect] = Effect.BOUNDED

    target: str = ""
    ranges: Method = "mse"
    percentile: float = 99.99
    weights: Literal["minmax", "mse"] = "minmax"
    samples: int = 128
    exclude: tuple[str, ...] = ()
    min_sqnr_db: float = 20.0  # type: ignore[misc]  # a budget that users can set

    def rewrite(self, rw: Rewrite) -> None:
        """Place, calibrate, insert."""
        target = self._target(rw)
        scheme = _scheme(target)
        _refuse(rw, target)
        _check_globs(rw, self.exclude)
        _unfuse(rw, scheme)
        computed = computed_nodes(rw.program)
        chosen = [
            node
            for node in candidates(rw.program)
            if rw.in_scope(node) and self._accepts(rw, scheme, node, computed)
        ]
        _note_float_parts(rw)
        plan = place(rw.program, scheme, chosen)
        layers = [node for node in chosen if node.target in KINDS]
        fresh = [node for node in layers if _float_weight(rw, node) is not None]
        if not plan.readers and not fresh:
            return
        parameters = self._calibrate(rw, plan)
        _quantise_activations(rw, plan, parameters)
        for node in fresh:
            self._quantise_weight(rw, node, scheme.weight)
        for node in layers:
            rw.applied(node, f"{layer_name(node)}: int8 for {target}")
        rw.set_attribute(QUANTIZED_FOR, target)
        rw.set_origin(Origin(rw.before, {}))

    def _target(self, rw: Rewrite) -> str:
        if self.target and rw.context.target and self.target != rw.context.target:
            raise UsageError(
                f"{self.name}: target={self.target} was asked for, but the pipeline runs for "
                f"'{rw.context.target}'; leave the option out or make them agree"
            )
        if target := self.target or rw.context.target:
            return target
        raise UsageError(
            f"{self.name} must know its target, since targets need different grids; give "
            f"{self.name}{{target=onnx}} or a target for the whole pipeline"
        )

    def _accepts(
        self, rw: Rewrite, scheme: QuantScheme, node: fx.Node, computed: Collection[fx.Node]
    ) -> bool:
        """Whether a candidate may be quantised; says why not where it is a layer."""
        reason = self._excluded(node)
        if not reason and node.target in KINDS:
            reason = _unquantisable(rw, scheme, node, computed)
        if reason and node.target in KINDS:
            rw.skip(node, reason)
        return not reason

    def _excluded(self, node: fx.Node) -> str:
        path = layer_name(node)
        hit = next((glob for glob in self.exclude if _matches(path, glob)), None)
        return f"excluded by '{hit}'" if hit is not None else ""

    # -- activations -----------------------------------------------------------------------

    def _calibrate(self, rw: Rewrite, plan: Placement) -> dict[fx.Node, QuantParameters]:
        """The parameters of each group of tensors, by the group's root."""
        observers: dict[fx.Node, Observer] = {}
        observed: dict[fx.Node, Observer] = {}
        for value in plan.readers:
            if value not in plan.carried and _existing(value) is None:
                root = plan.root(value)
                observed[value] = observers.setdefault(root, self._observer())
        if not observed:
            return {}
        if rw.context.data is None:
            raise UsageError(
                f"{self.name} calibrates activation ranges on data, and there is none; give "
                "calibration data (--data FILE.npz, or Context(data=...))"
            )
        observe(
            rw.program, observed, rw.context.data,
            samples=self.samples, progress=rw.context.progress,
        )  # fmt: skip
        found = {}
        for root, seen in observers.items():
            first = next(value for value in observed if plan.root(value) is root)
            name = layer_name(first)
            found[root] = estimate(
                seen, self.ranges, plan.scheme.activation, name, self.percentile
            )
            rw.note(first, f"{name}: {_summary(seen, found[root])}")
        return found

    def _observer(self) -> Observer:
        return MinMax() if self.ranges == "minmax" else Histogram()

    # -- weights ---------------------------------------------------------------------------

    def _quantise_weight(self, rw: Rewrite, node: fx.Node, grid: Grid) -> None:
        call, kind = rw.call(node), KINDS[node.target]
        source, weight = call.producer(kind.weight), call.parameter(kind.weight)
        if source is None or weight is None:
            raise rw.error(node, "its weight is no constant")
        axis = kind.axis % weight.dim()
        parameters = weight_parameters(weight, grid, axis, str(source.target), self.weights)
        scale, zero = _constants(rw, parameters, str(source.target), node)
        fake = _insert(rw, source, scale, zero, parameters, before=node, like=node)
        rw.update(node, **{kind.weight: fake})


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
        if str(node.target).startswith("pruna.ffn"):
            raise rw.error(
                node, "its linears are fused already; run insert-fake-quant before fuse-ffn"
            )


def _matches(path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or fnmatchcase(path, f"{glob}.*")


def _check_globs(rw: Rewrite, globs: tuple[str, ...]) -> None:
    paths = {layer_name(node) for node in candidates(rw.program) if node.target in KINDS}
    for glob in globs:
        if not any(_matches(path, glob) for path in paths):
            raise UsageError(f"exclude: {unknown('layer', glob, paths)}")


def _unfuse(rw: Rewrite, scheme: QuantScheme) -> None:
    """Spell out fused convolutions between whose parts the scheme wants a fake-quant."""
    for node in rw.calls(CONV_ACT.op):
        bound = bind_arguments(node)
        residual = bound["residual"] is not None
        keeps_float = bound["activation"] in ("hardswish", "silu") or (
            bound["activation"] == "hardtanh" and bound["activation_args"][0] != 0
        )
        if (residual and scheme.residual == "both") or (
            scheme.layer_outputs and (residual or keeps_float)
        ):
            rw.note(node, "spelt out again: the target quantises between its parts")
            rw.inline(node, CONV_ACT.reference, bound)


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
        return "its weight is computed from constants; run fold-constants first"
    return "" if scheme.attention else "a product of two activations: the target keeps it float"


def _note_float_parts(rw: Rewrite) -> None:
    """Say which parts around the layers stay float by design, or stand in the way of speed."""
    for node in rw.calls(*ATTENTION):
        rw.skip(node, "scaled_dot_product_attention stays float; its projections are quantised")
    for node in rw.calls(aten.embedding.default):
        rw.skip(node, "embedding tables stay float")
    for node in rw.calls(aten.batch_norm.default):
        source = rw.call(node).producer("input")
        if source is not None and source.target in KINDS:
            rw.note(node, f"not folded into {source.name}; run fold-batch-norm first for speed")


def _float_weight(rw: Rewrite, node: fx.Node) -> torch.Tensor | None:
    """The layer's constant weight, where it is not quantised yet."""
    return rw.call(node).parameter(KINDS[node.target].weight)


def weight_parameters(
    weight: torch.Tensor, grid: Grid, axis: int, name: str, method: str = "minmax"
) -> QuantParameters:
    """One scale per index of ``axis`` for a constant weight.

    ``mse`` picks, per channel, the best of 41 fractions of max|w| between 0.5 and 1.

    Raises:
        PassError: the weight holds NaN or infinity.
    """
    rows = weight.detach().double().movedim(axis, 0).flatten(1)
    bound = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    best = choose_parameters(-bound, bound, grid, name, axis)
    if method == "minmax":
        return best
    fractions = torch.linspace(1.0, 0.5, 41, dtype=torch.float64)
    found = [choose_parameters(-bound * f, bound * f, grid, name, 0) for f in fractions]
    errors = torch.stack([(p.reals(p.integers(rows)) - rows).square().sum(1) for p in found])
    chosen = errors.argmin(0)
    scale = torch.stack([p.scale for p in found]).gather(0, chosen[None]).squeeze(0)
    return QuantParameters(scale, best.zero_point, grid, axis)


def _existing(value: fx.Node) -> fx.Node | None:
    """The fake-quant that already reads a value, from an earlier run on another scope."""
    return next((user for user in value.users if is_quantised(user)), None)


def _quantise_activations(
    rw: Rewrite, plan: Placement, parameters: dict[fx.Node, QuantParameters]
) -> None:
    shared: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    wanted = [node for node in rw.graph.nodes if node in plan.readers]
    for value in wanted:
        readers = list(plan.readers[value])
        fake = _existing(value)
        if fake is None:
            root = plan.root(value)
            before = _after(value)
            if root not in shared:
                shared[root] = _constants(rw, parameters[root], _output_name(value), before)
            like = value if value.meta.get("nn_module_stack") else readers[0]
            fake = _insert(rw, value, *shared[root], parameters[root], before=before, like=like)
        for reader in readers:
            rw.redirect(reader, {value: fake})


def _after(value: fx.Node) -> fx.Node:
    """The first node behind a value that is no placeholder."""
    node = value.next
    while node.op == "placeholder":
        node = node.next
    return node


def _output_name(value: fx.Node) -> str:
    path = module_path(value).split("@")[0]
    return f"{path}.output" if path else value.name


def _constants(
    rw: Rewrite, parameters: QuantParameters, name: str, before: fx.Node
) -> tuple[fx.Node, fx.Node]:
    scale = rw.constant(parameters.scale, f"{name}_scale", before=before)
    return scale, rw.constant(parameters.zero_point, f"{name}_zero_point", before=before)


def _insert(
    rw: Rewrite,
    value: fx.Node,
    scale: fx.Node,
    zero_point: fx.Node,
    parameters: QuantParameters,
    *,
    before: fx.Node,
    like: fx.Node,
) -> fx.Node:
    arguments: dict[str, Any] = {
        "x": value, "scale": scale, "zero_point": zero_point, "axis": parameters.axis,
        "qmin": parameters.grid.qmin, "qmax": parameters.grid.qmax,
    }  # fmt: skip
    return rw.insert(FAKE_QUANT.op, before=before, like=like, **arguments)


def _summary(seen: Observer, parameters: QuantParameters) -> str:
    scale, zero = float(parameters.scale), int(parameters.zero_point)
    low, high = (parameters.grid.qmin - zero) * scale, (parameters.grid.qmax - zero) * scale
    text = f"range [{low:.4g}, {high:.4g}] of [{seen.low:.4g}, {seen.high:.4g}] observed"
    if isinstance(seen, Histogram):
        clipped = 100.0 * clipped_fraction(seen, parameters)
        text += f", {clipped:.3g} % clipped, {sqnr_db(seen, parameters):.1f} dB"
    return text
