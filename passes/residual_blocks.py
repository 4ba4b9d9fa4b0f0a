"""Residual blocks of a program: sums y = x + f(x) whose branch f can go without a trace.

    y = add(x, b)      b computed from x (and from parameters, constants and values that do not
                       depend on x: masks, rotary tables, an encoder's output)

is a residual block where x, b and y have one shape and dtype, and the branch reads a stored tensor
(``x + c * pow(x, 3)`` inside of a spelt-out activation does not). Parallel branches on one stream
count each: in ``add(add(x, attention(x)), ffn(x))`` the outer sum has the inner one as its x.
Pre- and post-norm transformers, ResNets, ConvNeXt and mixers look the same at this level: what
follows the sum (a relu, a norm) stays when the branch goes.

A block cannot go where a node inside of its branch is read outside of it, where it holds other
residual blocks (a skip over a whole stage: those blocks can go instead), or where the program
would return its input. A sum of two branches (a ResNet block with a projection shortcut) has no x.

A *layer* is the run of consecutive blocks that make one: those of one numbered module
(``layers.3``), attention first. Limits: sums are found as `canonicalize` spells them; a sum that
was fused into an operator is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.kernels.attention import KERNEL as ATTENTION
from pruna_ir.kernels.attention_block import KERNEL as ATTENTION_BLOCK
from pruna_ir.program import Program, module_path, shape_of
from pruna_ir.propagate import same_value
from pruna_ir.transform import is_pure

aten = torch.ops.aten

_ATTENTION = frozenset(
    {
        aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default,
        aten._safe_softmax.default, ATTENTION.op, ATTENTION_BLOCK.op,
    }
)  # fmt: skip
_RESHAPES = frozenset({aten.reshape.default, aten.flatten.using_ints})
_NUMBERED = re.compile(r"\d+$")


@dataclass(frozen=True)
class ResidualBlock:
    """One residual sum and the branch that it adds.

    Attributes:
        add: the sum y.
        stream: the operand x that stays.
        branch: the schema name of the operand that goes, ``self`` or ``other``.
        nodes: the branch's nodes that depend on x, in graph order.
        attention: whether the branch holds an attention.
        reason: why it cannot go; empty where it can.
    """

    add: fx.Node
    stream: fx.Node
    branch: str
    nodes: tuple[fx.Node, ...] = field(repr=False)
    attention: bool
    reason: str = ""

    @property
    def path(self) -> str:
        """The path of the module that adds, without the number of its call."""
        return module_path(self.add).split("@")[0]

    @property
    def name(self) -> str:
        """What remarks call it."""
        return self.path or self.add.name


@dataclass(frozen=True)
class NearMiss:
    """A sum of two branches, neither of which is computed from the other."""

    add: fx.Node
    reason: str


class Residuals:
    """The residual blocks of one program, in graph order.

    Attributes:
        blocks: those found, whether they can go or not.
        near_misses: sums that look like residual ones and are not.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._flow = _Flow(program)
        self._streams: dict[fx.Node, fx.Node] = {}
        self.near_misses: list[NearMiss] = []
        found = [
            block for add in program.calls(aten.add.Tensor) if (block := self._block(add))
        ]
        self.blocks = list(self._without_holders(found))
        inside = {node for block in self.blocks for node in block.nodes}
        self.near_misses = [miss for miss in self.near_misses if miss.add not in inside]

    def _block(self, add: fx.Node) -> ResidualBlock | None:
        bound = bind_arguments(add)
        ends = bound["self"], bound["other"]
        if not all(isinstance(n, fx.Node) and _alike(n, add) for n in ends) or ends[0] is ends[1]:
            return None
        choices = [(ends[0], ends[1], "other")]
        if bound["alpha"] == 1:
            choices.append((ends[1], ends[0], "self"))
        for stream, branch, argument in choices:
            root = self._root(stream, branch)
            if root is not None:
                return self._made(add, stream, branch, root, argument)
        if self._flow.both_compute(*ends):
            text = f"{ends[0].name} and {ends[1].name} are both computed: no operand is the input"
            self.near_misses.append(NearMiss(add, text))
        return None

    def _root(self, stream: fx.Node, branch: fx.Node) -> fx.Node | None:
        """The value of the stream that the branch starts from."""
        root: fx.Node | None = stream
        while root is not None:
            if self._flow.depends(branch, root):
                return root
            root = self._streams.get(root)
        return None

    def _made(
        self, add: fx.Node, stream: fx.Node, branch: fx.Node, root: fx.Node, argument: str
    ) -> ResidualBlock | None:
        nodes = self._flow.between(root, branch, stream)
        if not self._flow.reads_stored(nodes):
            return None
        self._streams[add] = stream
        attention = any(node.target in _ATTENTION for node in nodes)
        return ResidualBlock(
            add, stream, argument, nodes, attention, self._reason(add, stream, nodes)
        )

    def _reason(self, add: fx.Node, stream: fx.Node, nodes: Sequence[fx.Node]) -> str:
        inside = {*nodes, add}
        for node in nodes:
            outside = sorted(user.name for user in node.users if user not in inside)
            if outside:
                return f"{node.name}, inside of its branch, is also read by {', '.join(outside)}"
            if not is_pure(node):
                return f"{node.name}, inside of its branch, has an effect of its own"
        if stream.op == "placeholder" and add in self._program.results():
            return "without it, the program would return its input"
        return ""

    def _without_holders(self, found: Sequence[ResidualBlock]) -> Iterator[ResidualBlock]:
        """The blocks, with the reason why those that hold others stay."""
        by_add = {block.add: block for block in found}
        for block in found:
            held = [by_add[node].name for node in block.nodes if node in by_add]
            if held and not block.reason:
                more = f" and {len(held) - 2} more" if len(held) > 2 else ""
                reason = f"it holds the residual blocks {', '.join(held[:2])}{more}"
                yield ResidualBlock(
                    block.add, block.stream, block.branch, block.nodes, block.attention, reason
                )
            else:
                yield block

    def layers(self) -> list[tuple[ResidualBlock, ...]]:
        """The blocks in runs that make a layer each; holders of other blocks stay alone."""
        runs: list[list[ResidualBlock]] = []
        for block in self.blocks:
            if runs and self._together(runs[-1][-1], block):
                runs[-1].append(block)
            else:
                runs.append([block])
        return [tuple(run) for run in runs]

    def _together(self, first: ResidualBlock, second: ResidualBlock) -> bool:
        shared = _shared_path(first.path, second.path)
        if not shared or not self._chained(first, second):
            return False
        same = first.path == second.path
        if first.attention:
            return same or any(map(_NUMBERED.search, shared))
        return same and not second.attention and any(map(_NUMBERED.search, shared))


    def _chained(self, first: ResidualBlock, second: ResidualBlock) -> bool:
        """Whether the second block's stream is the first one's, reshaped or normed at most."""
        node = second.stream
        while node.target in _RESHAPES:
            node = node.all_input_nodes[0]
        if node is first.add:
            return True
        return _alike(second.stream, first.add) and self._flow.depends(second.stream, first.add)


