"""Products of narrow operands: a Relax function whose matrix products multiply what is stored.

    matmul(dequantize(quantize(x)), dequantize(W8))   `pruna_ir.backends.tvm_integer_products`
    matmul(widen(narrow(x)), widen(W16))              `pruna_ir.backends.tvm_bfloat16`

Either weight may be transposed. Products to which neither applies, and all on processors without
the instructions, are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pruna_ir.backends.tvm_bfloat16 import bfloat16_form
from pruna_ir.backends.tvm_dot import BFLOAT16, INT8
from pruna_ir.backends.tvm_integer_products import integer_form
from pruna_ir.backends.tvm_rewriter import rewrite_main


def narrow_products(
    module: Any, parameters: Mapping[str, np.ndarray[Any, Any]], features: Callable[[str], bool]
) -> Any:
    """The module with its products of quantised or bfloat16 operands on those.

    Args:
        module: a ``tvm.IRModule`` whose ``main`` is one dataflow block over Relax operators.
        parameters: the values of the arguments behind the inputs, in their order.
        features: whether the processor has an instruction set, by LLVM's name.
    """
    pairs = ((INT8, integer_form), (BFLOAT16, bfloat16_form))
    forms = [form for kind, form in pairs if kind.is_covered(features)]
    if not forms:
        return module
    return rewrite_main(module, parameters, _narrow_form, {"forms": forms, "bytes": {}})


def _narrow_form(rewriter: Any, binding: Any) -> Any:
    """What computes a product of narrow operands; None for others."""
    call = binding.value
    if getattr(getattr(call, "op", None), "name", "") != "relax.matmul":
        return None
    made = (form(rewriter, call) for form in rewriter.forms)
    return next((form for form in made if form is not None), None)
