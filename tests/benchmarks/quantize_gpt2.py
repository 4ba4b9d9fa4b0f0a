"""Which matrix products of a Hugging Face GPT-2 are quantised, and which run so: an audit.

    python tests/benchmarks/quantize_gpt2.py
    python tests/benchmarks/quantize_gpt2.py --width 128 --vocabulary 1000    (minutes less)

GPT-2 is built from a config: random weights, no data is needed but random tokens. It has four
``addmm`` in each layer, the head (tied to the embedding), and two products in each attention,
which stand in one operator unless spell-out-attention takes it apart.

For every method and backend the table says how many of these products the program has on grids
(and on which operands), which it has not and why, and what the runtime itself says that it runs.
TVM computes all of them in float32, with weights that it stores as integers and expands when it
loads; OpenVINO computes with dynamic ranges in float32, with integer weights. OpenVINO puts what
attention's products became into subgraphs that it lists under no operator's name, so its audit
counts products with weights only. TensorRT lists the layers of its engine; it is built where
``--backends`` names it.

Exits 1 where a product with a weight is not quantised, or where ONNX Runtime runs fewer products
in integers, or with integer weights, than the program has, or OpenVINO fewer with weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.certify import audit_summary
from pruna_ir.data import TensorData
from pruna_ir.pipeline import Pipeline, PipelineResult
from pruna_ir.program import Program, module_path
from pruna_ir.quantization import quantized_operands
from pruna_ir.transform import Context

aten = torch.ops.aten
METHODS = {
    "int8 static": "canonicalize,insert-fake-quant",
    "int8 static, attention spelled out": (
        "canonicalize,spell-out-attention,insert-fake-quant{products=true}"
    ),
    "int8 dynamic": "canonicalize,quantize-dynamically{tied=true}",
    "int8 weights": "canonicalize,quantize-weights{tied=true}",
    "int4 weights": "canonicalize,quantize-weights{bits=4,block=32,tied=true}",
}
BACKENDS = ("onnx", "openvino", "tvm", "tensorrt")
_WITH_WEIGHT = (aten.linear.default, aten.addmm.default, aten.mm.default)
_PRODUCTS = (*_WITH_WEIGHT, aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_FUSED = aten.scaled_dot_product_attention.default
_KINDS = ("linear", "matmul", "attention")


@dataclass(frozen=True)
class Product:
    """A product of a program.

    Attributes:
        name: its module's path and its node.
        node: its node's name.
        weighty: whether one operand is a weight.
        operands: which operands are on grids.
    """

    name: str
    node: str
    weighty: bool
    operands: tuple[str, ...]


def products(program: Program) -> Iterator[Product]:
    """Every matrix product, in order; a fused attention counts as one."""
    for node in program.calls(*_PRODUCTS, _FUSED):
        operands = tuple(name for name, _, _ in quantized_operands(node))
        where = module_path(node)
        yield Product(
            f"{where}/{node.name}" if where else node.name,
            node.name,
            node.target in _WITH_WEIGHT or _reads_weight(node),
            operands,
        )


def _reads_weight(node: fx.Node) -> bool:
    return any(source.op == "get_attr" for source in node.all_input_nodes[:2])


def of_program(result: PipelineResult) -> tuple[list[Product], list[str]]:
    """The products on grids, and a line for each kind of others, with the reason."""
    done, left = [], Counter[str]()
    said: dict[str, str] = {}
    for remark in result.remarks:
        if remark.kind == "missed":
            said[remark.node] = remark.message
    for product in products(result.program):
        if product.operands:
            done.append(product)
        else:
            reason = said.get(product.node, "the method does not reach it")
            left[reason if not product.weighty else f"{product.name}: {reason}"] += 1
    return done, [f"{count} x {reason}" for reason, count in left.items()]


def gpt2(arguments: argparse.Namespace) -> tuple[Program, TensorData]:
    """The captured model and random tokens to calibrate on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=arguments.layers, n_head=arguments.heads, n_embd=arguments.width,
        vocab_size=arguments.vocabulary, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, arguments.vocabulary, (4, arguments.tokens))
    program = capture(model, (), {"input_ids": tokens[:1]}, dynamic_batch=False)
    return program, TensorData((tokens,), batch_size=1)


def runs(
    result: PipelineResult, backend: str, context: Context
) -> tuple[dict[str, dict[str, int]], str]:
    """The runtime's own count of products by precision, and the certificate's verdict."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = build(result.program, backend, Path(folder) / "artifact", context)
    summary = audit_summary(artifact.certificate.audit)
    found = {kind: counts for kind, counts in summary.items() if kind in _KINDS}
    return found, artifact.certificate.verdict.value


def main() -> None:
    """Print the audit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=768, help="features of a token")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--backends", nargs="+", default=BACKENDS[:3], choices=list(BACKENDS))
    arguments = parser.parse_args()
    program, data = gpt2(arguments)
    canonical = Pipeline.parse("canonicalize").run(program).program
    found = list(products(canonical))
    weighty = sum(product.weighty for product in found)
    print(
        f"GPT-2 of {arguments.layers} layers: {weighty} products with a weight, "
        f"{len(found) - weighty} fused attentions of two products each"
    )
    missed = []
    for method in arguments.methods:
        for backend in arguments.backends:
            start = time.perf_counter()
            context = Context(data=data, target=backend)
            result = Pipeline.parse(METHODS[method]).run(program, context)
            done, left = of_program(result)
            counts, verdict = runs(result, backend, context)
            own = sum(product.weighty for product in done)
            quantised = sum(
                n for kind in counts.values() for what, n in kind.items() if what.startswith("int")
            )
            print(f"{method}, {backend}  [{verdict}, {time.perf_counter() - start:.0f} s]")
            print(f"  on grids   {own} of {weighty} with a weight, {len(done) - own} of attention")
            for line in left:
                print(f"  not        {line}")
            for kind, by_precision in sorted(counts.items()):
                told = ", ".join(f"{n} {what}" for what, n in by_precision.items())
                print(f"  runs       {kind}: {told}", flush=True)
            if own < weighty:
                missed.append(f"{method}, {backend}: {weighty - own} weights are not quantised")
            due = {"onnx": len(done), "openvino": own}.get(backend, 0)
            if quantised < due:
                missed.append(f"{method}, {backend}: {quantised} of {due} run quantised")
    print("\n".join(["missed:", *missed]) if missed else "all run as the programs have them")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
