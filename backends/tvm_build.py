"""Build: from an imported Relax module to a shared library, and what it executes.

    legalize -> lift weight preparation -> fuse -> schedule -> lower to virtual machine -> link

Everything computed from weights alone (dequantising int8 weights, packing them) moves into
``main_transform_params``, which the loader calls once: the artifact stores int8, each run reads
what its loops want.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pruna_ir.backends import tvm_gpu
from pruna_ir.backends.tvm_blocked import block_convolutions
from pruna_ir.backends.tvm_dot import INT8, Dot, multiplied
from pruna_ir.backends.tvm_fusion import fused_loops
from pruna_ir.backends.tvm_import import Imported
from pruna_ir.backends.tvm_loader import LOADER, loader_source
from pruna_ir.backends.tvm_narrow_products import narrow_products
from pruna_ir.backends.tvm_processors import absent_features, needed_features
from pruna_ir.backends.tvm_products import legalize_matmul
from pruna_ir.backends.tvm_reductions import legalize_layer_norm, legalize_softmax
from pruna_ir.backends.tvm_runtime import (
    ENTRY,
    LIBRARY,
    MODEL,
    PARAMETERS,
    TRANSFORM,
    file_digest,
    processor_features,
)
from pruna_ir.backends.tvm_schedules import covers, schedule_module
from pruna_ir.backends.tvm_tiles import Tiles
from pruna_ir.errors import LoweringError, UsageError
from pruna_ir.program import Program, TensorSpec

KERNELS = "kernels.json"
SCHEDULES = "blocked-conv2d, packed-products, row-reductions, vector-functions, parallel"
"""Where the loops come from: see `pruna_ir.backends.tvm_schedules`."""

_KINDS = (("conv", "conv"), ("matmul", "matmul"), ("dense", "linear"), ("einsum", "matmul"))


@dataclass(frozen=True)
class CompiledKernel:
    """One call of the compiled program, as the compiler itself lists it.

    Attributes:
        layer: the name of the compiled function.
        kind: ``conv``, ``matmul``, ``linear``, or the function's first operator.
        precision: the type in which the function multiplies or, elsewhere, its result's type.
        detail: for a layer whose weights are stored as integers, that and where they become
            floats.
    """

    layer: str
    kind: str
    precision: str
    detail: str = ""


def host_target(cpu: str = "") -> Any:
    """The LLVM target for a processor, this machine's by default.

    What the system hides of this machine's instruction sets is left out.
    """
    import tvm

    if cpu:
        return tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    named = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
    hidden = absent_features(tvm.target.Target(named), processor_features())
    return tvm.target.Target(named | ({"mattr": hidden} if hidden else {}))


def has_dots(target: Any, kind: Dot = INT8) -> bool:
    """Whether a processor has instructions that multiply bytes, or another narrow type."""
    return kind.is_covered(_features(target))


def build(
    imported: Imported, program: Program, folder: Path, target: Any, tiles: Tiles | None = None
) -> dict[str, str]:
    """Compile and write the artifact's files; returns why functions keep TVM's loops, by name.

    Args:
        imported: the module.
        program: what it was imported from.
        folder: where to write.
        target: a processor, or a GPU, for which TVM's own schedules are used.
        tiles: the register tiles of convolutions and products; by rule where None.

    Raises:
        LoweringError: TVM cannot compile the module or link the library.
        UsageError: a tuning record does not fit.
    """
    import tvm

    try:
        module, unscheduled = _scheduled(imported, target, tiles or Tiles())
        executable = tvm.compile(module, target=target, relax_pipeline=_lowering())
        executable.export_library(str(folder / LIBRARY))
        if target.kind.name == "cuda" and not tvm_gpu.compiler_missing():
            (folder / tvm_gpu.CODE).write_bytes(tvm_gpu.machine_code(executable, target))
    except UsageError:
        raise
    except Exception as error:
        first = "\n  ".join(str(error).strip().splitlines()[:6])
        raise LoweringError(
            f"TVM cannot compile the program: {type(error).__name__}: {first}{_remedy(program)}"
        ) from error
    np.savez(folder / PARAMETERS, allow_pickle=False, **imported.parameters)
    rows = [asdict(kernel) for kernel in _kernels(module)]
    (folder / KERNELS).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / LOADER).write_text(loader_source(), encoding="utf-8")
    _describe(imported, program, folder, target)
    return unscheduled


def _scheduled(imported: Imported, target: Any, tiles: Tiles) -> tuple[Any, dict[str, str]]:
    """The module with loops that have schedules, and why functions keep TVM's own, by name."""
    if target.kind.name != "llvm":
        return tvm_gpu.scheduled(imported.module, target), {}
    with target:
        return schedule_module(optimized(imported, target, tiles), _features(target))


def optimized(imported: Imported, target: Any, tiles: Tiles) -> Any:
    """An imported module as functions of loops, neighbours fused; ``tiles`` hears of each tile."""
    with target:
        passes = _optimization(_features(target), imported.parameters, tiles)
        return passes(imported.module)


def _features(target: Any) -> Callable[[str], bool]:
    """Whether a target has an instruction set, by LLVM's name."""
    import tvm

    return lambda name: bool(tvm.target.codegen.target_has_features(name, target))


def _optimization(
    features: Callable[[str], bool], parameters: Mapping[str, np.ndarray[Any, Any]], tiles: Tiles
) -> Any:
    """Operators to loops, weight preparation apart, neighbours fused."""
    import tvm

    return tvm.transform.Sequential(
        fused_loops(
            _blocking(features, parameters, tiles),
            _narrowing(features, parameters),
            legal={
                "relax.matmul": partial(legalize_matmul, choose=tiles.product),
                "relax.nn.layer_norm": legalize_layer_norm,
                "relax.nn.softmax": legalize_softmax,
            },
        )
    )


