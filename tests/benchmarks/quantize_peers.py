"""NNCF's and torchao's quantisation of a convolutional network, for `quantize_accuracy`.

Every peer gets the same module, the same calibration images and its own defaults unless its method
says otherwise. One that raises, or leaves every layer as it was, is `Unsupported` with its reason.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pruna_ir.backends.to_openvino import OpenvinoRunner
from pruna_ir.certify import audit_summary
from pruna_ir.lowering import Runner

Scores = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""float32[n, 3, 32, 32] to float32[n, classes]."""
PRODUCTS = ("conv", "linear", "matmul")


class Unsupported(Exception):  # noqa: N818
    """The peer does not do this; the message is its reason."""


@dataclass(frozen=True)
class Quantised:
    """What a peer made: how to run it, and how many of its layers run in integers (or "")."""

    scores: Scores
    integers: str = ""


@dataclass(frozen=True)
class Peer:
    """One way in which a peer quantises.

    Attributes:
        tool: ``NNCF`` or ``torchao``.
        method: what is called, in a few words.
        bits: ``W8A8``, ``W4A8``, ``W8`` or ``W4``.
        runs_on: what executes the result.
        make: a module and calibration images, float32[n, 3, 32, 32], to the result.
    """

    tool: str
    method: str
    bits: str
    runs_on: str
    make: Callable[[nn.Module, torch.Tensor], Quantised]

    def quantised(self, module: nn.Module, images: torch.Tensor) -> Quantised:
        """The network, quantised.

        Raises:
            Unsupported: the peer refused, or quantised nothing.
        """
        try:
            # Bars and logs of the peers are no part of a table on stdout.
            with contextlib.redirect_stdout(sys.stderr):
                return self.make(copy.deepcopy(module), images)
        except _refusals() as error:
            lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
            raise Unsupported(f"{type(error).__name__}: {lines[0] if lines else ''}") from error


def peers(threads: int) -> Iterator[Peer]:
    """Every peer, with its result run on so many threads."""
    yield Peer("NNCF", "quantize of OpenVINO's model, defaults", "W8A8", "openvino",
               lambda m, x: _nncf_openvino(m, x, threads))  # fmt: skip
    yield Peer("NNCF", "the same, preset mixed, accurate bias correction", "W8A8", "openvino",
               lambda m, x: _nncf_openvino(m, x, threads, accurate=True))  # fmt: skip
    yield Peer("NNCF", "quantize of the torch module, defaults", "W8A8", "eager", _nncf_torch)
    yield Peer("NNCF", "quantize of the exported program, defaults", "W8A8", "eager", _nncf_fx)
    yield Peer("torchao", "PT2E, X86InductorQuantizer", "W8A8", "eager", _pt2e)
    yield Peer("torchao", "quantize_, Int8WeightOnlyConfig", "W8", "eager",
               lambda m, _: _weight_only(m, "int8"))  # fmt: skip
    yield Peer("NNCF", "quantize of OpenVINO's model, 4-bit weights", "W4A8", "openvino",
               lambda m, x: _nncf_openvino(m, x, threads, bits=4))  # fmt: skip
    yield Peer("torchao", "PT2E, X86InductorQuantizer, 4-bit weights", "W4A8", "eager",
               lambda m, x: _pt2e(m, x, bits=4))  # fmt: skip
    yield Peer("torchao", "quantize_, Int4WeightOnlyConfig", "W4", "eager",
               lambda m, _: _weight_only(m, "int4"))  # fmt: skip
    yield Peer("torchao", "quantize_, IntxWeightOnlyConfig of int4", "W4", "eager",
               lambda m, _: _weight_only(m, "intx4"))  # fmt: skip


def integers(runner: Runner) -> str:
    """How many of the products that a runner reports run in integers: ``20/20``."""
    summary = audit_summary(runner.audit())
    counts = [summary[kind] for kind in PRODUCTS if kind in summary]
    found = sum(count.get("int8", 0) for count in counts)
    return f"{found}/{sum(sum(count.values()) for count in counts)}"


def _refusals() -> tuple[type[Exception], ...]:
    """What peers raise where they do not support something."""
    import nncf

    return (
        AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError,
        nncf.InternalError, nncf.ParameterNotSupportedError, nncf.UnsupportedBackendError,
        nncf.UnsupportedModelError, nncf.ValidationError,
    )  # fmt: skip


def _exported(module: nn.Module) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=batch)


def _called(module: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
    def scores(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    return scores


# -- NNCF -----------------------------------------------------------------------------------------


def _nncf_openvino(
    module: nn.Module,
    images: torch.Tensor,
    threads: int,
    *,
    accurate: bool = False,
    bits: int = 8,
) -> Quantised:
    import nncf
    import openvino as ov
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        QuantizationParameters,
    )

    options: dict[str, Any] = {}
    if accurate:
        options = {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False}
    if bits != 8:
        options["advanced_parameters"] = AdvancedQuantizationParameters(
            weights_quantization_params=QuantizationParameters(num_bits=bits)
        )
    model = nncf.quantize(
        ov.convert_model(_exported(module)), nncf.Dataset([x[None].numpy() for x in images]),
        subset_size=len(images), **options,
    )  # fmt: skip
    settings = {
        "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
        **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {}),
    }  # fmt: skip
    runner = OpenvinoRunner(ov.Core().compile_model(model, "CPU", settings))
    return Quantised(lambda x: runner.run([x])[0], integers(runner))


def _nncf_torch(module: nn.Module, images: torch.Tensor) -> Quantised:
    # It compiles a C++ extension on first use and by default gives up after a minute.
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    import nncf

    data = nncf.Dataset([x[None] for x in images])
    return Quantised(_called(nncf.quantize(module, data, subset_size=len(images))))


def _nncf_fx(module: nn.Module, images: torch.Tensor) -> Quantised:
    import nncf

    data = nncf.Dataset([x[None] for x in images])
    exported = _exported(module).module()
    return Quantised(_called(nncf.quantize(exported, data, subset_size=len(images))))


# -- torchao --------------------------------------------------------------------------------------


def _pt2e(module: nn.Module, images: torch.Tensor, bits: int = 8) -> Quantised:
    """Static quantisation of the exported program: per channel, activations u8."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = x86.get_default_x86_inductor_quantization_config()
    if bits != 8:
        half = 2 ** (bits - 1)
        weight = replace(config.weight, quant_min=-half, quant_max=half - 1)
        config = replace(config, weight=weight)
    prepared = prepare_pt2e(
        _exported(module).module(), x86.X86InductorQuantizer().set_global(config)
    )
    with torch.no_grad():
        for part in images.split(128):
            prepared(part)
    return Quantised(_called(convert_pt2e(prepared)))


def _weight_only(module: nn.Module, kind: str) -> Quantised:
    """Weights of all convolutions and linear layers, for the configurations that take them."""
    import torchao.quantization as ao

    configs: dict[str, Callable[[], Any]] = {
        "int8": ao.Int8WeightOnlyConfig,
        "int4": ao.Int4WeightOnlyConfig,
        "intx4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }
    ao.quantize_(module, configs[kind](), filter_fn=lambda m, _: _is_product(m))
    layers = [m for m in module.modules() if _is_product(m)]
    changed = sum(type(m.weight) not in (nn.Parameter, torch.Tensor) for m in layers)
    if changed < len(layers):
        raise ValueError(f"it changed {changed} of {len(layers)} layers")
    scores = _called(module)
    scores(np.zeros((1, 3, 32, 32), np.float32))
    return Quantised(scores)


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))
