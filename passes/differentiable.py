"""Differentiable: a program's graph on tensors that share its storage, open to autograd.

Gradients of weights need leaves that require grad, gradients of activations need taps. Both are
made on a copy of the graph whose tensors are views of the program's: nothing is copied and nothing
is written to. Normalisation and dropout are in evaluation mode, so that samples do not mix and
statistics stay.

Gradients are computed in the program's own dtype; half-precision programs give half-precision
gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from pruna_ir.program import Program
from pruna_ir.training import switched


def differentiable(
    program: Program, weights: Iterable[str] = (), taps: Sequence[tuple[fx.Node, fx.Node]] = ()
) -> fx.GraphModule:
    """A module that returns the program's first output and, after it, every tap.

    Args:
        program: the program; its tensors are shared, never written to.
        weights: names of the tensors that require grad.
        taps: (source, reader) pairs: the readers of a source that occur here read one tap, whose
            gradient is that through these readers alone.

    Returns:
        A module of the positional inputs; tied tensors are one leaf. There is one tap a source,
        in the order of their first pair.
    """
    own: dict[str, torch.Tensor] = {}
    shared: dict[object, torch.Tensor] = {}
    wanted = set(weights)
    tensors = program.tensors()
    leaves = {_identity(tensors[name]) for name in wanted}
    for name, tensor in tensors.items():
        key = _identity(tensor)
        if key not in shared:
            view = tensor.detach()
            shared[key] = torch.nn.Parameter(view) if key in leaves else view
        own[name] = shared[key]
    graph = copy.deepcopy(switched(program, train=False).graph)
    _tap(graph, taps)
    return fx.GraphModule(own, graph, class_name="Differentiable")


def _identity(tensor: torch.Tensor) -> object:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def tapped(x: torch.Tensor) -> torch.Tensor:
    """The same values, whose gradient may be asked for: a leaf where nothing before needs one."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _tap(graph: fx.Graph, taps: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    by_name = {node.name: node for node in graph.nodes}
    made: dict[fx.Node, fx.Node] = {}
    for source, reader in taps:
        origin = by_name[source.name]
        if origin not in made:
            with graph.inserting_after(origin):
                made[origin] = graph.call_function(tapped, (origin,))
        by_name[reader.name].replace_input_with(origin, made[origin])
    output = graph.output_node()
    (returned,) = output.args
    assert isinstance(returned, (tuple, list))
    output.args = ((returned[0], *made.values()),)
    graph.eliminate_dead_code()
