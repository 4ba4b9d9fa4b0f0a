"""The backend ``numpy``: small float32 networks of linear layers, run with NumPy alone.

An artifact is ``program.json``, one step for each operator with its arguments by schema name, and
``tensors.safetensors``. A value is named with a percent sign, as pruna-ir prints it. No torch, no
compiler and no pickle are needed to run an artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.decompose import decompose
from pruna_ir.errors import LoweringError
from pruna_ir.lowering import Availability, KernelRow, LoadOptions, Lowered, Offender, Runner
from pruna_ir.program import Program, dtype_of
from pruna_ir.transform import Context

Array = np.ndarray[Any, Any]
_STEPS, _TENSORS = "program.json", "tensors.safetensors"


def _linear(a: Mapping[str, Any]) -> Array:
    product: Array = np.matmul(a["input"], a["weight"].T)
    return product if a["bias"] is None else product + a["bias"]


def _sigmoid(a: Mapping[str, Any]) -> Array:
    # exp of -|x| alone cannot overflow.
    tail = np.exp(-np.abs(a["self"]))
    gate: Array = np.where(a["self"] >= 0, 1 / (1 + tail), tail / (1 + tail))
    return gate


def _flatten(a: Mapping[str, Any]) -> Array:
    shape = a["self"].shape
    start, end = a["start_dim"] % len(shape), a["end_dim"] % len(shape)
    flat: Array = a["self"].reshape((*shape[:start], -1, *shape[end + 1 :]))
    return flat


_OPERATORS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "aten.linear.default": _linear,
    "aten.relu.default": lambda a: np.maximum(a["self"], 0),
    "aten.hardtanh.default": lambda a: np.clip(a["self"], a["min_val"], a["max_val"]),
    "aten.sigmoid.default": _sigmoid,
    "aten.tanh.default": lambda a: np.tanh(a["self"]),
    "aten.add.Tensor": lambda a: a["self"] + a["alpha"] * a["other"],
    "aten.sub.Tensor": lambda a: a["self"] - a["alpha"] * a["other"],
    "aten.mul.Tensor": lambda a: a["self"] * a["other"],
    "aten.div.Tensor": lambda a: a["self"] / a["other"],
    "aten.flatten.using_ints": _flatten,
}


@dataclass(frozen=True)
class ToNumpy:
    """Lower a network of linear layers and elementwise operators to JSON and arrays."""

    name: ClassVar[str] = "numpy"
    api_version: ClassVar[int] = 1

    def availability(self) -> Availability:
        """Everywhere: NumPy is a dependency of pruna-ir."""
        return Availability()

    def unsupported(self, program: Program) -> list[Offender]:
        """Every call outside the table above, and every value that is not float32."""
        flat = decompose(program)
        found = [
            Offender.of(node, "the numpy backend has no such operator")
            for node in flat.calls()
            if str(node.target) not in _OPERATORS
        ]
        return found + [
            Offender.of(node, f"is {dtype_of(node)}, and the numpy backend computes in float32")
            for node in flat.graph.nodes
            if node.op != "output" and dtype_of(node) not in (torch.float32, None)
        ]

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        """Write ``program.json`` and ``tensors.safetensors``."""
        flat = decompose(program)
        steps = [
            {
                "result": _name(node),
                "operator": str(node.target),
                "arguments": {k: _plain(v) for k, v in bind_arguments(node).items()},
            }
            for node in flat.calls()
        ]
        tensors = {
            _name(node): np.ascontiguousarray(flat.tensor(str(node.target)).numpy(force=True))
            for node in flat.graph.find_nodes(op="get_attr")
        }
        text = {
            "inputs": [*map(_name, flat.placeholders())],
            "outputs": [*map(_name, flat.results())],
            "steps": steps,
        }
        (folder / _STEPS).write_text(json.dumps(text, indent=2), encoding="utf-8")
        save_file(tensors, folder / _TENSORS)
        return Lowered(main=_STEPS, tool_versions={"numpy": np.__version__})

    def load(self, folder: Path, options: LoadOptions) -> Runner:
        """Read an artifact back; NumPy's threads are its BLAS library's own affair.

        Raises:
            LoweringError: the files are not what `lower` writes.
        """
        try:
            text = json.loads((folder / _STEPS).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
            return _NumpyRunner(text["inputs"], text["outputs"], text["steps"], tensors)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise LoweringError(f"{folder} holds no numpy artifact: {error}") from error


def _name(node: fx.Node) -> str:
    return f"%{node.name}"


def _plain(value: Any) -> Any:
    """An argument as JSON; a node becomes its name (no operator above takes a string)."""
    return _name(value) if isinstance(value, fx.Node) else value


@dataclass(frozen=True)
class _NumpyRunner:
    inputs: list[str]
    outputs: list[str]
    steps: list[dict[str, Any]]
    tensors: dict[str, Array]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """One array per output."""
        values: dict[str, Any] = dict(self.tensors)
        values.update(zip(self.inputs, inputs, strict=True))
        for step in self.steps:
            arguments = {
                name: values[given] if isinstance(given, str) else given
                for name, given in step["arguments"].items()
            }
            values[step["result"]] = _OPERATORS[step["operator"]](arguments)
        return [values[name] for name in self.outputs]

    def audit(self) -> list[KernelRow]:
        """Each linear layer in the dtype to which NumPy promotes the tensors that were loaded."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        precision = str(np.result_type(np.float32, *dtypes))
        return [
            KernelRow(step["result"], "linear", precision, "numpy.matmul")
            for step in self.steps
            if step["operator"] == "aten.linear.default"
        ]
