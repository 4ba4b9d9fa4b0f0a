"""The tvm backend: shared libraries that compute what the program does, and load without torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_build import has_dots, host_target
from pruna_ir.backends.tvm_runtime import MODEL, PARAMETERS, load_tvm, processor_features
from pruna_ir.capture import capture
from pruna_ir.errors import LoweringError, ToolchainError, UnsupportedError, UsageError
from pruna_ir.kernels.fake_quant import fake_quant
from pruna_ir.lowering import LoadOptions, Lowered
from pruna_ir.program import Program
from pruna_ir.transform import Context
from tests.backends.backend_models import Block, Quantized, SmallCnn, inputs, program

BACKEND = ToTvm()


def lowered(made: Program, folder: Path) -> Lowered:
    return BACKEND.lower(made, folder, Context())


def largest_difference(made: Program, folder: Path, *values: torch.Tensor) -> float:
    runner = BACKEND.load(folder, LoadOptions(threads=2))
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in made(*values)]
    actual = runner.run([value.numpy() for value in values])
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    pairs = zip(actual, expected, strict=True)
    return max(float(np.abs(a.astype(float) - e.astype(float)).max()) for a, e in pairs)


Artifacts = Callable[..., tuple[Program, Path]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A network, in int8 or not, and the folder of its artifact, built once."""

    @functools.cache
    def made(kind: type[torch.nn.Module], *, int8: bool) -> tuple[Program, Path]:
        captured, folder = program(kind, int8=int8), tmp_path_factory.mktemp("artifact")
        lowered(captured, folder)
        return captured, folder

    return made


@pytest.mark.parametrize("kind", [SmallCnn, Block])
@pytest.mark.parametrize("int8", [False, True])
def test_computes_what_the_program_does_for_every_batch(
    kind: type[torch.nn.Module], int8: bool, artifact: Artifacts
) -> None:
    made, folder = artifact(kind, int8=int8)
    for batch in (1, 3):
        assert largest_difference(made, folder, inputs(kind, batch)) < 2e-6


def test_another_programs_artifact_is_told_apart(artifact: Artifacts) -> None:
    _, folder = artifact(SmallCnn, int8=False)
    other = program(SmallCnn, seed=2)
    assert largest_difference(other, folder, inputs(SmallCnn, 3)) > 1e-2


def test_quantised_weights_are_stored_as_int8_and_the_audit_tells_what_multiplies(
    artifact: Artifacts,
) -> None:
    """Layers multiply bytes where the processor can."""
    _, folder = artifact(SmallCnn, int8=True)
    with np.load(folder / PARAMETERS) as stored:
        arrays = [stored[name] for name in stored]
    weights = [array for array in arrays if array.ndim >= 2 and array.size > 18]
    assert {array.dtype for array in weights} == {np.dtype(np.int8)}
    runner = BACKEND.load(folder, LoadOptions())
    products = [row for row in runner.audit() if row.kind in ("conv", "linear")]
    precision = "int8" if has_dots(host_target()) else "float32"
    assert [(row.kind, row.precision) for row in products] == [
        ("conv", precision),
        ("conv", precision),
        ("conv", precision),
        ("linear", precision),
    ]


@pytest.mark.skipif(not has_dots(host_target()), reason="the processor has no AVX512-VNNI")
@pytest.mark.parametrize("convolutions", [False, True])
def test_layers_of_equal_sizes_are_one_function_whatever_their_grids(
    convolutions: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(16, 16, 3, padding=1) if convolutions else torch.nn.Linear(16, 16)
        for _ in range(3)
    ]
    scales = (0.03, 0.02, 0.05)
    quantised = [Quantized(layer, scale) for layer, scale in zip(layers, scales, strict=True)]
    first, second, third = quantised
    module = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), third)
    x = torch.randn(2, 16, 5, 16)
    made = capture(module.eval(), (x,))
    lowered(made, tmp_path)
    assert largest_difference(made, tmp_path, x) < 2e-6
    audit = BACKEND.load(tmp_path, LoadOptions()).audit()
    first, again, last = [row.layer for row in audit if row.kind in ("conv", "linear")]
    assert first == again != last
    # The next layer's bytes are made where a layer writes its result.
    assert "quantize" in first


