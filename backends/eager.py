"""Eager and reference: the program itself, saved, and run by torch.

For both backends the artifact is one file, ``program.pt2`` (see `pruna_ir.serialize`); they differ
in what loading it gives:

- ``eager`` is a runtime to serve from: layers run in oneDNN on weights that are packed when the
  artifact is loaded, with residual and activation fused (see `pruna_ir.backends.packed_program`).
  Results differ from the program's by rounding, and are the same to the last bit in every run.
- ``reference`` runs the program's own operators one by one, to the same bits as the program.

Layers of fake-quantised operands run on integers in ``eager`` (where the processor has VNNI), and
in float arithmetic on quantised values in ``reference``. What runs packed and what plain, and why,
stands in the audit.

Limit: artifacts speak numpy, which has no bfloat16; give the program float32 inputs and outputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from pruna_ir.backends.packed_program import PackedProgram
from pruna_ir.backends.packed_steps import KINDS, short_name
from pruna_ir.lowering import Availability, KernelRow, LoadOptions, Lowered, Offender, Runner
from pruna_ir.program import Program, dtype_of, module_path
from pruna_ir.quantization import U8_ASYMMETRIC, QuantScheme
from pruna_ir.serialize import load_program, save_program
from pruna_ir.transform import API_VERSION, Context

MAIN = "program.pt2"


@dataclass(frozen=True)
class Reference:
    """Saves programs and runs them in torch, operator by operator."""

    name: ClassVar[str] = "reference"
    api_version: ClassVar[int] = API_VERSION
    scheme: ClassVar[QuantScheme] = QuantScheme(U8_ASYMMETRIC)
    zeros: ClassVar[Mapping[str, str]] = {"": "dense speed: zeros are multiplied like any number"}

    def availability(self) -> Availability:
        """Always: torch is there."""
        return Availability()

    def unsupported(self, program: Program) -> list[Offender]:
        """The inputs and outputs whose dtype numpy lacks."""
        return [
            Offender.of(node, "numpy has no bfloat16; convert to float32 inside the model")
            for node in (*program.placeholders(), *program.results())
            if dtype_of(node) is torch.bfloat16
        ]

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:  # noqa: ARG002
        """Write ``program.pt2``."""
        save_program(program, folder / MAIN)
        return Lowered(MAIN, {"torch": torch.__version__})

    def load(self, folder: Path, options: LoadOptions) -> Runner:
        """The program, ready to run.

        Raises:
            CaptureError: the file is no saved program.
        """
        return ReferenceRunner(load_program(folder / MAIN), options.threads)


@dataclass(frozen=True)
class Eager(Reference):
    """Saves programs and runs them in torch, with packed weights and fused layers."""

    name: ClassVar[str] = "eager"
    # oneDNN adds the residual before it rounds; pools and means run in float32.
    scheme: ClassVar[QuantScheme] = QuantScheme(
        U8_ASYMMETRIC, residual="identity", average_pool=False, layer_outputs=False
    )

    def load(self, folder: Path, options: LoadOptions) -> Runner:
        """The program with packed weights, ready to run.

        Raises:
            CaptureError: the file is no saved program.
        """
        return EagerRunner(load_program(folder / MAIN), options.threads)


class EagerRunner:
    """A packed program behind the runner's interface."""

    def __init__(self, program: Program, threads: int) -> None:
        self._packed = PackedProgram(program)
        self._threads = threads

    def run(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One array per output for one array per input."""
        with _threads(self._threads):
            return [output.numpy() for output in self._packed(*_tensors(inputs))]

    def layer_times(self, inputs: Sequence[np.ndarray[Any, Any]], runs: int) -> dict[str, float]:
        """Milliseconds of every step, the median over some runs, by ``module path/node``."""
        tensors = _tensors(inputs)
        with _threads(self._threads):
            taken = [self._packed.step_times(tensors) for _ in range(runs)]
        return {name: statistics.median(t[name] for t in taken) for name in taken[0]}

    def audit(self) -> list[KernelRow]:
        """Every operator that runs, packed or plain, with the dtype that it computes in."""
        return list(self._packed.rows)


class ReferenceRunner:
    """A program behind the runner's interface."""

    def __init__(self, program: Program, threads: int) -> None:
        self._program = program
        self._threads = threads

    def run(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One array per output for one array per input."""
        with torch.no_grad(), _threads(self._threads):
            return [output.numpy() for output in self._program(*_tensors(inputs))]

    def layer_times(self, inputs: Sequence[np.ndarray[Any, Any]], runs: int) -> dict[str, float]:
        """Milliseconds of every operator, the median over some runs, by its node's name."""
        tensors = _tensors(inputs)
        taken: dict[str, list[float]] = {}
        with torch.no_grad(), _threads(self._threads):
            for _ in range(runs):
                _Timed(self._program.module, taken).run(*tensors)
        return {name: statistics.median(times) for name, times in taken.items()}

    def audit(self) -> list[KernelRow]:
        """Every operator with the dtype that it computes in."""
        return [
            KernelRow(
                layer=module_path(node) or node.name,
                kind=KINDS.get(short_name(node.target), short_name(node.target)),
                precision=str(dtype_of(node)).removeprefix("torch."),
                detail=str(node.target),
            )
            for node in self._program.calls()
            if dtype_of(node) is not None
        ]


class _Timed(fx.Interpreter):
    """Runs a graph node by node and notes how long each call took."""

    def __init__(self, module: fx.GraphModule, taken: dict[str, list[float]]) -> None:
        super().__init__(module)
        self._taken = taken

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        start = time.perf_counter()
        result = super().run_node(n)
        if n.op == "call_function":
            self._taken.setdefault(n.name, []).append((time.perf_counter() - start) * 1e3)
        return result


def _tensors(arrays: Sequence[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    whole = (np.require(array, requirements=("C", "W")) for array in arrays)
    return [torch.from_numpy(array) for array in whole]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch's number of threads for a while; 0 leaves it."""
    before = torch.get_num_threads()
    if count in (0, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