def _shared_path(first: str, second: str) -> list[str]:
    """The leading components that two module paths have in common."""
    shared = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b or not a:
            break
        shared.append(a)
    return shared


def _alike(node: fx.Node, add: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and same_value(value, add.meta["val"])


class _Flow:
    """Which node depends on which: for each node, the set of its ancestors as bits."""

    def __init__(self, program: Program) -> None:
        self._nodes = list(program.graph.nodes)
        self._bit = {node: 1 << i for i, node in enumerate(self._nodes)}
        self._above: dict[fx.Node, int] = {}
        self._stored = self._given = self._calls = 0
        for node in self._nodes:
            above = 0
            for operand in node.all_input_nodes:
                above |= self._above[operand] | self._bit[operand]
            self._above[node] = above
            if node.op == "get_attr" and _is_weight(program.tensor(str(node.target))):
                self._stored |= self._bit[node]
            elif node.op == "placeholder":
                self._given |= self._bit[node]
            elif node.op == "call_function":
                self._calls |= self._bit[node]

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Whether a node is computed from another."""
        return bool(self._above[node] & self._bit[on])

    def between(self, root: fx.Node, end: fx.Node, stream: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes from ``root`` (left out) to ``end`` that ``stream`` does not need."""
        outside = self._above[stream] | self._bit[stream]
        found = {end}
        todo = [end]
        while todo:
            for operand in todo.pop().all_input_nodes:
                new = operand not in found and not self._bit[operand] & outside
                if new and self.depends(operand, root):
                    found.add(operand)
                    todo.append(operand)
        return tuple(sorted(found))

    def reads_stored(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether a node reads a stored tensor, or what is computed from stored ones alone."""
        inside = set(nodes)
        for node in nodes:
            for operand in node.all_input_nodes:
                whole = self._above[operand] | self._bit[operand]
                if operand not in inside and whole & self._stored and not whole & self._given:
                    return True
        return False

    def both_compute(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether two nodes share a computed origin and each reads stored tensors of its own."""
        a, b = (self._above[n] | self._bit[n] for n in (first, second))
        shared = a & b & self._calls
        return bool(shared and a & ~b & self._stored and b & ~a & self._stored)


def _is_weight(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 1


# -- positions and features -----------------------------------------------------------------------

_LAST = frozenset(
    {
        aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default,
        aten.layer_norm.default, aten.rms_norm.default,
    }
)  # fmt: skip
_SECOND = frozenset({aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default})
_CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1, aten.conv1d.padding: 1, aten.conv2d.default: 2,
    aten.conv2d.padding: 2, aten.conv3d.default: 3, aten.conv3d.padding: 3,
}  # fmt: skip


def feature_dim(block: ResidualBlock) -> int:
    """The dimension of the stream that holds the features of a position (a token, a pixel).

    The first layer or norm of the branch tells; where none does, it is dimension 1 of
    four-dimensional and larger streams, and the last one of others.
    """
    rank = len(shape_of(block.stream) or ())
    for node in block.nodes:
        if node.target in _LAST:
            return rank - 1
        if node.target in _SECOND:
            return 1
        if node.target in _CONVOLUTIONS:
            return rank - 1 - _CONVOLUTIONS[node.target]
        if node.target is aten.mean.dim:
            dims = bind_arguments(node)["dim"]
            if dims and len(dims) == 1:
                return int(dims[0]) % rank
        if node.target in (aten.permute.default, aten.transpose.int, aten.reshape.default):
            break
    return 1 if rank >= 4 else rank - 1
