"""Run a TVM artifact with numpy and the TVM runtime alone: nothing here imports torch.

An artifact's folder holds ``model.so`` (the compiled functions and TVM's virtual machine code),
``parameters.npz`` (the weights, as they are stored: int8 where the program quantises them) and
``model.json`` (inputs, outputs, order of the parameters, needed processor features, sha256).

    runner = load_tvm(Path("out/tvm"))
    (logits,) = runner.run([images])

The compiled library holds ``transform``: it dequantises and lays out the weights, once, at load.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pruna_ir.errors import LoweringError, ToolchainError, UsageError

MODEL = "model.json"
LIBRARY = "model.so"
PARAMETERS = "parameters.npz"
ENTRY = "main"
TRANSFORM = "main_transform_params"

Array = np.ndarray[Any, Any]

# Instruction sets that compiled code may use; what else a processor lists is of no concern.
_INSTRUCTION_SETS = (
    "avx", "bmi", "f16c", "fma", "gfni", "movbe", "popcnt", "sse", "ssse", "vaes", "vpclmul",
    "asimd", "sve", "i8mm", "bf16",
)  # fmt: skip


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets of this machine's processor; empty where the system does not say."""
    if not cpuinfo.is_file():
        return []
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return sorted(f for f in set(value.split()) if f.startswith(_INSTRUCTION_SETS))
    return []


class TvmRunner:
    """A loaded TVM artifact.

    Attributes:
        description: the content of ``model.json``.
    """

    def __init__(
        self, machine: Any, parameters: Sequence[Any], description: Mapping[str, Any]
    ) -> None:
        self.description = description
        self._machine = machine
        self._parameters = list(parameters)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """One array per output for one array per input.

        Raises:
            UsageError: an input has another dtype or shape than the artifact was built for.
        """
        import tvm

        check_inputs(self.description["inputs"], self.description["dimensions"], inputs)
        arguments = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in inputs]
        results = self._machine[ENTRY](*arguments, *self._parameters)
        return [result.numpy() for result in results]


def check_inputs(
    specs: Sequence[Mapping[str, Any]],
    dimensions: Mapping[str, Sequence[int | None]],
    inputs: Sequence[Array],
) -> None:
    """Compare arrays with the artifact's inputs: number, dtypes, ranks, sizes, ranges.

    Raises:
        UsageError: with the input's name, what it is and what it must be.
    """
    if len(inputs) != len(specs):
        names = ", ".join(spec["name"] for spec in specs)
        raise UsageError(f"the artifact takes {len(specs)} inputs ({names}), not {len(inputs)}")
    sizes: dict[str, int] = {}
    for spec, array in zip(specs, inputs, strict=True):
        wanted = spec["shape"]
        actual = f"input {spec['name']} is {array.dtype}{list(array.shape)}"
        needed = f"the artifact takes {spec['dtype']}{wanted}"
        if str(array.dtype) != spec["dtype"] or array.ndim != len(wanted):
            raise UsageError(f"{actual}, but {needed}")
        for axis, (size, given) in enumerate(zip(wanted, array.shape, strict=True)):
            expected = size if isinstance(size, int) else sizes.setdefault(size, given)
            if given != expected:
                raise UsageError(f"{actual}, but {needed}: dimension {axis} must be {expected}")
            low, high = dimensions.get(str(size), (None, None))
            if (low is not None and given < low) or (high is not None and given > high):
                raise UsageError(f"{actual}: dimension {size} is outside [{low}, {high}]")


def load_tvm(folder: Path, threads: int = 0) -> TvmRunner:
    """Load an artifact.

    Args:
        folder: the artifact's folder.
        threads: the number of threads of TVM's pool, which the whole process shares; 0 leaves it.

    Raises:
        LoweringError: a file is missing or not what was written.
        ToolchainError: TVM is not installed, or the processor lacks what the code needs.
    """
    description = _describe(folder)
    missing = sorted(set(description["processor"]) - set(processor_features()))
    if missing:
        raise ToolchainError(
            f"{folder}: the code was compiled for {description['target']}; this processor lacks "
            f"{', '.join(missing)}; build the artifact again for this processor"
        )
    try:
        import tvm
        from tvm import relax
    except ImportError as error:
        raise ToolchainError(
            f"running a TVM artifact needs TVM: pip install apache-tvm ({error})"
        ) from error
    try:
        if threads:
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
        library = tvm.runtime.load_module(str(folder / LIBRARY))
        machine = relax.VirtualMachine(library, tvm.cpu())
        stored = _read_parameters(folder, description["parameters"])
        parameters = _transformed(machine, stored)
    except (RuntimeError, OSError, ValueError, AttributeError) as error:
        raise LoweringError(f"{folder}: TVM refuses the artifact: {error}") from error
    return TvmRunner(machine, parameters, description)


def _describe(folder: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        expected = dict(description["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoweringError(f"{folder / MODEL} is missing or damaged: {error}") from error
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file() or file_digest(file) != digest:
            raise LoweringError(f"{file} is missing or not the file that was written")
    return description


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_parameters(folder: Path, names: Sequence[str]) -> list[Array]:
    try:
        with np.load(folder / PARAMETERS, allow_pickle=False) as file:
            return [file[name] for name in names]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise LoweringError(f"{folder / PARAMETERS}: cannot be read: {error}") from error


def _transformed(machine: Any, stored: Sequence[Array]) -> list[Any]:
    """The parameters as the compiled code wants them."""
    import tvm

    tensors = [tvm.runtime.tensor(array) for array in stored]
    return list(machine[TRANSFORM](tensors)) if tensors else []
