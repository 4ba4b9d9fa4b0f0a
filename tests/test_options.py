"""Backends from text: options are the fields of their classes, as a pass's are."""

from __future__ import annotations

import pytest

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.errors import UsageError
from pruna_ir.options import make_backend
from pruna_ir.registry import BACKENDS, entries
from pruna_ir.spec import print_pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tvm", ToTvm()),
        ("tvm{cpu=x86-64-v3}", ToTvm(cpu="x86-64-v3")),
        ("tvm{device=cuda,arch=sm_89}", ToTvm(device="cuda", arch="sm_89")),
        ('tvm{tune=20,records="a b.json"}', ToTvm(tune=20.0, records="a b.json")),
    ],
)
def test_a_backend_with_options(text: str, expected: ToTvm) -> None:
    assert make_backend(text) == expected
    assert make_backend(print_pass(expected)) == expected


@pytest.mark.parametrize("name", [entry.name for entry in entries(BACKENDS)])
def test_every_backend_by_its_name_alone(name: str) -> None:
    assert make_backend(name).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tvn", "unknown backend 'tvn'; did you mean 'tvm'"),
        ("tvm{cpux=a}", "tvm: unknown option 'cpux'; did you mean 'cpu'"),
        ("tvm{tune=long}", "tvm: option tune must be float, not long"),
        ("tvm{device=tpu}", "tvm: option device must be"),
        ("tvm,onnx", "'tvm,onnx' is no backend; give one name"),
        ("fixpoint(tvm)", "is no backend"),
        ("", "'' is no backend"),
        ("tvm{cpu=", "expected a value"),
    ],
)
def test_what_is_no_backend(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(").replace(")", r"\)")):
        make_backend(text)
