"""A graph module that generates its code when it is first called, not when it is made.

A program goes through many passes and is run after few of them; `torch.fx.GraphModule` generates
and compiles Python source every time that it gets a graph, which is most of the cost of a fork.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import fx


class LazyGraphModule(fx.GraphModule):
    """A `torch.fx.GraphModule` in all but the moment of compilation.

    >>> import torch
    >>> graph = fx.symbolic_trace(torch.nn.ReLU()).graph
    >>> module = LazyGraphModule(torch.nn.Module(), graph)
    >>> "_code" in vars(module)
    False
    >>> module(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    >>> "_code" in vars(module)
    True
    """

    # GraphModule makes a class for each instance, and compiling sets this class's `forward`.

    @property
    def graph(self) -> fx.Graph:
        """The graph; setting another one discards the code."""
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        graph.owning_module = self
        vars(self).pop("_code", None)
        type(self).forward = _OnDemand(self)  # type: ignore[assignment]

    @property
    def code(self) -> str:
        """The Python source of ``forward``."""
        if "_code" not in vars(self):
            self.recompile()
        return super().code

    def __reduce__(self) -> tuple[Any, ...]:
        self.recompile()  # What is pickled is the code.
        rebuild, (state, *rest) = super().__reduce__()
        # The code is traced again when it is read. torch.export's own tracer, which its graphs
        # name, cannot be made anew in torch 2.14; code of operators needs none but the plain one.
        state.pop("_tracer_cls", None)
        return rebuild, (state, *rest)


def sharing(module: LazyGraphModule, graph: fx.Graph) -> LazyGraphModule:
    """A module of another graph with the same tensors under the same names, in its own tables.

    The same as ``LazyGraphModule(module, graph)`` where every tensor is read; several times as
    fast, since no name is looked up.

    >>> import torch
    >>> graph = fx.symbolic_trace(torch.nn.Linear(2, 1)).graph
    >>> module = LazyGraphModule(torch.nn.Linear(2, 1), graph)
    >>> sharing(module, graph).weight is module.weight
    True
    """
    shared = LazyGraphModule(torch.nn.Module(), fx.Graph(), type(module).__name__)
    shared.training = module.training
    _share(module, shared)
    shared.graph = graph
    return shared


def _share(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give a module the tensors of another one, and modules of its own for those below."""
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    for name, child in source._modules.items():
        if child is not None:
            own = target._modules[name] = torch.nn.Module()
            _share(child, own)


class _OnDemand:
    """Stands for ``forward`` until it is asked of the module or its class, which compiles it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = weakref.ref(module)

    def __get__(self, instance: fx.GraphModule | None, owner: type) -> Any:
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this class is gone")
        module.recompile()
        return type(module).forward if instance is None else instance.forward
