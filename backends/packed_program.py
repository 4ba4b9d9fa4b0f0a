"""A program on packed weights, compiled to one Python function: see `packed_steps` for its graph.

Which layout of a convolution's weight is fast depends on the input's size and the number of
threads, so the first run on inputs of new shapes packs for them (a plan). A result is a function
of the inputs, their shapes and the number of threads alone, never of what ran before: it is the
same to the last bit in every run and process.

Limits: a plan costs the memory of the convolutions' weights, and `PLANS` are kept; products are
packed once for all. The plain weights stay, for the next plan. Empty inputs, which oneDNN refuses,
run operator by operator.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from pruna_ir.backends.packed_steps import Packer, Steps
from pruna_ir.program import Program

PLANS = 4
"""How many input shapes are kept packed for, the latest ones."""


class PackedProgram:
    """A program that runs on packed weights.

    Attributes:
        rows: every operator that runs, packed or plain.

    >>> from pruna_ir import capture
    >>> program = capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))
    >>> packed = PackedProgram(program)
    >>> torch.allclose(packed(torch.ones(5, 3))[0], program(torch.ones(5, 3))[0])
    True
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        steps = Steps(program)
        self.rows = steps.rows
        self._names = steps.names
        self._convolutions = steps.convolutions
        self._tensors = steps.tensors
        nothing = dict.fromkeys(steps.tensors, torch.empty(0))
        self._module = fx.GraphModule(nothing, steps.graph)
        # The generated function takes the weights from whatever it is given as self.
        self._function: Any = type(self._module).forward
        self._plans: OrderedDict[Any, SimpleNamespace] = OrderedDict()
        self._planning = threading.Lock()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One tensor per output, laid out as in the program, for one tensor per input.

        Raises:
            UsageError: an input is missing, or of another dtype or shape.
        """
        values = self._program.bind(inputs, {})
        with torch.inference_mode():
            if not all(value.numel() for value in values):
                # oneDNN refuses what is empty.
                return self._program(*values)
            result: tuple[torch.Tensor, ...] = self._function(self._plan(values), *values)
            return result

    def step_times(self, inputs: Sequence[torch.Tensor]) -> dict[str, float]:
        """The milliseconds of each step of one run, by ``module path/node``."""
        values = self._program.bind(inputs, {})
        with torch.inference_mode():
            timed = _Timed(self._module, self._plan(values), self._names)
            timed.run(*values)
        return timed.taken

    def _plan(self, inputs: Sequence[torch.Tensor]) -> SimpleNamespace:
        """The weights, packed for these shapes."""
        key = (torch.get_num_threads(), *(tuple(value.shape) for value in inputs))
        with self._planning:
            plan = self._plans.get(key)
            if plan is None:
                plan = SimpleNamespace(**self._tensors)
                _Packing(self._module, plan, self._convolutions).run(*inputs)
                while len(self._plans) >= PLANS:
                    self._plans.popitem(last=False)
                self._plans[key] = plan
            self._plans.move_to_end(key)
            return plan


class _Planned(fx.Interpreter):
    """Runs the steps one by one on the weights of a plan."""

    def __init__(self, module: fx.GraphModule, plan: SimpleNamespace) -> None:
        super().__init__(module)
        self._plan = plan

    def fetch_attr(self, target: str) -> Any:
        """A weight."""
        return getattr(self._plan, target)


class _Packing(_Planned):
    """Packs the weight of each convolution when its input, and so its size, is there."""

    def __init__(
        self,
        module: fx.GraphModule,
        plan: SimpleNamespace,
        convolutions: Mapping[fx.Node, Packer],
    ) -> None:
        super().__init__(module, plan)
        self._convolutions = convolutions

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        packer = self._convolutions.get(n)
        if packer is not None:
            shape = list(self.env[packer.source].shape)
            packed = packer.pack(self.env[packer.weight], shape)
            self.env[packer.weight] = packed
            setattr(self._plan, str(packer.weight.target), packed)
        return super().run_node(n)


class _Timed(_Planned):
    """Notes how many milliseconds each step took, by its name."""

    def __init__(
        self, module: fx.GraphModule, plan: SimpleNamespace, names: Mapping[fx.Node, str]
    ) -> None:
        super().__init__(module, plan)
        self._names = names
        self.taken: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        start = time.perf_counter()
        result = super().run_node(n)
        name = self._names.get(n)
        if name is not None:
            spent = (time.perf_counter() - start) * 1e3
            self.taken[name] = self.taken.get(name, 0.0) + spent
        return result
