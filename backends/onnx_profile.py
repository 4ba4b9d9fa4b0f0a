"""ONNX Runtime's names of layers, led back to the user's modules.

ONNX Runtime fuses nodes and names the result after one of them, or after a value of theirs, with
an ending of its own: ``relu_3_nchwc``, ``node_Conv_8_token_1``. The file that it read knows which
node that is, which convolution or product stands before it, and from which module that came:

    relu_3_nchwc  ->  relu_3  ->  Relu <- BatchNormalization <- Conv  ->  "layer1.0.conv2/conv2d_4"

Source of the endings: observed with ONNX Runtime 1.31.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pruna_ir.onnx_export import module_scopes

_ENDING = re.compile(r"(_nchwc|_nhwc|_token_\d+|_quant|/MatMulScaleFusion/)$")
_COSTLY = frozenset(
    {"Conv", "ConvTranspose", "Einsum", "Gemm", "GRU", "LSTM", "MatMul", "MatMulIntegerToFloat"}
)
_FUSED = frozenset(
    {
        "Add", "BatchNormalization", "Clip", "DequantizeLinear", "Elu", "Erf", "Gelu",
        "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "QuantizeLinear", "Relu", "Sigmoid",
        "Softplus", "Tanh",
    }
)  # fmt: skip
"""What ONNX Runtime fuses behind a convolution or product."""


def module_names(path: Path, names: Iterable[str]) -> dict[str, str]:
    """For each of the runtime's names, ``module.path/node`` of the layer behind it.

    Names that the file knows nothing of are left out.
    """
    import onnx

    graph = _Graph(onnx.load(path, load_external_data=False).graph)
    found = {}
    for name in names:
        node = graph.node(name)
        # A fused node bears the name of its last part; the layer is its first.
        scopes = module_scopes(graph.layer(node) or node) if node is not None else []
        if scopes:
            found[name] = "/".join([*scopes[-2:-1], scopes[-1]]).removeprefix("/")
    return found


class _Graph:
    """An ONNX graph with its nodes by name and by value, and its values' readers counted."""

    def __init__(self, proto: Any) -> None:
        self._named = {node.name: node for node in proto.node}
        self._makers = {value: node for node in proto.node for value in node.output}
        self._readers = Counter(value for node in proto.node for value in node.input)

    def node(self, name: str) -> Any:
        """The node that the runtime's name means; None where the file has none like it."""
        while name not in self._named and name not in self._makers:
            shorter = _ENDING.sub("", name)
            if shorter == name:
                return None
            name = shorter
        return self._named.get(name) or self._makers[name]

    def layer(self, node: Any) -> Any:
        """The convolution or product that a node is, or can be fused behind; None without one."""
        if node.op_type in _COSTLY:
            return node
        if node.op_type not in _FUSED:
            return None
        for value in node.input:
            maker = self._makers.get(value)
            if maker is not None and self._readers[value] == 1:
                found = self.layer(maker)
                if found is not None:
                    return found
        return None
