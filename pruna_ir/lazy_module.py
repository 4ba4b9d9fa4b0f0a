"""A graph module that generates its code when it is first called, not when it is made.

A program goes through many passes and is run after few of them; `torch.fx.GraphModule` generates
and compiles Python source every time that it gets a graph, which is most of the cost of a fork.
"""

from __future__ import annotations

import weakref
from typing import Any

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
        return super().__reduce__()


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
