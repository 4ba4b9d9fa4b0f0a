"""Products of the last dimension without the reshapes around them.

    reshape(addmm(b, reshape(x, [-1, K]), W), [.., N])  -->  add(matmul(x, W), b)    x [.., K]

Between the inner reshape and the product may be a quantiser with one scale, or a conversion to
another dtype, which is then of x.
GPT-2's dense layers are written so. Without the reshapes, what follows the product (an activation,
a residual) is computed as the product is written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program
from pruna_ir.quantization import fake_quant_op
from pruna_ir.transform import Context, Rewrite

aten = torch.ops.aten


def with_plain_products(program: Program) -> Program:
    """The program with every product of flattened rows on the rows as they were."""
    rw = Rewrite(program, "tvm-import", Context())
    for node in rw.calls(aten.reshape.default):
        found = _flattened(node)
        if found is None:
            continue
        x, weight, bias, quantiser = found
        if quantiser is not None:
            bound = bind_arguments(quantiser)
            bound |= {next(iter(bound)): x}
            assert isinstance(quantiser.target, torch._ops.OpOverload)
            x = rw.insert(quantiser.target, before=node, like=x, **bound)
        product = rw.insert(aten.matmul.default, before=node, like=node, self=x, other=weight)
        total = rw.insert(aten.add.Tensor, before=node, like=node, self=product, other=bias)
        rw.replace(node, total)
    return rw.finish()


def _flattened(
    node: fx.Node,
) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None] | None:
    """x, W, b and x's quantiser, where a product of flattened rows has their shape again."""
    product = bind_arguments(node)["self"]
    if product.target is not aten.addmm.default or len(product.users) > 1:
        return None
    bound = bind_arguments(product)
    rows, quantiser = bound["mat1"], None
    if rows.target is fake_quant_op() and bind_arguments(rows)["axis"] is None:
        rows, quantiser = bind_arguments(rows)["x"], rows
    elif rows.target is aten.to.dtype:
        rows, quantiser = bind_arguments(rows)["self"], rows
    if rows.target is not aten.reshape.default or (bound["alpha"], bound["beta"]) != (1, 1):
        return None
    x = bind_arguments(rows)["self"]
    given, result = _sizes(x), _sizes(node)
    fits = len(given) > 2 and given[:-1] == result[:-1] and given[-1] == _sizes(rows)[-1]
    plain = bound["self"].meta["val"].dim() == 1
    return (x, bound["mat2"], bound["self"], quantiser) if fits and plain else None


def _sizes(node: Any) -> list[str]:
    """The sizes as they are written: equal ones of dynamic dimensions are the same symbol."""
    return [str(size) for size in node.meta["val"].shape]
