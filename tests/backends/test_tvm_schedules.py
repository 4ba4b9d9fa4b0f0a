"""What no rule covers keeps TVM's loops, with a warning and an entry in the manifest."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_build import Tiles, _scheduled, has_dots, host_target
from pruna_ir.backends.tvm_import import import_program
from pruna_ir.backends.tvm_schedules import covers
from pruna_ir.build import build, open_artifact
from pruna_ir.capture import capture
from pruna_ir.lowering import LoadOptions
from pruna_ir.program import Program
from tests.backends.test_to_tvm import Quantized


class Volumes(torch.nn.Module):
    """A covered convolution and one over three dimensions, which no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.nn.Conv2d(3, 5, 3)
        self.deep = torch.nn.Conv3d(1, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(self.flat(x)[:, None])


def captured(module: torch.nn.Module) -> Program:
    torch.manual_seed(0)
    return capture(module.eval(), (torch.randn(2, 3, 9, 8),))


def test_an_operator_without_a_rule_is_named_in_a_warning_and_in_the_manifest(
    tmp_path: Path,
) -> None:
    made = captured(Volumes())
    with pytest.warns(RuntimeWarning, match=r"no rule covers its operator.*conv3d"):
        build(made, "tvm", tmp_path / "artifact")
    artifact = open_artifact(tmp_path / "artifact")
    assert artifact.certificate.verdict.name == "PASSED"
    assert artifact.manifest.facts["tvm-default-schedules"] == ["fused_conv3d_add1"]
    (line,) = artifact.manifest.warnings
    assert line.startswith("tvm: 1 of the compiled functions keep TVM's own loops")


OPERATORS = {
    "conv2d_transpose": (torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 6)),
    "conv1d_transpose": (torch.nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "conv3d": (torch.nn.Conv3d(4, 6, 3, groups=2), (2, 4, 5, 6, 7)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_unusual_convolutions_are_named(name: str, tmp_path: Path) -> None:
    module, shape = OPERATORS[name]
    made = capture(module.eval(), (torch.randn(*shape),))
    with pytest.warns(RuntimeWarning, match=rf"no rule covers its operator .*{name}"):
        artifact = build(made, "tvm", tmp_path / "artifact")
    assert artifact.certificate.verdict.name == "PASSED"
    assert any(name in kept for kept in artifact.manifest.facts["tvm-default-schedules"])
    assert len(artifact.manifest.warnings) == 1


def test_a_convolution_of_unknown_height_and_width_is_named(tmp_path: Path) -> None:
    made = capture(
        torch.nn.Conv2d(3, 6, 3).eval(), (torch.randn(2, 3, 9, 8),),
        dynamic_dims={"input": {2: "height", 3: "width"}},
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match=r"no rule covers its operator .*conv2d"):
        artifact = build(made, "tvm", tmp_path / "artifact")
    assert any("conv2d" in kept for kept in artifact.manifest.facts["tvm-default-schedules"])


class Sums(torch.nn.Module):
    """Einsums, which are matrix products when they come to TVM, and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 5, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        product = torch.einsum("bhi,hij->bhj", x, self.weight)
        return product, torch.einsum("bhi,bhj,bhk->bijk", x, x, x)


def test_einsums_are_covered_as_matrix_products(tmp_path: Path) -> None:
    made = capture(Sums().eval(), (torch.randn(2, 4, 5),))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        artifact = build(made, "tvm", tmp_path / "artifact")
    assert artifact.certificate.verdict.name == "PASSED"
    assert {row.kind for row in artifact.certificate.audit} >= {"matmul"}


def buffers(module: torch.nn.Module, word: str) -> list[str]:
    """Where the functions with a word in their name keep intermediate values."""
    made = capture(module.eval(), (torch.randn(2, 16),))
    scheduled = _scheduled(import_program(made), host_target(), Tiles())[0]
    texts = [str(f) for name, f in scheduled.functions.items() if word in name.name_hint]
    assert texts
    return [line.strip() for text in texts for line in text.splitlines() if "alloc_buffer" in line]


@pytest.mark.skipif(not has_dots(host_target()), reason="the processor has no AVX512-VNNI")
def test_a_function_and_a_quantiser_are_computed_where_a_product_writes() -> None:
    layers = [Quantized(torch.nn.Linear(16, 16), 0.03), Quantized(torch.nn.Linear(16, 16), 0.02)]
    (accumulators,) = buffers(torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1]), "gelu")
    assert 'scope="local"' in accumulators


def test_many_functions_in_a_row_are_not_one_expression() -> None:
    """The control; LLVM would take minutes for them."""
    functions = [torch.nn.GELU() for _ in range(6)]
    layers = torch.nn.Sequential(torch.nn.Linear(16, 16), *functions)
    assert len(buffers(layers, "matmul")) > 1


def test_an_unknown_processor_gets_tvms_loops(tmp_path: Path) -> None:
    """LLVM takes a name that it does not know for the oldest processor: no rule, and a warning."""
    made = captured(torch.nn.Conv2d(3, 5, 3))
    with pytest.warns(RuntimeWarning, match="no rule covers a processor without AVX2"):
        artifact = build(made, ToTvm(cpu="unheard-of"), tmp_path / "artifact")
    assert artifact.certificate.verdict.name == "PASSED"
    assert artifact.manifest.warnings


def test_what_the_rules_cover_is_silent(tmp_path: Path) -> None:
    """The control."""
    made = captured(torch.nn.Conv2d(3, 5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        artifact = build(made, "tvm", tmp_path / "artifact")
    assert artifact.manifest.facts["tvm-default-schedules"] == []
    assert artifact.manifest.warnings == []


def test_a_processor_without_a_rule_gets_tvms_loops(tmp_path: Path) -> None:
    """x86-64-v2 has no AVX2; its code runs here, and computes the same."""
    made = captured(torch.nn.Sequential(torch.nn.Conv2d(3, 20, 3), torch.nn.ReLU()))
    backend = ToTvm(cpu="x86-64-v2")
    with pytest.warns(RuntimeWarning, match="no rule covers a processor without AVX2"):
        artifact = build(made, backend, tmp_path / "artifact")
    assert "fused_conv2d_add_relu" in artifact.manifest.facts["tvm-default-schedules"]
    x = torch.randn(3, 3, 9, 8)
    (result,) = backend.load(tmp_path / "artifact", LoadOptions()).run([x.numpy()])
    with torch.no_grad():
        assert np.abs(result - made(x)[0].numpy()).max() < 2e-6


def test_a_processor_with_avx2_uses_the_rules(tmp_path: Path) -> None:
    made = captured(torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3), torch.nn.Conv2d(40, 7, 3)))
    backend = ToTvm(cpu="x86-64-v3")
    artifact = build(made, backend, tmp_path / "artifact")
    assert artifact.certificate.verdict.name == "PASSED"
    assert artifact.manifest.facts["tvm-default-schedules"] == []


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx2"}, True), ({"avx2", "avx512f"}, True), ({"avx", "sse4.2"}, False), ({"neon"}, False)],
)
def test_the_rules_are_for_avx2_and_avx512(features: set[str], expected: bool) -> None:
    assert covers(features.__contains__) is expected
