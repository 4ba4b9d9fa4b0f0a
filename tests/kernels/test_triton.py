"""Triton's kernels: right in its interpreter, and machine code for each GPU from Ampere on.

Triton decides at its import whether it interprets, so both run in processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from pruna_ir.kernels import triton_code, triton_conv_act, triton_ffn, triton_int8_linear
from tests.wheels import ROOT

COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pruna_ir.kernels import triton_conv_act, triton_ffn, triton_int8_linear

LEAST = 99 << 10  # bytes of shared memory that every GPU from Ampere on gives a block

def build(kernel, kind, tensors, constants, columns):
    constants |= {"ROWS": 128, "COLUMNS": columns}
    tensors = {name: pointer or "*" + kind for name, pointer in tensors.items()}
    mma = {"fp16": "mma", "bf16": "mma", "fp32": "tf32", "i8": "mma"}[kind]
    names = kernel.arg_names
    signature = {name: tensors.get(name, "fp32" if name in "ab" else "i32") for name in names}
    signature |= {name: "constexpr" for name in constants}
    source = ASTSource(kernel, signature, constexprs=constants)
    for capability in (80, 89, 90):
        built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        print(kernel.__name__, kind, capability, len(built.asm["cubin"]) > 0,
              mma in built.asm["ptx"], built.metadata.shared <= LEAST, flush=True)

floats = dict.fromkeys(["x", "weight", "bias", "gate", "gate_bias", "residual", "y"])
for kind, precision in (("fp32", "tf32"), ("bf16", "ieee")):
    build(triton_ffn._kernel(), kind, floats, {
        "ACTIVATION": "silu", "BIASED": True, "GATED": True, "GATE_BIASED": True,
        "ADDED": True, "PRECISION": precision, "DEPTH": 32,
    }, 64)
build(triton_conv_act._kernel(), "fp32", floats, {
    "TAPS_H": 3, "TAPS_W": 3, "STRIDE_H": 2, "STRIDE_W": 1, "PADDING_H": 1, "PADDING_W": 1,
    "DILATION_H": 1, "DILATION_W": 2, "ACTIVATION": "hardswish", "BIASED": True,
    "RESIDUAL": True, "LAST": True, "PRECISION": "tf32", "DEPTH": 32,
}, 128)
integers = {"x": None, "weight": None, "x_scale": "*fp32", "weight_scale": "*fp32",
            "bias": "*fp32", "y": "*fp32"}
build(triton_int8_linear._kernel(), "i8", integers,
      {"BY_ROW": True, "BIASED": True, "DEPTH": 64}, 128)
"""


def run(arguments: list[str], *, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = str(int(interpret))
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip


def test_right_in_the_interpreter():
    done = run(
        ["-m", "pytest", "tests/kernels/triton_interpreted.py", "-n0", "-q", "-rA"], interpret=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # A test for every kernel ran.
    for name in ("test_convolutions", "test_feed_forward_blocks", "test_integer_linear_layers"):
        assert re.search(rf"PASSED .*{name}", done.stdout), done.stdout


def test_compile_to_tensor_core_instructions_from_ampere_on():
    """The largest tiles. No GPU is needed to translate: Triton carries its assembler."""
    done = run(["-c", COMPILE], interpret=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12, done.stdout
    assert all(line[3:] == ["True"] * 3 for line in lines), done.stdout


def test_importing_the_kernels_does_not_import_triton():
    code = (
        "import sys; from pruna_ir.kernels import conv_act, ffn, int8_linear; "
        "sys.exit('triton' in sys.modules)"
    )
    before = run(["-c", "import torch, sys; sys.exit('triton' in sys.modules)"], interpret=False)
    assert run(["-c", code], interpret=False).returncode == before.returncode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_a_cpu_are_not_theirs(dtype):
    x = torch.ones(2, 3, 4, 4, dtype=dtype)
    assert not triton_conv_act.applies(x, x, None, None, 1)
    assert not triton_ffn.applies(x, None)
    assert not triton_int8_linear.applies(x.to(torch.int8))


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(1, 1, (16, 16)), (17, 100, (32, 128)), (5000, 33, (128, 64)), (4096, 4096, (128, 128))],
)
def test_tiles_follow_the_shape(rows, columns, expected):
    assert triton_code.tiles(rows, columns, torch.device("cpu")) == expected


def test_a_gate_halves_the_widest_tile():
    assert triton_code.tiles(4096, 4096, torch.device("cpu"), widest=64) == (128, 64)


def test_float32_is_multiplied_as_torch_says():
    assert triton_code.precision(torch.float16, convolution=True) == "ieee"
    assert triton_code.precision(torch.float32, convolution=False) == "ieee"
    assert triton_code.precision(torch.float32, convolution=True) == (
        "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    )