class Grids(torch.nn.Module):
    """An unsigned, a narrow and a per-channel activation grid."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.25))
        self.register_buffer("zero", torch.tensor(3, dtype=torch.int32))
        self.register_buffer("scales", torch.tensor([0.5, 0.125, 1.0]))
        self.register_buffer("zeros", torch.tensor([0, 1, -2], dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            fake_quant(x, self.scale, self.zero, None, 0, 255),
            fake_quant(x, self.scale, self.zero, None, -8, 7),
            fake_quant(x, self.scales, self.zeros, 1, -128, 127),
            fake_quant(x, self.scales, self.zeros, -2, -8, 7),
        )


def test_every_grid_rounds_as_the_operator_does(tmp_path: Path) -> None:
    """Multiples of a sixteenth hit the ties of every grid."""
    made = capture(Grids(), (torch.zeros(2, 3, 5),))
    lowered(made, tmp_path)
    x = torch.arange(-600, 600).reshape(80, 3, 5) / 16
    assert largest_difference(made, tmp_path, x) == 0.0


class Several(torch.nn.Module):
    """Two inputs of different types and two outputs, one of them an integer."""

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"picked": x.gather(1, index), "best": x.argmax(1)}


def test_several_inputs_and_outputs_keep_order_and_type(tmp_path: Path) -> None:
    index = torch.tensor([[0, 2], [1, 1]])
    made = capture(Several(), (torch.randn(2, 3), index))
    lowered(made, tmp_path)
    x = torch.randn(4, 3)
    assert largest_difference(made, tmp_path, x, index.repeat(2, 1)) == 0.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    lowered(capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),)), folder)
    return folder


def copy(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("name", ["model.so", "parameters.npz", "model.json", "kernels.json"])
def test_a_truncated_file_is_refused(name: str, small: Path, tmp_path: Path) -> None:
    file = copy(small, tmp_path) / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(LoweringError, match=name):
        BACKEND.load(tmp_path, LoadOptions())


def test_a_missing_file_is_refused(small: Path, tmp_path: Path) -> None:
    (copy(small, tmp_path) / "model.so").unlink()
    with pytest.raises(LoweringError, match=r"model\.so is missing"):
        BACKEND.load(tmp_path, LoadOptions())


def test_wrong_inputs_are_refused(small: Path) -> None:
    runner = BACKEND.load(small, LoadOptions())
    with pytest.raises(UsageError, match=r"input input is float64\[2, 3\], but .* float32"):
        runner.run([np.zeros((2, 3))])
    with pytest.raises(UsageError, match="dimension 1 must be 3"):
        runner.run([np.zeros((2, 4), np.float32)])
    with pytest.raises(UsageError, match="takes 1 inputs"):
        runner.run([])


def test_a_processor_without_the_instructions_is_told(small: Path, tmp_path: Path) -> None:
    description = copy(small, tmp_path) / MODEL
    content = json.loads(description.read_text())
    content["processor"] = [*content["processor"], "avx1024f"]
    description.write_text(json.dumps(content))
    with pytest.raises(ToolchainError, match="lacks avx1024f"):
        load_tvm(tmp_path)


def test_processor_features_are_read_from_the_system(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f pae fma\n\nflags : other\n")
    assert processor_features(file) == ["avx2", "avx512f", "fma", "fpu", "pae"]
    assert processor_features(tmp_path / "absent") == []


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert BACKEND.availability().build == ""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    availability = BACKEND.availability()
    assert "needs a C++ compiler" in availability.build
    assert "apt-get install g++" in availability.build
    assert availability.execute == ""
    with pytest.raises(ToolchainError, match=r"needs a C\+\+ compiler"):
        lowered(program(SmallCnn), tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX or CC names (no-such-compiler)" in BACKEND.availability().build


class Determinants(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x) + torch.linalg.det(x.transpose(1, 2)).relu()


def test_names_every_node_that_tvm_cannot_translate(tmp_path: Path) -> None:
    made = capture(Determinants(), (torch.randn(2, 3, 3),))
    offenders = BACKEND.unsupported(made)
    assert [offender.operator for offender in offenders] == ["aten._linalg_det.default"] * 2
    assert all("test_to_tvm.py" in offender.source for offender in offenders)
    with pytest.raises(UnsupportedError, match=r"(?s)_linalg_det.*_linalg_det"):
        lowered(made, tmp_path)
    assert BACKEND.unsupported(program(Block, int8=True)) == []


class Convolutions(torch.nn.Module):
    """Strides, dilation, padding on one side, widths around the register tile, odd channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [
                torch.nn.Conv2d(3, 17, 3, stride=2, padding=1),
                torch.nn.Conv2d(3, 5, (1, 5), dilation=(1, 3), bias=False),
                torch.nn.Conv2d(3, 16, (4, 2), stride=(3, 1), padding=(0, 2)),
                torch.nn.Conv2d(3, 33, 1),
            ]
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x).relu() for layer in self.layers)


