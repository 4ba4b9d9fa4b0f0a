"""Run a TVM artifact with numpy and the TVM runtime alone: nothing here imports torch.

An artifact's folder holds ``model.so`` (the compiled functions and TVM's virtual machine code),
``parameters.npz`` (the weights, as they are stored: int8 where the program quantises them),
``model.json`` (inputs, outputs, order of the parameters, needed processor features, sha256) and
``load.py``, which is this file without its one import from pruna_ir: it runs where neither
pruna_ir nor torch is installed.

    runner = load_tvm(Path("out/tvm"))
    (logits,) = runner.run([images])

    python out/tvm/load.py images.npy -o logits.npz --threads 2

The compiled library holds ``transform``: it dequantises and lays out the weights, once, at load.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pruna_ir.errors import LoweringError, PrunaError, ToolchainError, UsageError

MODEL = "model.json"
LIBRARY = "model.so"
PARAMETERS = "parameters.npz"
ENTRY = "main"
TRANSFORM = "main_transform_params"

Array = np.ndarray[Any, Any]


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What Linux says that this machine's processor has; empty where the system does not say."""
    if not cpuinfo.is_file():
        return []
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return sorted(set(value.split()))
    return []


class TvmRunner:
    """A loaded TVM artifact.

    Attributes:
        description: the content of ``model.json``.
    """

    def __init__(
        self,
        machine: Any,
        device: Any,
        parameters: Sequence[Any],
        description: Mapping[str, Any],
    ) -> None:
        self.description = description
        self._machine = machine
        self._device = device
        self._parameters = list(parameters)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """One array per output for one array per input.

        Raises:
            UsageError: an input has another dtype or shape than the artifact was built for.
        """
        import tvm

        check_inputs(self.description["inputs"], self.description["dimensions"], inputs)
        arguments = [
            tvm.runtime.tensor(np.ascontiguousarray(array), self._device) for array in inputs
        ]
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


def prepare_threads(threads: int = 0) -> None:
    """Have TVM's pool use every core and bind no thread to one, or what the environment says.

    By itself TVM takes half of the processors for hyper-threads, also where each is a core. And it
    binds the thread that first calls it to one core, for good: threads that this one starts later
    inherit that, torch's among them. Too late where the pool runs already.

    Args:
        threads: at least so many, whatever the environment says of OpenMP.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    if "TVM_NUM_THREADS" not in os.environ:
        openmp = os.environ.get("OMP_NUM_THREADS", "")
        number = int(openmp) if openmp.isdecimal() and int(openmp) else physical_cores()
        os.environ["TVM_NUM_THREADS"] = str(max(number, threads))


def physical_cores(system: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many cores this process may use; hyper-threads of one core count once (on Linux)."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for number in os.sched_getaffinity(0):
        siblings = system / f"cpu{number}" / "topology" / "thread_siblings_list"
        cores.add(siblings.read_text(encoding="ascii") if siblings.is_file() else str(number))
    return len(cores)


def load_tvm(folder: Path, threads: int = 0) -> TvmRunner:
    """Load an artifact.

    Args:
        folder: the artifact's folder.
        threads: the number of threads of TVM's pool, which the whole process shares; 0 leaves it:
            at first one for each core. A warning where a pool that runs already has fewer.

    Raises:
        LoweringError: a file is missing or not what was written.
        ToolchainError: TVM is not installed, or the processor lacks what the code needs.
    """
    description = _describe(folder)
    _check_processor(folder, description)
    prepare_threads(threads)
    try:
        import tvm
        from tvm.runtime.vm import VirtualMachine
    except ImportError as error:
        raise ToolchainError(
            f"running a TVM artifact needs TVM: pip install apache-tvm ({error})"
        ) from error
    device = _device(description)
    try:
        if threads:
            _use_threads(tvm, threads)
        library = tvm.runtime.load_module(str(folder / LIBRARY))
        machine = VirtualMachine(library, device)
        stored = _read_parameters(folder, description["parameters"])
        parameters = _transformed(machine, stored, device)
    except (RuntimeError, OSError, ValueError, AttributeError) as error:
        raise LoweringError(f"{folder}: TVM refuses the artifact: {error}") from error
    return TvmRunner(machine, device, parameters, description)


def _use_threads(tvm: Any, threads: int) -> None:
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    used = int(tvm.get_global_func("runtime.NumThreads")())
    if used < threads:
        warnings.warn(
            f"TVM uses {used} of {threads} threads: its pool was started with {used}; set "
            f"TVM_NUM_THREADS={threads} before the process starts",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_processor(folder: Path, description: Mapping[str, Any]) -> None:
    """Compare what the code may use with what the processor has, where the system says so."""
    present = processor_features()
    missing = sorted(set(description["processor"]) - set(present)) if present else []
    if missing:
        raise ToolchainError(
            f"{folder}: the code was compiled for {description['target']}; this processor lacks "
            f"{', '.join(missing)}; build the artifact again for this processor"
        )


def _device(description: Mapping[str, Any]) -> Any:
    """The device that the artifact was built for."""
    import tvm

    kind = description.get("device", "cpu")
    device = tvm.device(kind, 0)
    if not device.exist:
        raise ToolchainError(
            f"no {kind.upper()} device; the code was compiled for {description['target']}"
        )
    return device


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


def _transformed(machine: Any, stored: Sequence[Array], device: Any) -> list[Any]:
    """The parameters as the compiled code wants them."""
    import tvm

    tensors = [tvm.runtime.tensor(array, device) for array in stored]
    return list(machine[TRANSFORM](tensors)) if tensors else []


# -- command line --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an artifact on arrays from files; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(
        description="Run a TVM artifact on arrays from .npy files with numpy and TVM alone."
    )
    parser.add_argument("inputs", nargs="*", type=Path, help="one .npy file an input, in order")
    parser.add_argument("-o", "--out", type=Path, help=".npz file for the outputs, by name")
    parser.add_argument("--artifact", type=Path, default=Path(__file__).parent, metavar="FOLDER",
                        help="the artifact's folder; this file's by default")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="of TVM's pool; 0 leaves them")
    parser.add_argument("--repeats", type=int, default=0, help="time so many calls, too")
    given = parser.parse_args(arguments)
    try:
        sys.stdout.write(_run(given))
    except PrunaError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _run(given: argparse.Namespace) -> str:
    """What to print: a line an output, and the median time where calls are timed."""
    runner = load_tvm(given.artifact, given.threads)
    inputs = [_read_array(path) for path in given.inputs]
    outputs = runner.run(inputs)
    names = [spec["name"] for spec in runner.description["outputs"]]
    lines = [
        f"{name}: {array.dtype}{list(array.shape)}"
        for name, array in zip(names, outputs, strict=True)
    ]
    if given.out is not None:
        np.savez(given.out, allow_pickle=False, **dict(zip(names, outputs, strict=True)))
    times = []
    for _ in range(given.repeats):
        start = time.perf_counter()
        runner.run(inputs)
        times.append((time.perf_counter() - start) * 1e3)
    if times:
        lines.append(f"{np.median(times):.3f} ms, the median of {len(times)} calls")
    return "".join(f"{line}\n" for line in lines)


def _read_array(path: Path) -> Array:
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a .npy file: {error}") from error
    return array


if __name__ == "__main__":
    sys.exit(main())
