"""Compile a tensor expression with our schedules and run it into an output full of NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pruna_ir.backends.tvm_build import host_target
from pruna_ir.backends.tvm_schedules import schedule_module

Array = np.ndarray[Any, Any]


def compiled(expression: Callable[..., Any], *arrays: Array) -> Array:
    """What an expression, of a float32 result, computes; no schedule may fail to apply."""
    import tvm
    from tvm import te

    target = host_target()
    operands = [te.placeholder(a.shape, str(a.dtype), f"a{i}") for i, a in enumerate(arrays)]
    with target:
        result = expression(*operands)
        module = tvm.IRModule({"main": te.create_prim_func([*operands, result])})
        module, kept = schedule_module(
            module, lambda name: tvm.target.codegen.target_has_features(name, target)
        )
        assert kept == {}
        executable = tvm.compile(module, target=target)
    output = tvm.runtime.tensor(
        np.full([int(size) for size in result.shape], np.nan, dtype=np.float32)
    )
    executable["main"](*(tvm.runtime.tensor(a) for a in arrays), output)
    return np.asarray(output.numpy())