def test_packed_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 11, 29)
    made = capture(Convolutions().eval(), (x[:2],))
    assert lowered(made, tmp_path).facts["tvm-default-schedules"] == []
    assert largest_difference(made, tmp_path, x) < 2e-6


class Products(torch.nn.Module):
    """Matrix products with widths that do and do not divide into panels, constant and computed."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.odd = torch.nn.Linear(7, 192), torch.nn.Linear(7, 13)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.wide(x).relu(), self.odd(x), x @ x.transpose(1, 2), self.wide(x[:, 0])


def test_products(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = capture(Products(), (torch.randn(2, 5, 7),))
    assert lowered(made, tmp_path).facts["tvm-default-schedules"] == []
    assert largest_difference(made, tmp_path, torch.randn(3, 5, 7)) < 2e-6


class DoubleProducts(torch.nn.Module):
    """Products in float64, written with a bias, with factors, in batches and in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(7, 4, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, nothing = x.double(), self.bias / 0
        rows = x[:, 0]
        return (
            x @ x.transpose(1, 2),
            torch.mm(rows, self.weight),
            torch.addmm(self.bias, rows, self.weight, beta=2, alpha=3),
            torch.addmm(nothing, rows, self.weight, beta=0),
        )


def test_products_in_float64_stay_so(tmp_path: Path) -> None:
    """TVM's importer gives float32 for products of any type."""
    torch.manual_seed(0)
    made = capture(DoubleProducts().eval(), (torch.randn(2, 5, 7),))
    lowered(made, tmp_path)
    x = torch.randn(3, 5, 7)
    results = BACKEND.load(tmp_path, LoadOptions()).run([x.numpy()])
    assert {str(result.dtype) for result in results} == {"float64"}
    assert largest_difference(made, tmp_path, x) < 1e-13


def test_a_grid_that_is_computed_becomes_plain_arithmetic(tmp_path: Path) -> None:
    class Dynamic(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zero = torch.zeros((), dtype=torch.int32)
            return fake_quant(x, x.abs().sum() / 127, zero, None, -128, 127)

    made = capture(Dynamic(), (torch.ones(2, 3),))
    lowered(made, tmp_path)
    assert largest_difference(made, tmp_path, torch.randn(4, 3)) < 2e-6


def test_gpt2_with_the_views_of_its_source(tmp_path: Path) -> None:
    """Not canonicalised: its views meet an attention whose decomposition has other strides."""
    import transformers
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 48, "n_head": 4, "vocab_size": 90}
    config = transformers.GPT2Config(**sizes, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).eval()
    made = capture(model, (torch.randint(0, 90, (2, 19)),))
    lowered(made, tmp_path)
    assert largest_difference(made, tmp_path, torch.randint(0, 90, (3, 19))) < 2e-5


def test_a_residual_network(tmp_path: Path) -> None:
    """ResNet-18 with half of its blocks."""
    from torchvision.models.resnet import BasicBlock, ResNet
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    made = capture(ResNet(BasicBlock, [1, 1, 1, 1]).eval(), (x,))
    facts = lowered(made, tmp_path).facts
    assert facts["tvm-default-schedules"] == []
    assert largest_difference(made, tmp_path, x[:1]) < 2e-5


class Reductions(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        least, where = x.min(1)
        return (
            x.amax((1, 2)),
            x.amin(1, keepdim=True),
            x.amax(),
            (x > 1).any(),
            least,
            where,
            x.prod(2),
            (x > 0).cumsum(-1),
            x.cumsum(1),
            x.cumprod(-1),
        )


def test_reductions_and_scans(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7)
    made = capture(Reductions(), (x[:2],))
    assert BACKEND.unsupported(made) == []
    lowered(made, tmp_path)
    assert largest_difference(made, tmp_path, x) < 1e-6
