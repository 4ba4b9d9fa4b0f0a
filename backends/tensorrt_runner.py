"""Run a TensorRT artifact: the engine on a CUDA device, or its ONNX model in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pruna_ir.backends.tensorrt_engine import BuildLog, vendor
from pruna_ir.errors import LoweringError, UsageError
from pruna_ir.lowering import KernelRow

Array = np.ndarray[Any, Any]


def check_inputs(description: Mapping[str, Any], inputs: Sequence[Array]) -> None:
    """Compare arrays with the engine's inputs: number, dtypes, sizes, the profile's ranges.

    Raises:
        UsageError: with the input's name, what it is and what it must be.
    """
    specs, profile = description["inputs"], description["facts"]["profile"]
    if len(inputs) != len(specs):
        names = ", ".join(spec["name"] for spec in specs)
        raise UsageError(f"the artifact takes {len(specs)} inputs ({names}), not {len(inputs)}")
    for spec, array in zip(specs, inputs, strict=True):
        actual = f"input {spec['name']} is {array.dtype}{list(array.shape)}"
        needed = f"the artifact takes {spec['dtype']}{spec['shape']}"
        if str(array.dtype) != spec["dtype"] or array.ndim != len(spec["shape"]):
            raise UsageError(f"{actual}, but {needed}")
        for size, given in zip(spec["shape"], array.shape, strict=True):
            least, _, most = profile.get(size, (size, size, size))
            if not least <= given <= most:
                raise UsageError(f"{actual}, but {needed} with {size} from {least} to {most}")


class OnnxRunner:
    """The ONNX model behind an engine, on the CPU, operator by operator."""

    def __init__(
        self, model: Path, description: Mapping[str, Any], layers: list[KernelRow], threads: int
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise LoweringError(f"{model}: ONNX Runtime refuses it: {error}") from error
        self._description = description
        self._layers = layers

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """One array per output for one array per input.

        Raises:
            UsageError: an input has a dtype or shape that the engine does not take.
        """
        check_inputs(self._description, inputs)
        names = [spec["name"] for spec in self._description["inputs"]]
        results: list[Array] = self._session.run(None, dict(zip(names, inputs, strict=True)))
        return results

    def audit(self) -> list[KernelRow]:
        """The layers of the engine that was built from the model, as its builder logged them."""
        return self._layers


class EngineRunner:
    """An engine on the current CUDA device."""

    def __init__(
        self, engine: Path, description: Mapping[str, Any], layers: list[KernelRow]
    ) -> None:
        package = description["facts"]["package"]
        trt, log = vendor(package), BuildLog()
        self._logger = log.logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise LoweringError(f"{engine}: {package} refuses the engine: {log.cause()}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise LoweringError(f"{engine}: {package} cannot execute it: {log.cause()}")
        self._log = log
        self._description = description
        self._layers = layers
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """One array per output for one array per input.

        Raises:
            UsageError: an input has a dtype or shape that the engine does not take.
            LoweringError: the execution failed on the device.
        """
        check_inputs(self._description, inputs)
        held = []
        with torch.cuda.stream(self._stream):
            for spec, array in zip(self._description["inputs"], inputs, strict=True):
                tensor = torch.from_numpy(np.ascontiguousarray(array)).cuda()
                held.append(tensor)
                self._context.set_input_shape(spec["tensor"], tuple(tensor.shape))
                self._context.set_tensor_address(spec["tensor"], tensor.data_ptr())
            outputs = [self._output(spec) for spec in self._description["outputs"]]
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise LoweringError(f"the engine failed on the device: {self._log.cause()}")
        self._stream.synchronize()
        return [np.asarray(tensor.cpu().numpy()) for tensor in outputs]

    def _output(self, spec: Mapping[str, Any]) -> torch.Tensor:
        shape = tuple(self._context.get_tensor_shape(spec["tensor"]))
        tensor = torch.empty(shape, dtype=getattr(torch, spec["dtype"]), device="cuda")
        self._context.set_tensor_address(spec["tensor"], tensor.data_ptr())
        return tensor

    def audit(self) -> list[KernelRow]:
        """The engine's layers as its builder logged them."""
        return self._layers
