"""What a user types becomes a Program; what does not exist is named with what does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.errors import CaptureError, PrunaError, UsageError
from pruna_ir.factories import Model
from pruna_ir.serialize import save_program
from pruna_ir.sources import Request, Shape, load_source, parse_dynamic, parse_shapes, resolve

FACTORIES = '''
import torch
from torch import nn
from beside import WIDTH


class Scaled(nn.Linear):
    def forward(self, x, scale=None):
        y = super().forward(x)
        return y if scale is None else y * scale


MODULE = nn.Linear(3, WIDTH)
NUMBER = 4


def bare():
    return nn.Linear(3, WIDTH)


def with_inputs():
    return nn.Linear(3, WIDTH), (torch.randn(2, 3),)


def with_tensor():
    return nn.Linear(3, WIDTH), torch.randn(2, 3)


def with_keywords():
    return Scaled(3, WIDTH), (torch.randn(2, 3),), {"scale": torch.ones(2, WIDTH)}


def wrong():
    return 3


def fails():
    raise ValueError("no such width")


def leaves():
    raise SystemExit(4)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "nets.py").write_text(FACTORIES)
    yield tmp_path / "nets.py"
    sys.modules.pop("beside", None)


@pytest.mark.parametrize("name", ["with_inputs", "with_tensor"])
def test_a_factory_in_a_file(file: Path, name: str) -> None:
    program = load_source(f"{file}:{name}")
    assert [str(spec) for spec in program.inputs] == ["input: float32[batch, 3]"]
    assert str(program.outputs[0]) == "output: float32[batch, 5]"


def test_keyword_inputs(file: Path) -> None:
    program = load_source(f"{file}:with_keywords")
    assert [spec.name for spec in program.inputs] == ["x", "scale"]


@pytest.mark.parametrize("name", ["bare", "MODULE"])
def test_a_factory_without_inputs_needs_a_shape(file: Path, name: str) -> None:
    with pytest.raises(CaptureError, match=r"give --input-shape input=2x3x224x224"):
        load_source(f"{file}:{name}")
    for shapes in ({"input": Shape((2, 3))}, {"": Shape((2, 3))}):
        assert load_source(f"{file}:{name}", Request(shapes=shapes)).inputs[0].shape[1] == 3


def test_random_weights_are_seeded(file: Path) -> None:
    first, again, other = (
        load_source(f"{file}:with_inputs", Request(seed=seed)) for seed in (1, 1, 2)
    )
    assert first.hash() == again.hash() != other.hash()


def test_the_callers_random_state_is_left_alone(file: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    resolve(f"{file}:with_inputs")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("with_input", r"has no 'with_input'; nearest: with_inputs"),
        ("NUMBER", r"NUMBER is a int, not a function"),
        ("wrong", r"returned a int; return a module, \(module, args\)"),
        ("fails", r"failed: ValueError: no such width\n  .*nets\.py:\d+\n +raise ValueError"),
        ("leaves", r"failed: SystemExit: 4"),
    ],
)
def test_factories_that_do_not_work(file: Path, name: str, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        load_source(f"{file}:{name}")


def test_a_file_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(CaptureError, match=r"broken\.py failed: SyntaxError"):
        load_source(f"{tmp_path / 'broken.py'}:f")
    with pytest.raises(CaptureError, match=r"absent\.py: no such file"):
        load_source(f"{tmp_path / 'absent.py'}:f")


def test_a_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load_source("nets:with_inputs").outputs[0].shape[1] == 5
    sys.modules.pop("nets")
    with pytest.raises(CaptureError, match="package no_such_package is not importable"):
        load_source("no_such_package:f")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("resnet18", "'resnet18' is no model; give a .pt2 file"),
        ("net.py", "name the function that makes the model, as in net.py:make_model"),
        ("w.pt", "holds weights, not a model; .* with --weights w.pt"),
        ("absent.pt2", r"absent\.pt2: cannot be read"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; nearest: resnet18"),
        ("timm:resnet10x", "timm has no model 'resnet10x'; nearest: .*resnet10t"),
        ("hf:gtp2", "transformers has no architecture 'gtp2'; nearest: gpt2"),
        ("hf:gpt2{layers=3}", "the config of gpt2 has no field 'layers'; nearest: n_layer"),
        ("hf:gpt2{n_layer=", "expected a value"),
    ],
)
def test_what_does_not_exist(text: str, reason: str) -> None:
    with pytest.raises(PrunaError, match=reason):
        load_source(text)


def test_torchvision_knows_its_input_size() -> None:
    model = resolve("torchvision:squeezenet1_1")
    assert isinstance(model, Model)
    assert model.args[0].shape == (2, 3, 224, 224)
    program = load_source(
        "torchvision:squeezenet1_1", Request(shapes={"": Shape((2, 3, 65, 63))})
    )
    assert program.inputs[0].shape == ("batch", 3, 65, 63)


def test_timm_knows_its_input_size() -> None:
    model = resolve("timm:resnet10t")
    assert isinstance(model, Model)
    assert model.args[0].shape == (2, 3, 176, 176)


GPT2 = "hf:gpt2{n_layer=1,n_embd=12,n_head=2,vocab_size=31,n_positions=16}"


def test_a_language_model_from_a_config() -> None:
    program = load_source(GPT2, Request(dynamic={"input_ids": {1: "sequence"}}))
    assert str(program.inputs[0]) == "input_ids: int64[batch, sequence]"
    assert [str(spec) for spec in program.outputs] == ["logits: float32[batch, sequence, 31]"]
    assert int(program.examples[0].max()) < 31
    assert program.examples[0].shape == (2, 16)


def test_a_config_file_and_a_folder_with_weights(tmp_path: Path) -> None:
    model = resolve(GPT2)
    assert isinstance(model, Model)
    model.module.config.save_pretrained(tmp_path)
    random = load_source(f"hf:{tmp_path / 'config.json'}")
    state = model.module.state_dict()
    state.pop("lm_head.weight")
    save_file({k: v.contiguous() + 1 for k, v in state.items()}, tmp_path / "model.safetensors")
    loaded = load_source(f"hf:{tmp_path}")
    name = "transformer.wpe.weight"
    assert torch.equal(loaded.tensor(name), model.module.transformer.wpe.weight + 1)
    assert not torch.equal(random.tensor(name), loaded.tensor(name))


def test_a_config_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "evil.Net"}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit\n")
    with pytest.raises(CaptureError, match="'mine' is not known .* is never run"):
        load_source(f"hf:{tmp_path}")


def test_a_saved_program_with_and_without_weights(tmp_path: Path) -> None:
    program = capture(nn.Linear(3, 2), (torch.randn(2, 3),))
    save_program(program, tmp_path / "p.pt2")
    assert load_source(str(tmp_path / "p.pt2")).hash() == program.hash()
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "w.safetensors")
    loaded = load_source(str(tmp_path / "p.pt2"), Request(tmp_path / "w.safetensors"))
    assert torch.equal(loaded.tensor("weight"), torch.ones(2, 3))
    with pytest.raises(UsageError, match="the shapes of a saved program were fixed"):
        load_source(str(tmp_path / "p.pt2"), Request(shapes={"": Shape((4, 3))}))


def test_weights_for_a_factory(file: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(5, 3), "bias": torch.zeros(5)}, tmp_path / "w.safetensors")
    program = load_source(f"{file}:with_inputs", Request(tmp_path / "w.safetensors"))
    assert torch.equal(program(torch.ones(1, 3))[0], torch.full((1, 5), 3.0))


def test_shapes_of_unknown_inputs_and_wrong_shapes(file: Path) -> None:
    with pytest.raises(UsageError, match="has no input 'y'; its inputs are input"):
        load_source(f"{file}:with_inputs", Request(shapes={"y": Shape((2, 3))}))
    with pytest.raises(CaptureError, match="the model cannot be captured"):
        load_source(f"{file}:with_inputs", Request(shapes={"": Shape((2, 4))}))
    with pytest.raises(UsageError, match="the model has inputs x, scale; write --input-shape x="):
        load_source(f"{file}:with_keywords", Request(shapes={"": Shape((2, 3))}))


names = st.from_regex(r"[a-z_]\w{0,6}", fullmatch=True)
sizes = st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=40)
@given(names, sizes, st.sampled_from([None, "int64", "float16"]))
def test_shapes_parse(name: str, size: tuple[int, ...], dtype: str | None) -> None:
    text = f"{name}={'x'.join(map(str, size))}" + (f":{dtype}" if dtype else "")
    assert parse_shapes([text]) == {name: Shape(size, getattr(torch, dtype) if dtype else None)}


@settings(deadline=None, max_examples=40)
@given(names, st.integers(0, 9), names)
def test_dynamic_dimensions_parse(name: str, axis: int, dim: str) -> None:
    assert parse_dynamic([f"{name}:{axis}={dim}"]) == {name: {axis: dim}}


@pytest.mark.parametrize("text", ["x=2,3", "x=", "2x3:floaty", "x=2x3:Tensor", "=2x3", "x y=2"])
def test_malformed_shapes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a shape"):
        parse_shapes([text])


@pytest.mark.parametrize("text", ["x=1", "x:a=b", "x:1", "x:1="])
def test_malformed_dynamic_dimensions_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a dynamic dimension"):
        parse_dynamic([text])


def test_a_folder_that_merely_bears_an_architectures_name_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "distilbert").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(CaptureError, match=r"other/config.json: is not a readable config"):
        resolve("hf:other")
    model = resolve("hf:distilbert")
    assert isinstance(model, Model)
    assert model.module.config.model_type == "distilbert"