def _blocking(
    features: Callable[[str], bool], parameters: Mapping[str, np.ndarray[Any, Any]], tiles: Tiles
) -> Any:
    import tvm

    def blocked(module: Any, _: Any) -> Any:
        if not covers(features):
            return module
        return block_convolutions(module, features, parameters, tiles.convolution)

    return tvm.transform.module_pass(blocked, opt_level=0, name="BlockConvolutions")


def _narrowing(
    features: Callable[[str], bool], parameters: Mapping[str, np.ndarray[Any, Any]]
) -> Any:
    import tvm

    def rewritten(module: Any, _: Any) -> Any:
        return narrow_products(module, parameters, features)

    return tvm.transform.module_pass(rewritten, opt_level=0, name="NarrowProducts")


def _lowering() -> Any:
    """Relax calls to virtual machine code."""
    import tvm
    from tvm import relax

    t = relax.transform
    return tvm.transform.Sequential(
        [
            t.RewriteDataflowReshape(),
            t.ToNonDataflow(),
            t.RemovePurityChecking(),
            t.CallTIRRewrite(),
            t.StaticPlanBlockMemory(),
            t.LowerAllocTensor(),
            t.KillAfterLastUse(),
            t.LowerRuntimeBuiltin(),
            t.ComputePrimValue(),
            t.VMShapeLower(),
            t.AttachGlobalSymbol(),
        ]
    )


def _kernels(module: Any) -> Iterator[CompiledKernel]:
    """The calls of ``main``, in order."""
    from tvm import relax

    main = module[ENTRY]
    weights = set(main.params[int(main.attrs["num_input"]) :])
    stored = _stored_integers(module, list(main.params[int(main.attrs["num_input"]) :]))
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            called = getattr(value, "op", None)
            if getattr(called, "name", "") != "relax.call_tir":
                continue
            name = value.args[0].name_hint
            types = [a.ty.dtype for a in value.args[1] if isinstance(a.ty, relax.TensorType)]
            kind = next((kind for word, kind in _KINDS if word in name), "")
            if kind == "matmul" and any(a in weights and a.ty.ndim > 1 for a in value.args[1]):
                kind = "linear"
            whole = multiplied(module[value.args[0]])
            precision = whole or _precision(kind, types, value.ty)
            widths = {stored[a] for a in value.args[1] if a in stored} if not whole else set()
            detail = f"{min(widths)} weights, expanded to {precision} at load" if widths else ""
            yield CompiledKernel(name, kind or _first_operator(name), precision, detail)


def _stored_integers(module: Any, weights: Sequence[Any]) -> dict[Any, str]:
    """The arguments of ``main`` that come of arrays of bytes, each with their type.

    ``transform`` computes them, in the same order, from the parameters as they are stored.
    """
    from tvm import relax

    if TRANSFORM not in {variable.name_hint for variable in module.get_global_vars()}:
        return {}
    body = module[TRANSFORM].body
    values = {b.var: b.value for block in body.blocks for b in block.bindings}

    def width(value: Any) -> str:
        """The type of the matrix of bytes that a value is computed from; empty where none."""
        value = values.get(value, value)
        if isinstance(value, relax.Call):
            operands = value.args[1] if len(value.args) > 1 else value.args
            return next((found for found in map(width, operands) if found), "")
        if not isinstance(value, relax.TupleGetItem) or value.ty.ndim < 2:
            return ""
        dtype = str(getattr(value.ty.dtype, "dtype", value.ty.dtype))
        return dtype if dtype in ("int8", "uint8") else ""

    made = values.get(body.body, body.body)
    widths = map(width, made) if isinstance(made, relax.Tuple) else ("" for _ in weights)
    return {weight: found for weight, found in zip(weights, widths, strict=True) if found}


def _first_operator(name: str) -> str:
    return name.removeprefix("fused_").rstrip("0123456789")


def _precision(kind: str, operands: list[Any], result: Any) -> str:
    """The widest float among the operands of a multiplication; else the type of the result."""
    names = [str(getattr(d, "dtype", d)) for d in operands]
    if kind:
        return next((n for n in ("float32", "float16", "bfloat16") if n in names), "int8")
    return str(getattr(getattr(result, "dtype", result), "dtype", getattr(result, "dtype", "")))


def _remedy(program: Program) -> str:
    """What the user can change, where dynamic dimensions may be what TVM stumbles over."""
    further = sorted(name for name in program.dims if name != "batch")
    if not further:
        return ""
    return (
        f"\n  remedy: capture with a fixed size for {', '.join(further)}; TVM compiles a dynamic "
        "batch, but few programs with further dynamic dimensions"
    )


def _describe(imported: Imported, program: Program, folder: Path, target: Any) -> None:
    def specs(values: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [
            {
                "name": v.name,
                "dtype": str(v.dtype).removeprefix("torch."),
                "shape": list(v.shape),
            }
            for v in values
        ]

    description = {
        "inputs": specs(program.inputs),
        "outputs": specs(program.outputs),
        "dimensions": {name: [r.lower, r.upper] for name, r in program.dims.items()},
        "parameters": list(imported.parameters),
        "target": str(target),
        "device": "cpu" if target.kind.name == "llvm" else target.kind.name,
        "processor": needed_features(target.host or target),
        "sha256": {name: file_digest(folder / name) for name in (LIBRARY, PARAMETERS)},
    }
    (folder / MODEL).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
