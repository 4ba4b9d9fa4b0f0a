"""Walking over ``main`` to compute some of its values in another way.

    for every binding v = operator(...) of main: replacement, or the operator as it is
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pruna_ir.backends.tvm_runtime import ENTRY


def rewrite_main(
    module: Any,
    parameters: Mapping[str, np.ndarray[Any, Any]],
    replacement: Callable[[Any, Any], Any],
    state: Mapping[str, Any],
) -> Any:
    """The module with values of ``main`` replaced; what nobody reads any more is gone.

    Args:
        module: a ``tvm.IRModule`` whose ``main`` is one dataflow block over Relax operators.
        parameters: the values of the arguments behind the inputs, in their order.
        replacement: what computes a binding's value, of the rewriter and the binding; None for
            the value as it is. The rewriter has ``builder_``, ``parameters`` (values by
            variable), ``bindings`` (what was bound, by variable), ``visit_expr``, and the state.
        state: further attributes of the rewriter, by name.
    """
    from tvm import relax

    rewriter = relax.expr_functor.mutator(_rewriter())(module, parameters, replacement, state)
    return relax.transform.DeadCodeElimination([ENTRY])(rewriter.rewritten(module))


def _rewriter() -> Any:
    """The rewriting class; TVM is imported where it is needed only."""
    from tvm import relax

    class Rewriter(relax.PyExprMutator):  # type: ignore[misc]  # TVM is untyped
        def __init__(
            self,
            module: Any,
            parameters: Mapping[str, np.ndarray[Any, Any]],
            replacement: Callable[[Any, Any], Any],
            state: Mapping[str, Any],
        ) -> None:
            super().__init__(module)
            main = module[ENTRY]
            weights = main.params[int(main.attrs["num_input"]) :]
            self.parameters = dict(zip(weights, parameters.values(), strict=True))
            self.bindings = {b.var: b.value for block in main.body.blocks for b in block.bindings}
            self.replacement = replacement
            for name, value in state.items():
                setattr(self, name, value)

        def rewritten(self, module: Any) -> Any:
            variable = module.get_global_var(ENTRY)
            self.builder_.update_func(variable, self.visit_expr(module[ENTRY]))
            return self.builder_.finalize()

        def visit_var_binding_(self, binding: Any) -> None:
            made = self.replacement(self, binding)
            if made is None:
                super().visit_var_binding_(binding)
                return
            inner = isinstance(binding.var, relax.DataflowVar)
            emit = self.builder_.emit if inner else self.builder_.emit_output
            self.set_var_remap(binding.var, emit(made))

    return Rewriter
