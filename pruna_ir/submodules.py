"""Submodules: capturing the parts of a model whose whole does not capture.

Detection models compute sizes from values (proposals, non-maximum suppression), which
``torch.export`` cannot follow; their backbone, neck and heads are plain. So the model runs once,
submodules see their real inputs, and capture is tried from the top down, the most parameters
first:

    waiting = {the model}
    take the largest of waiting: captured -> a part; else its children wait in its place

A part's inputs and outputs are inputs and outputs of its program, which pruning leaves as they
are: a pruned part fits where the original stood.

    parts = capture_submodules(model, args)
    programs = {path: pipeline.run(part.program).program for path, part in parts.captured.items()}
    smaller = with_programs(model, parts, programs).module

Limits: a part that shares parameters with the rest of the model is not taken whole; a model whose
``forward`` reads a submodule's parameters itself is found out only where shapes then disagree.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pruna_ir.capture import capture
from pruna_ir.errors import PassError, PrunaError, UsageError, VerificationError
from pruna_ir.program import Program
from pruna_ir.write_back import write_back

WHOLE = ""
"""The path of the model itself."""


@dataclass(frozen=True)
class Call:
    """How a submodule is called, and what it returns.

    Attributes:
        signature: of its ``forward``.
        inputs: the leaves of (args, kwargs) in the example run, tensors as copies.
        structure: of (args, kwargs), with every argument that can be positional.
        results: the leaves of what it returned; None in place of tensors.
        returned: the structure of what it returned.
        times: how often it was called.
    """

    signature: inspect.Signature
    inputs: tuple[Any, ...]
    structure: pytree.TreeSpec
    results: tuple[Any, ...]
    returned: pytree.TreeSpec
    times: int

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The args and kwargs that hold these tensors, and the example's other values."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, torch.Tensor) else x for x in self.inputs]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in order.

        Raises:
            UsageError: the call has another structure than the example's, or another value that
                is no tensor.
        """
        leaves, structure = pytree.tree_flatten(_canonical(self.signature, args, kwargs))
        alike = structure == self.structure and all(
            isinstance(a, torch.Tensor) if isinstance(b, torch.Tensor) else a == b
            for a, b in zip(leaves, self.inputs, strict=True)
        )
        if not alike:
            raise UsageError(
                f"a captured part was called with {structure}, but it was captured with "
                f"{self.structure} and fixed values for all that is no tensor"
            )
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def result(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the submodule returns, with these tensors in place of its own."""
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf for leaf in self.results]
        return pytree.tree_unflatten(leaves, self.returned)


@dataclass(frozen=True)
class Part:
    """A submodule that was captured."""

    path: str
    program: Program
    call: Call


@dataclass(frozen=True)
class Parts:
    """What of a model was captured.

    Attributes:
        captured: by path, the largest first; none lies inside another.
        refused: by path, why a submodule was not captured.
        args: the example inputs of the whole.
        kwargs: its keyword inputs.
    """

    captured: Mapping[str, Part]
    refused: Mapping[str, str]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def programs(self) -> dict[str, Program]:
        """The programs by path."""
        return {path: part.program for path, part in self.captured.items()}


def capture_submodules(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    attempts: int = 64,
    seconds: float = 300.0,
) -> Parts:
    """Capture a model, or its largest submodules that can be captured.

    Args:
        module: the model; it runs in eval mode and is left as it was.
        args: example inputs, as for `pruna_ir.capture`.
        kwargs: example keyword inputs.
        attempts: how many captures are tried at most.
        seconds: no capture is started after this time.

    Raises:
        UsageError: the model does not run on its example inputs' structure, or has no parameters.

    >>> class Detector(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
    ...     def forward(self, x):
    ...         scores = self.head(self.body(x))
    ...         return {"scores": scores} if bool(scores.sum() < 1e9) else {}
    >>> parts = capture_submodules(Detector(), (torch.ones(2, 3),))
    >>> list(parts.captured), list(parts.refused)
    (['body', 'head'], [''])
    """
    search = _Search(module, tuple(args), dict(kwargs or {}))
    start = time.perf_counter()
    while search.waiting:
        path = search.largest()
        if search.tried >= attempts:
            search.refused[path] = f"not tried: {attempts} captures were"
        elif time.perf_counter() - start > seconds:
            search.refused[path] = f"not tried: {seconds:g} seconds had passed"
        else:
            search.attempt(path)
    return Parts(search.captured, search.refused, search.args, search.kwargs)


class _Search:
    """The state of one search from the top down."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        if not any(True for _ in module.parameters()):
            raise UsageError(f"{type(module).__name__} has no parameters; there is nothing to do")
        self.waiting: dict[str, int] = {WHOLE: _elements(module)}
        self.captured: dict[str, Part] = {}
        self.refused: dict[str, str] = {}
        self.tried = 0
        self._calls: dict[str, Call | None] = {}

    def largest(self) -> str:
        """The waiting submodule with the most parameters, which no longer waits."""
        path = max(self.waiting, key=self.waiting.__getitem__)
        del self.waiting[path]
        return path

    def attempt(self, path: str) -> None:
        """Capture a submodule, or let its children wait."""
        found = self._part(path)
        if isinstance(found, Part):
            self.captured[path] = found
            return
        self.refused[path] = found
        for name, child in self.module.get_submodule(path).named_children():
            if size := _elements(child):
                self.waiting[f"{path}.{name}" if path else name] = size

    def _part(self, path: str) -> Part | str:
        module = self.module.get_submodule(path)
        if shared := _shared(self.module, path):
            return f"shares {shared} with other parts of the model"
        call = self._call(path)
        if call is None:
            return "is not called as a module in the example run"
        args, kwargs = call.arguments([_filled(x) for x in call.inputs if _is_tensor(x)])
        self.tried += 1
        try:
            return Part(path, capture(module, args, kwargs), call)
        except PrunaError as error:
            return str(error)

    def _call(self, path: str) -> Call | None:
        if path not in self._calls:
            # One run for all that wait: their inputs are kept, not those of every submodule.
            self._calls |= _record(self.module, self.args, self.kwargs, [path, *self.waiting])
        return self._calls.pop(path)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shared(module: nn.Module, path: str) -> str:
    """A parameter of a submodule that is also one of something outside of it; empty for none."""
    inside = f"{path}." if path else ""
    names: dict[int, str] = {}
    outside: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name.startswith(inside):
            names.setdefault(id(parameter), name)
        else:
            outside.add(id(parameter))
    return next((name for number, name in names.items() if number in outside), "")


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; normal values in place of one without elements, such as no detections."""
    if tensor.numel():
        return tensor
    sizes = [size or 2 for size in tensor.shape]
    if not tensor.is_floating_point():
        return tensor.new_zeros(sizes)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sizes, generator=generator).to(tensor)


# -- the example run ---------------------------------------------------------------------------


def _record(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], paths: Sequence[str]
) -> dict[str, Call | None]:
    """The first call of each of these submodules in one run; None for those never called."""
    found: dict[str, _Recorder] = {}
    with ExitStack() as stack:
        stack.enter_context(_evaluating(module))
        for path in paths:
            child = module.get_submodule(path)
            recorder = found[path] = _Recorder(inspect.signature(child.forward))
            for handle in (
                child.register_forward_pre_hook(recorder.before, with_kwargs=True),
                child.register_forward_hook(recorder.after, with_kwargs=True),
            ):
                stack.callback(handle.remove)
        module(*_copied(args), **_copied(kwargs))
    return {path: recorder.call() for path, recorder in found.items()}


class _Recorder:
    """Hooks that keep the first call of a module."""

    def __init__(self, signature: inspect.Signature) -> None:
        self._signature = signature
        self._inputs: tuple[list[Any], pytree.TreeSpec] | None = None
        self._returned: tuple[list[Any], pytree.TreeSpec] | None = None
        self._times = 0

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep copies of the inputs: what runs later may write into them."""
        if self._inputs is None:
            leaves, spec = pytree.tree_flatten(_canonical(self._signature, args, kwargs))
            self._inputs = [_copied(leaf) for leaf in leaves], spec

    def after(
        self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], result: Any
    ) -> None:
        """Keep the structure of the result."""
        self._times += 1
        if self._returned is None:
            leaves, spec = pytree.tree_flatten(result)
            self._returned = [None if _is_tensor(leaf) else leaf for leaf in leaves], spec

    def call(self) -> Call | None:
        """What was kept; None where the module was never called."""
        if self._inputs is None or self._returned is None:
            return None
        (inputs, structure), (results, returned) = self._inputs, self._returned
        return Call(
            self._signature, tuple(inputs), structure, tuple(results), returned, self._times
        )


def _canonical(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, every one that can be positional in its place."""
    bound = signature.bind(*args, **kwargs)
    return bound.args, bound.kwargs


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach().clone() if _is_tensor(x) else x, value)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode without gradients; every submodule's own flag restored after."""
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, flag in flags:
            child.training = flag


# -- putting programs back ---------------------------------------------------------------------


class ProgramModule(nn.Module):
    """A program in the place of the submodule that it was captured from.

    It takes the same arguments and returns the same lists, tuples and dicts. Its parameters are
    the program's, under their names after ``program.``.

    Raises:
        UsageError: on a call with shapes that the program does not take, or of another structure.
    """

    def __init__(self, program: Program, call: Call) -> None:
        super().__init__()
        # A fork's module shares the tensors; moving or training this module is then of no
        # consequence to the program.
        self.program = copy.deepcopy(program.module)
        self._program, self._call = program, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on the arguments that the submodule takes."""
        inputs = self._program.bind(self._call.flat(args, kwargs), {})
        return self._call.result(self.program(*inputs))


@dataclass(frozen=True)
class Replaced:
    """A model with programs in the place of its parts.

    Attributes:
        module: a copy of the model, changed; it runs, and returns what the model returns.
        kept: paths whose own class now holds the program's tensors.
        wrapped: paths where a `ProgramModule` stands instead, and why.
    """

    module: nn.Module
    kept: tuple[str, ...]
    wrapped: Mapping[str, str]


def with_programs(module: nn.Module, parts: Parts, programs: Mapping[str, Program]) -> Replaced:
    """A copy of a model in which parts compute what these programs compute.

    A part keeps its class where the class can express the program (`pruna_ir.write_back`, which
    compares both in float64); elsewhere a `ProgramModule` takes its place, which accepts the
    shapes that were captured alone.

    Args:
        module: the model that ``parts`` were captured from.
        parts: what was captured.
        programs: new programs by path of a part; other parts stay.

    Raises:
        UsageError: a path names no part.
        VerificationError: the changed model does not run on the example inputs, or returns
            another structure than the model.
    """
    if unknown := sorted(set(programs) - set(parts.captured)):
        raise UsageError(f"no part was captured at {unknown[0]!r}; parts: {list(parts.captured)}")
    changed = copy.deepcopy(module)
    kept: list[str] = []
    wrapped: dict[str, str] = {}
    for path, program in programs.items():
        call = parts.captured[path].call
        try:
            write_back(program, changed.get_submodule(path), call=_calling(call))
            kept.append(path)
        except (PassError, VerificationError) as error:
            wrapped[path] = str(error)
            changed = _placed(changed, path, ProgramModule(program, call).eval())
    _check(module, changed, parts)
    return Replaced(changed, tuple(kept), wrapped)


def _calling(call: Call) -> Any:
    """How `write_back` calls the module with a program's inputs."""

    def run(module: nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
        args, kwargs = call.arguments(inputs)
        return module(*args, **kwargs)

    return run


def _placed(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    if path == WHOLE:
        return new
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
    return module


def _check(module: nn.Module, changed: nn.Module, parts: Parts) -> None:
    with _evaluating(module), _evaluating(changed):
        expected = module(*_copied(parts.args), **_copied(parts.kwargs))
        try:
            actual = changed(*_copied(parts.args), **_copied(parts.kwargs))
        except Exception as error:
            raise VerificationError(
                f"with the programs in place, {type(module).__name__} does not run on its example "
                f"inputs ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); "
                "something outside of the parts reads their parameters or sizes"
            ) from error
    old, new = pytree.tree_structure(expected), pytree.tree_structure(actual)
    if old != new:
        raise VerificationError(
            f"with the programs in place, {type(module).__name__} returns {new} in place of {old}"
        )
