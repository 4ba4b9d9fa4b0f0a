"""view_layout: where the elements of a view lie, for every view there is."""

from __future__ import annotations

import operator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from pruna_ir.passes.view_layout import Layout, Piece, positions, through, viewed

aten = torch.ops.aten


class Chain:
    """A graph of views of a tensor that holds its own indices."""

    def __init__(self, *sizes: int) -> None:
        self.graph = fx.Graph()
        self.node = self.graph.placeholder("x")
        self.node.meta["val"] = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
        self.layout: Layout | None = Layout.of(self.node)

    @property
    def value(self) -> torch.Tensor:
        return self.node.meta["val"]

    def add(self, target, *args) -> None:
        """One more view; a split or unbind is followed by the part of the index given last."""
        source, several = self.node, target in (aten.split.Tensor, aten.chunk.default,
                                                aten.unbind.int)  # fmt: skip
        args, index = (args[:-1], args[-1]) if several else (args, None)
        node = self._call(target, source, *args)
        self.node = node if index is None else self._call(operator.getitem, node, index)
        assert viewed(self.node) is source
        self.layout = None if self.layout is None else through(self.layout, self.node)

    def _call(self, target, source, *args) -> fx.Node:
        node = self.graph.call_function(target, (source, *args))
        node.meta["val"] = target(source.meta["val"], *args)
        return node


def indices(layout: Layout, strides: tuple[int, ...]) -> torch.Tensor:
    """The element of the flat tensor that each element of the view is, as the layout says."""
    found = torch.tensor(sum(map(operator.mul, layout.starts, strides)))
    for dim in layout.dims:
        here = torch.zeros(1, dtype=torch.int64)
        for piece in dim:
            steps = torch.arange(piece.size) * piece.stride * strides[piece.axis]
            here = (here[:, None] + steps).flatten()
        found = found.unsqueeze(-1) + here
    return found


def _reshaped(data, shape: list[int]) -> list[int]:
    """Another shape of as many elements: dimensions joined, cut, or of size one put in."""
    new = list(shape)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["join", "cut", "one"]))
        at = data.draw(st.integers(0, len(new) - 1))
        if kind == "join" and at + 1 < len(new):
            new[at : at + 2] = [new[at] * new[at + 1]]
        elif kind == "cut":
            divisors = [d for d in range(1, new[at] + 1) if new[at] % d == 0]
            inner = data.draw(st.sampled_from(divisors))
            new[at : at + 1] = [new[at] // inner, inner]
        elif kind == "one" and len(new) < 6:
            new.insert(at, 1)
    return new


def _step(data, chain: Chain) -> None:
    shape, rank = list(chain.value.shape), chain.value.dim()
    dim = data.draw(st.integers(-rank, rank - 1))
    size = shape[dim]
    kind = data.draw(
        st.sampled_from(["reshape", "permute", "transpose", "slice", "select", "split", "unbind",
                         "flatten", "contiguous"])
    )  # fmt: skip
    if kind == "reshape":
        chain.add(aten.reshape.default, _reshaped(data, shape))
    elif kind == "permute":
        chain.add(aten.permute.default, data.draw(st.permutations(range(rank))))
    elif kind == "transpose":
        chain.add(aten.transpose.int, dim, data.draw(st.integers(0, rank - 1)))
    elif kind == "slice":
        start = data.draw(st.integers(0, size - 1))
        chain.add(aten.slice.Tensor, dim, start, data.draw(st.integers(start + 1, size + 2)))
    elif kind == "split":
        width = data.draw(st.integers(1, size))
        chain.add(aten.split.Tensor, width, dim, data.draw(st.integers(0, (size - 1) // width)))
    elif rank > 1 and kind in ("select", "unbind"):
        index = data.draw(st.integers(0, size - 1))
        both = {"select": (aten.select.int, dim, index), "unbind": (aten.unbind.int, dim, index)}
        chain.add(*both[kind])
    elif kind == "flatten":
        chain.add(aten.flatten.using_ints, min(dim % rank, rank - 1), -1)
    else:
        chain.add(aten.contiguous.default)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_chain_of_views_is_followed(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    sizes.append(data.draw(st.sampled_from([1, 4, 12])))
    chain = Chain(*sizes)
    strides = chain.value.stride()
    for _ in range(data.draw(st.integers(1, 6))):
        _step(data, chain)
        if chain.layout is None:  # a slice of joined dimensions, or a cut across one
            return
        assert torch.equal(indices(chain.layout, strides), chain.value)


def test_heads_of_a_packed_projection():
    chain = Chain(5, 7, 24)  # three times two heads of four
    for view in (
        (aten.reshape.default, [5, 7, 3, 2, 4]), (aten.permute.default, [2, 0, 3, 1, 4]),
        (aten.unbind.int, 0, 1),
    ):  # fmt: skip
        chain.add(*view)
    layout = chain.layout
    assert layout is not None
    assert layout.dims == ((Piece(0, 5),), (Piece(2, 2, 4),), (Piece(1, 7),), (Piece(2, 4),))
    assert layout.starts == (0, 0, 8)
    found = positions(layout, [1, 3], 2)
    assert found is not None
    assert found.tolist() == list(range(8, 16))
    assert positions(layout, [0, 1], 2) is None


def test_joined_dimensions_come_apart_again():
    chain = Chain(6, 10)
    chain.add(aten.reshape.default, [2, 3, 10])
    assert chain.layout.dims == ((Piece(0, 2, 3),), (Piece(0, 3),), (Piece(1, 10),))
    chain.add(aten.reshape.default, [6, 10])
    assert chain.layout == Layout.of(chain.graph.find_nodes(op="placeholder")[0])


def test_what_is_no_view_has_no_layout():
    chain = Chain(4, 6)
    chain.add(aten.reshape.default, [24])
    chain.add(aten.slice.Tensor, 0, 1, 7)  # across rows
    assert chain.layout is None
    assert viewed(chain._call(aten.relu.default, chain.node)) is None
