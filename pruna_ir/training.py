"""Training: a Program's graph with tensors of its own, and trained values back as a new Program.

    module = trainable(program)            # parameters that require grad, train-mode operators
    ... train module with any optimiser ...
    trained = with_state(program, module)  # the same graph with the trained tensors

The switch sets the ``training`` or ``train`` argument of normalisation and dropout operators; a
batch norm in training updates its running statistics in place, in the copies. Limits: a program
whose dropouts were canonicalised away trains without dropout, and a folded batch norm is gone.
Attention's dropout probability is baked in at capture: capture with ``train=True`` to keep it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from pruna_ir.call import bind_arguments, unbind_arguments
from pruna_ir.errors import UsageError
from pruna_ir.program import Program
from pruna_ir.verify import verify

aten = torch.ops.aten

# The argument by which each operator knows that it trains.
_SWITCHES: dict[torch._ops.OpOverload, str] = {
    aten.batch_norm.default: "training",
    aten.native_batch_norm.default: "training",
    aten._native_batch_norm_legit.default: "training",
    aten.cudnn_batch_norm.default: "training",
    aten.dropout.default: "train",
    aten.dropout_.default: "train",
    aten.native_dropout.default: "train",
    aten.feature_dropout.default: "train",
    aten.feature_dropout_.default: "train",
    aten.alpha_dropout.default: "train",
    aten.alpha_dropout_.default: "train",
    aten.feature_alpha_dropout.default: "train",
    aten.rrelu.default: "training",
    aten.rrelu_.default: "training",
}


def switched(program: Program, *, train: bool) -> Program:
    """The program with its normalisation and dropout operators in training or evaluation mode.

    A batch norm without running statistics uses its batch's in both modes and stays as it is.
    """
    fork = program.fork()
    _switch(fork.graph, train=train)
    return fork


def _switch(graph: fx.Graph, *, train: bool) -> None:
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _SWITCHES:
            continue
        bound = bind_arguments(node)
        if "running_mean" in bound and bound["running_mean"] is None:
            continue
        bound[_SWITCHES[node.target]] = train
        node.args, node.kwargs = unbind_arguments(node.target, bound)


def trainable(program: Program, *, train: bool = True) -> fx.GraphModule:
    """A module that computes what the program does and can be trained; the program stays as it is.

    Its tensors are copies under the program's names; floating-point parameters require grad, and
    tied parameters stay tied. It takes and returns tensors as the program does: positional inputs
    in order, a tuple of outputs.

    Args:
        program: the program to train.
        train: put dropout and normalisation in training mode; False trains with frozen statistics.

    >>> from pruna_ir import capture
    >>> program = capture(torch.nn.Linear(3, 1), (torch.ones(2, 3),))
    >>> module = trainable(program)
    >>> module(torch.ones(2, 3))[0].sum().backward()
    >>> module.weight.grad.tolist(), program.tensor("weight").grad
    ([[2.0, 2.0, 2.0]], None)
    """
    copies: dict[int, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    for name, tensor in program.tensors().items():
        if id(tensor) not in copies:
            copies[id(tensor)] = _own(tensor)
        own[name] = copies[id(tensor)]
    graph = copy.deepcopy(program.graph)
    _switch(graph, train=train)
    return fx.GraphModule(own, graph, class_name="Trainable")


def _own(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().clone()
    if not isinstance(tensor, torch.nn.Parameter):
        return copied
    return torch.nn.Parameter(copied, requires_grad=copied.is_floating_point())


def with_state(
    program: Program, source: torch.nn.Module | Mapping[str, torch.Tensor]
) -> Program:
    """The program with the values of a trained module or state dict; both stay as they are.

    The values are copied, so that training may go on. Names that the program does not read are
    passed over; the graph keeps its mode.

    Raises:
        UsageError: a tensor of the program is missing, or has another shape or dtype.
        InvalidIRError: a value is NaN.
    """
    state = _state(source)
    copies: dict[int, torch.Tensor] = {}
    new: dict[str, torch.Tensor] = {}
    for name, old in program.tensors().items():
        value = state.get(name)
        if value is None:
            raise UsageError(f"the state has no tensor named '{name}', which the program reads")
        if value.shape != old.shape or value.dtype != old.dtype:
            raise UsageError(
                f"{name} is {value.dtype}{list(value.shape)} in the state, but "
                f"{old.dtype}{list(old.shape)} in the program"
            )
        if id(value) not in copies:
            copied = value.detach().clone()
            keep = isinstance(old, torch.nn.Parameter)
            copies[id(value)] = (
                torch.nn.Parameter(copied, requires_grad=old.requires_grad) if keep else copied
            )
        new[name] = copies[id(value)]
    module = fx.GraphModule(new, copy.deepcopy(program.graph), class_name="Program")
    trained = replace(program, module=module)
    verify(trained)
    return trained


def _state(source: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(source, Mapping):
        return dict(source)
    # Unlike a state dict, these keep both names of tied tensors and non-persistent buffers.
    parameters = source.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(source.named_buffers(remove_duplicate=False))
