"""Float programs quantised by hand, to any bits, with the float program as their origin."""

from __future__ import annotations

import torch

from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.layer_inputs import observed
from pruna_ir.passes.quant_placement import KINDS
from pruna_ir.program import Origin, Program
from pruna_ir.quantization import U8_ASYMMETRIC, Grid, QuantParameters, choose_parameters
from pruna_ir.transform import Context, Rewrite
from pruna_ir.verify import verify


def quantised(
    program: Program, where: Context, bits: int = 4, *, weight_only: bool = False,
    leave: tuple[str, ...] = (), clip: float = 1.0,
) -> Program:
    """Weights on symmetric grids by output channel, inputs of layers on u8 by their range.

    Layers whose node is in ``leave`` stay float; ``clip`` shrinks the range of the weights.
    """
    limit = 2 ** (bits - 1) - 1
    rw = Rewrite(program, "quantise", where)
    done: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in rw.calls(*KINDS):
        call, kind = rw.call(node), KINDS[node.target]
        weight, source = call.parameter(kind.weight), call.producer(kind.weight)
        if weight is None or node.name in leave:
            continue
        axis = kind.axis % weight.dim()
        largest = clip * weight.detach().movedim(axis, 0).flatten(1).abs().amax(1)
        grid = Grid(-limit, limit, symmetric=True)
        chosen = choose_parameters(-largest, largest, grid, node.name, axis)
        rw.update(node, **{kind.weight: _fake(rw, source, chosen, f"{source.target}", node)})
        value = call.producer(kind.input)
        if not weight_only:
            if value not in done:
                done[value] = _fake(rw, value, _range(program, where, value), value.name, node)
            rw.update(node, **{kind.input: done[value]})
    rw.set_origin(Origin(program, {}))
    result = rw.finish()
    verify(result)
    return result


def _range(program: Program, where: Context, value: torch.fx.Node) -> QuantParameters:
    (own,) = (n for n in program.graph.nodes if n.name == value.name)
    if own.op == "placeholder":
        seen = [batch.inputs[program.placeholders().index(own)] for batch in where.data]
    else:
        seen = [observed(program, batch.inputs, [own])[own] for batch in where.data]
    low, high = (float(torch.cat([x.flatten() for x in seen]).aminmax()[i]) for i in (0, 1))
    return choose_parameters(low, high, U8_ASYMMETRIC, value.name)


def _fake(
    rw: Rewrite, value: torch.fx.Node, chosen: QuantParameters, name: str, before: torch.fx.Node
) -> torch.fx.Node:
    scale = rw.constant(chosen.scale, f"{name}_scale", before=before)
    zero = rw.constant(chosen.zero_point, f"{name}_zero_point", before=before)
    return rw.insert(
        FAKE_QUANT.op, before=before, like=before, x=value, scale=scale, zero_point=zero,
        axis=chosen.axis, qmin=chosen.grid.qmin, qmax=chosen.grid.qmax,
    )  # fmt: skip
