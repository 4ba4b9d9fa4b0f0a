"""Reshape and layout of ids agree with numpy, whatever the order of splits and merges."""

from __future__ import annotations

import math

import numpy as np
import sympy
from hypothesis import given
from hypothesis import strategies as st

from pruna_ir.coupling.algebra import Algebra
from pruna_ir.coupling.links import Links
from pruna_ir.coupling.rule import kept_counts, kept_indices
from pruna_ir.coupling.value import Block, Factor, Value, common_parts, quotient

shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def tracked(shape, links):
    """A value whose elements all have ids of their own."""
    dims = tuple(() if size == 1 else (Factor(size),) for size in shape)
    factors = tuple(f for dim in dims for f in dim)
    blocks = (Block(factors, links.fresh(*(f.size for f in factors))),) if factors else ()
    return Value(dims, blocks)


def dense(value):
    """The ids of every element, in the value's shape."""
    (block,) = value.blocks
    order = [block.factors.index(f) for f in value.factors()]
    return block.ids.transpose(order).reshape(value.sizes())


@given(shapes, st.randoms(use_true_random=False))
def test_regrouping_is_numpy_s_reshape(shape, rng):
    if math.prod(shape) == 1:
        return
    links = Links()
    value = tracked(shape, links)
    target = list(shape)
    rng.shuffle(target)
    grouped = Algebra(links, None).regroup(value, target)
    assert list(grouped.sizes()) == target
    assert np.array_equal(dense(grouped), dense(value).reshape(target))


def test_a_split_after_a_merge_is_exact_with_a_dynamic_batch():
    batch, links = sympy.Symbol("s0"), Links()
    channels = Factor(12)
    value = Value(((Factor(batch),), (channels,)), (Block((channels,), links.fresh(12)),))
    algebra = Algebra(links, None)
    heads = algebra.regroup(value, (batch * 3, 4))
    back = algebra.regroup(heads, (batch, 12))
    assert np.array_equal(dense(Value(back.dims[1:], back.blocks)), np.arange(12))
    assert len(heads.blocks[0].factors) == 2
    assert not links.solve().frozen.any()


def test_sizes_divide_where_they_do_for_every_batch():
    n = sympy.Symbol("n")
    assert quotient(12, 4) == 3
    assert quotient(12, 5) is None
    assert quotient(9 * n, n) == 9
    assert quotient(9 * n, 3) == 3 * n
    assert quotient(n, 2) is None
    assert quotient(4, n) is None


def test_factors_without_a_common_refinement():
    assert common_parts([Factor(2), Factor(3)], [Factor(3), Factor(2)]) is None
    parts = common_parts([Factor(6)], [Factor(2), Factor(3)])
    assert parts is not None
    assert [f.size for f in next(iter(parts[0].values()))] == [2, 3]


def test_survivors_of_a_dimension():
    rows, columns = Factor(2), Factor(3)
    value = Value(((rows, columns), (Factor(5),)), (Block((columns,), np.arange(3)),))
    alive = np.array([True, False, True])
    assert kept_indices(value, 0, alive).tolist() == [True, False, True] * 2
    assert kept_counts(value, 0, alive) == (6, 4)
    assert kept_counts(value, 1, alive) == (5, 5)


def solved(shape, *products):
    """The units of a joint block [2, 3] under products, as an array."""
    links = Links()
    ids = links.fresh(*shape)
    for product in products:
        product(links, ids)
    return links, ids


def test_an_open_product_takes_its_innermost_axis():
    links, ids = solved((2, 3), lambda links, ids: links.product(ids))
    units = links.solve().unit[ids]
    assert (units[0] == units[1]).all()
    assert len(set(units[0])) == 3


def test_rows_that_are_tied_decide_a_product_and_freeze_its_reader():
    def tie(links, ids):
        links.tie(ids, [1])
        links.product(ids, [((1,), links.fresh(3))], None)

    links, ids = solved((2, 3), tie)
    units = links.solve()
    assert len(set(units.unit[ids].ravel())) == 2
    assert units.frozen[units.unit[6:9]].all()
    assert not units.frozen[units.unit[ids]].any()


def test_two_products_over_one_block_do_not_fight():
    def both(links, ids):
        links.product(ids)
        links.product(ids.T)

    links, ids = solved((2, 3), both)
    assert len(set(links.solve().unit[ids].ravel())) == 3
