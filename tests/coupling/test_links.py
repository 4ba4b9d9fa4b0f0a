"""Connected components: those of scipy, numbered by their first nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pruna_ir.coupling.links import components


def reference(count, left, right):
    graph = coo_array((np.ones(left.size), (left, right)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 30))
    ends = st.lists(st.integers(0, count - 1), min_size=0, max_size=40)
    left = np.array(draw(ends), np.int64)
    right = np.array(
        draw(st.lists(st.integers(0, count - 1), min_size=left.size, max_size=left.size)), np.int64
    )
    return count, left, right


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_components_are_those_of_scipy(graph):
    assert np.array_equal(components(*graph), reference(*graph))


@pytest.mark.parametrize("count", [1, 2, 1000])
@pytest.mark.parametrize("shape", ["chain", "star", "star from the last", "shuffled chain"])
def test_long_chains_and_stars(count, shape):
    order = np.arange(count)
    if shape == "shuffled chain":
        order = np.random.default_rng(0).permutation(count)
    left, right = order[:-1], order[1:]
    if shape.startswith("star"):
        centre = 0 if shape == "star" else count - 1
        left, right = np.full(count, centre), order
    assert not components(count, left, right).any()


def test_nothing_connected():
    assert components(0, np.zeros(0, np.int64), np.zeros(0, np.int64)).size == 0
    assert components(3, np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == [0, 1, 2]
