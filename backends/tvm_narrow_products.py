"""Products of narrow operands: a Relax function whose matrix products multiply what is stored.

    matmul(dequantize(quantize(x)), dequantize(W8))   `pruna_ir.backends.tvm_integer_products`
    matmul(widen(narrow(x)), widen(W16))              `pruna_ir.backends.tvm_bfloat16`

Either weight may be transposed. Products to which neither applies, and all on processors without
the instructions, are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pruna_ir.backends.tvm_bfloat16 import bfloat16_form
from pruna_ir.backends.tvm_dot import BFLOAT16, INT8
from pruna_ir.backends.tvm_integer_products import integer_form


def narrow_products(
    module: Any, parameters: Mapping[str, np.ndarray[Any, Any]], features: Callable[[str], bool]
) -> Any:
    """The module with its products of quantised or bfloat16 operands on those.

    Args:
        module: a ``tvm.IRModule`` whose ``main`` is one dataflow block over Relax operators.
        parameters: the values of the arguments behind the inputs, in their order.
        features: whether the processor has an instruction set, by LLVM's name.
    """
    from tvm import relax

    pairs = ((INT8, integer_form), (BFLOAT16, bfloat16_form))
    forms = [form for kind, form in pairs if kind.is_covered(features)]
    if not forms:
        return module
    rewriter = relax.expr_functor.mutator(_rewriter())(module, parameters, forms)
    return relax.transform.DeadCodeElimination(["main"])(rewriter.rewritten(module))


def _rewriter() -> Any:
    """The rewriting class; TVM is imported where it is needed only."""
    from tvm import relax

    class Rewriter(relax.PyExprMutator):  # type: ignore[misc]  # TVM is untyped
        def __init__(
            self,
            module: Any,
            parameters: Mapping[str, np.ndarray[Any, Any]],
            forms: Sequence[Callable[[Any, Any], Any]],
        ) -> None:
            super().__init__(module)
            main = module["main"]
            weights = main.params[int(main.attrs["num_input"]) :]
            self.parameters = dict(zip(weights, parameters.values(), strict=True))
            self.forms = forms
            self.bindings: dict[Any, Any] = {}
            self.bytes: dict[Any, Any] = {}

        def rewritten(self, module: Any) -> Any:
            variable = module.get_global_var("main")
            self.builder_.update_func(variable, self.visit_expr(module["main"]))
            return self.builder_.finalize()

        def visit_var_binding_(self, binding: Any) -> None:
            self.bindings[binding.var] = binding.value
            made = _narrow_form(self, binding.value)
            if made is None:
                super().visit_var_binding_(binding)
                return
            inner = isinstance(binding.var, relax.DataflowVar)
            emit = self.builder_.emit if inner else self.builder_.emit_output
            self.set_var_remap(binding.var, emit(made))

    return Rewriter


def _narrow_form(rewriter: Any, call: Any) -> Any:
    """What computes a product of narrow operands; None for others."""
    if getattr(getattr(call, "op", None), "name", "") != "relax.matmul":
        return None
    made = (form(rewriter, call) for form in rewriter.forms)
    return next((form for form in made if form is not None), None)


__all__: Sequence[str] = ("narrow_products",)
