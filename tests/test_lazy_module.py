"""A lazily compiled graph module serves whoever expects a `torch.fx.GraphModule`."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import fx, nn
from torch.func import functional_call

from pruna_ir import apply, capture
from pruna_ir.lazy_module import LazyGraphModule, sharing
from pruna_ir.passes.canonicalize import Canonicalize
from tests.networks import seeded

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.fixture
def module():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    return apply(Canonicalize(), capture(net, (X,))).program.module


def compiled(module):
    return "_code" in vars(module)


USERS = {
    "call": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "symbolic trace": fx.symbolic_trace,
    "export": lambda module: torch.export.export(module, (X,)).module(),
    "strict export": lambda module: torch.export.export(module, (X,), strict=True).module(),
    "dynamo": lambda module: torch.compile(module, backend="eager"),
    "functional": lambda module: (
        lambda x: functional_call(module, dict(module.named_parameters()), (x,))
    ),
}


@pytest.mark.parametrize("use", USERS.values(), ids=USERS)
def test_it_is_compiled_for_whoever_uses_it_first(module, use):
    assert isinstance(module, LazyGraphModule)
    assert not compiled(module)
    (actual,) = use(module)(X)
    reference = fx.GraphModule(module, copy.deepcopy(module.graph))
    assert torch.equal(actual, reference(X)[0])


def test_code_and_signature_are_there_before_the_first_call(module):
    assert "conv2d" in module.code
    assert list(inspect.signature(copy.deepcopy(module).forward).parameters) == ["input"]


def test_a_copy_is_not_compiled(module):
    module(X)
    assert not compiled(copy.deepcopy(module))


def test_another_graph_discards_the_code(module):
    before = module(X)[0]
    graph = copy.deepcopy(module.graph)
    (relu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.neg.default
    module.graph = graph
    assert not compiled(module)
    assert not torch.equal(module(X)[0], before)


def test_it_can_be_trained(module):
    module(X)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_module_that_shares_tensors_has_tables_of_its_own(module):
    shared = sharing(module, copy.deepcopy(module.graph))
    assert {n: id(p) for n, p in shared.named_parameters()} == {
        n: id(p) for n, p in module.named_parameters()
    }
    name, weight = next(iter(shared.named_parameters()))
    owner = shared.get_submodule(name.rpartition(".")[0])
    owner.register_parameter(name.rpartition(".")[2], nn.Parameter(torch.zeros_like(weight)))
    assert dict(module.named_parameters())[name] is weight
    assert not torch.equal(shared(X)[0], module(X)[0])
