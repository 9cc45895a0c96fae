"""The algebra of axes: merging, splitting, and what does not fit."""

from __future__ import annotations

import pytest

from effllm.coupling.axes import UNIT, Atom, Prod, Sum, cut, factor, fresh, leaves, pieces, pin, reshape, resolve, unify


def sizes(e):
    e = resolve(e)
    return e.size if isinstance(e, Atom) else tuple(sizes(f) for f in (e.factors if isinstance(e, Prod) else e.parts))


def pinned(e):
    return [a.pins for a in leaves(e)]


def test_merged_axes_are_one():
    a, b, c = fresh(6), fresh(6), fresh(6)
    unify(a, b, "")
    unify(b, c, "")
    assert resolve(a) is resolve(b) is resolve(c)


def test_a_split_reaches_every_axis_merged_before_and_after():
    a, b, c = fresh(12), fresh(12), fresh(12)
    unify(a, b, "")
    outer, inner = factor(a, 3, "")
    unify(c, b, "")
    assert sizes(c) == (4, 3)
    assert list(leaves(c)) == [outer, inner]


def test_products_of_different_depth_refine_each_other():
    a, b = Prod((fresh(6), fresh(4))), Prod((fresh(2), fresh(3), fresh(4)))
    unify(a, b, "")
    assert sizes(a) == (2, 3, 4)
    c, d = Prod((fresh(6), fresh(2))), Prod((fresh(2), fresh(6)))
    unify(c, d, "")
    assert sizes(c) == sizes(d) == (2, 3, 2)
    assert list(leaves(c)) == list(leaves(d))


def test_products_that_do_not_fit_are_pinned():
    a, b = Prod((fresh(2), fresh(3))), Prod((fresh(3), fresh(2)))
    unify(a, b, "view (v)")
    assert all(pinned(a)) and all(pinned(b))
    assert "view (v)" in pinned(a)[0][0]


def test_sums_refine_by_offset():
    a, b = Sum((fresh(4), fresh(8))), Sum((fresh(7), fresh(5)))
    unify(a, b, "")
    assert sizes(a) == (4, 3, 5)
    assert list(leaves(a)) == list(leaves(b))


def test_two_halves_added_to_each_other_are_one():
    a = fresh(8)
    first, second = cut(a, 4, "")
    unify(first, second, "")
    atoms = list(leaves(a))
    assert len(atoms) == 2 and atoms[0] is atoms[1]


def test_a_sum_of_whole_blocks_is_a_product_of_a_sum():
    heads, d = fresh(3), fresh(4)
    fused = Sum((fresh(4), fresh(8)))
    unify(fused, Prod((heads, d)), "")
    assert sizes(fused) == (4, (2, 4))
    assert sizes(heads) == ((), 2)
    assert next(leaves(fused)) is resolve(d)


def test_a_sum_that_cuts_through_blocks_is_pinned():
    fused, product = Sum((fresh(5), fresh(7))), Prod((fresh(3), fresh(4)))
    unify(fused, product, "add (a)")
    assert all(pinned(fused)) and all(pinned(product))


def test_a_view_of_a_sum_repeats_the_block():
    fused = Sum((fresh(4), fresh(4), fresh(8)))
    outer, inner = factor(fused, 8, "")
    assert outer.size == 2 and sizes(inner) == (4, 4)
    assert sizes(fused) == (4, 4, 4, 4)
    atoms = list(leaves(fused))
    assert atoms[0] is atoms[2] and atoms[1] is atoms[3]


def test_cut_on_and_off_the_blocks_of_a_product():
    product = Prod((fresh(4), fresh(3)))
    a, b = cut(product, 6, "")
    assert (a.size, b.size) == (6, 6) and not any(pinned(product))
    c, d = cut(Prod((fresh(4), fresh(3))), 5, "slice (s)")
    assert (c.size, d.size) == (5, 7) and all(pinned(c)) and all(pinned(d))


def test_pieces_leave_out_nothing():
    a = fresh(10)
    parts = pieces(a, [3, 0, 1, 6], "")
    assert [p.size for p in parts] == [3, 0, 1, 6]
    assert sizes(a) == (3, (), 6)


def test_reshape_there_and_back():
    a, b = fresh(6), fresh(20)
    first = reshape([a, b], [6, 4, 5], "")
    again = reshape(first, [1, 6, 20, 1], "")
    assert [e.size for e in again] == [1, 6, 20, 1]
    assert list(leaves(again[2])) == list(leaves(b))
    assert resolve(again[1]) is a and not pinned(b)[0]


def test_reshape_across_axes_pins():
    a, b = fresh(4), fresh(3)
    out = reshape([a, b], [6, 2], "view (v)")
    assert [e.size for e in out] == [6, 2]
    assert all(pinned(e)[0] for e in (a, b, *out))


def test_pins_travel_through_merges_and_splits():
    a, b = fresh(6), fresh(6)
    pin(a, "first")
    unify(b, a, "")
    outer, inner = factor(b, 2, "")
    assert outer.pins == inner.pins == ["first"]
    for i in range(9):
        pin(a, f"reason {i}")
    assert len(outer.pins) == 4 and outer.pins[0] == "first"


def test_the_order_of_merging_does_not_matter():
    def one(reverse):
        q, k, heads, groups = fresh(12), fresh(6), fresh(4), fresh(2)
        d = fresh(3)
        steps = [(q, Prod((heads, d))), (k, Prod((groups, d))), (heads, Prod((groups, fresh(2))))]
        for a, b in steps[::-1] if reverse else steps:
            unify(a, b, "")
        return sizes(q), sizes(k), [len(list(leaves(e))) for e in (q, k, heads)]

    assert one(False) == one(True) == ((2, 2, 3), (2, 3), [3, 2, 2])


@pytest.mark.parametrize("e", [UNIT, fresh(1), Prod((UNIT, UNIT))])
def test_axes_of_size_one_are_nothing(e):
    assert e.size == 1 and list(leaves(e)) == []
