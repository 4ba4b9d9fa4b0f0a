"""What becomes of a pruned program: saved, loaded elsewhere, quantised, lowered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.build import build
from pruna_ir.cost import cost
from pruna_ir.data import TensorData
from pruna_ir.lowering import Verdict
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.serialize import save_program
from pruna_ir.stimuli import random_inputs
from pruna_ir.transform import Context
from tests.networks import ConvNet, seeded

PRUNE = "canonicalize,prune-channels{ratio=0.5}"
QUANTISE = (
    "fold-constants,fold-batch-norm,fuse-conv-bn-relu,insert-fake-quant,eliminate-dead-code"
)


def convnet():
    return seeded(ConvNet).eval(), (torch.randn(2, 3, 9, 9),), {}


def resnet18():
    import torchvision

    return torchvision.models.resnet18(num_classes=10).eval(), (torch.randn(2, 3, 64, 64),), {}


def vit():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    return model.eval(), (torch.randn(2, 3, 32, 32),), {}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=48, n_layer=1, n_head=4, vocab_size=50, n_positions=16, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval(), (), {"input_ids": torch.randint(0, 50, (2, 9))}


MODELS = {"convnet": convnet, "resnet18": resnet18, "vit": vit, "gpt2": gpt2}


def pruned(name: str) -> tuple[nn.Module, Program, Program]:
    """A model, its program, and the pruned one."""
    torch.manual_seed(0)
    module, inputs, named = MODELS[name]()
    program = capture(module, inputs, named)
    return module, program, Pipeline.parse(PRUNE).run(program).program


# Imports nothing of the tests: what loads is the file alone.
FRESH = """
import sys
import torch
from pruna_ir.serialize import load_program
program = load_program(sys.argv[1])
torch.set_num_threads(1)
torch.save(list(program(*torch.load(sys.argv[2]))), sys.argv[3])
print(program.hash(), "tests" in sys.modules, *(entry.text for entry in program.history))
"""


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_pruned_program_computes_the_same_in_a_fresh_process(
    name: str, tmp_path: Path
) -> None:
    _, _, small = pruned(name)
    inputs = random_inputs(small, seed=1)
    files = [tmp_path / file for file in ("program.pt2", "inputs", "outputs")]
    save_program(small, files[0])
    torch.save(list(inputs), files[1])
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, files)],
        capture_output=True, text=True, check=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split() == [
        small.hash(), "False", "canonicalize", "prune-channels",
    ]  # fmt: skip
    for there, here in zip(torch.load(files[2]), small(*inputs), strict=True):
        assert torch.equal(there, here)


@pytest.mark.parametrize("name", MODELS)
def test_weights_carry_the_names_that_they_have_in_the_module(name: str) -> None:
    module, _, small = pruned(name)
    own = {*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers())}
    stored = small.tensors()
    parameters = {n for n, tensor in stored.items() if isinstance(tensor, nn.Parameter)}
    assert parameters <= set(module.state_dict())
    assert {n for n, tensor in stored.items() if tensor.is_floating_point()} <= own


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("name", MODELS)
def test_pruned_then_quantised_then_lowered(name: str, target: str, tmp_path: Path) -> None:
    _, program, small = pruned(name)
    data = TensorData(random_inputs(small, seed=2), batch_size=2)
    context = Context(data=data, target=target)
    result = Pipeline.parse(QUANTISE).run(small, context)
    artifact = build(result.program, target, tmp_path / "artifact", context)
    assert artifact.certificate.verdict is Verdict.PASSED
    # Half of the channels at a quarter of the bits.
    assert cost(result.program).bytes < 0.25 * cost(program).bytes
    assert any(
        "int" in precision
        for counts in artifact.certificate.audit_summary().values()
        for precision in counts
    )
