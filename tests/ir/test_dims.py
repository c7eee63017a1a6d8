from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irprune.ir.dims import Dims, Freeze, concat, index_maps, kept_size, mask_of, resolve, term_size, variables

WHY = Freeze("test", "a test says so")


def test_a_product_splits_a_variable_from_the_minor_end() -> None:
    dims = Dims()
    flat, heads, width = dims.fresh(64), dims.fresh(8), dims.fresh(8)
    assert dims.unify(flat, heads + width, WHY)
    assert resolve(flat) == heads + width


def test_concatenations_align_by_offset() -> None:
    dims = Dims()
    a, b, c, d = dims.fresh(4), dims.fresh(6), dims.fresh(6), dims.fresh(4)
    assert dims.unify(concat([a, b]), concat([c, d]), WHY)
    # 4|6 against 6|4: the middle two positions are b's first two and c's last two.
    left, right = resolve(concat([a, b])), resolve(concat([c, d]))
    assert left == right
    assert [term_size(block) for block in left[0].blocks] == [4, 2, 4]


def test_swapped_halves_become_one_variable() -> None:
    dims = Dims()
    first, second = dims.fresh(4), dims.fresh(4)
    assert dims.unify(concat([first, second]), concat([second, first]), WHY)
    assert resolve(first) == resolve(second)


def test_a_product_against_blocks_makes_the_blocks_equal() -> None:
    dims = Dims()
    pair, each, a, b = dims.fresh(2), dims.fresh(5), dims.fresh(5), dims.fresh(5)
    assert dims.unify(pair + each, concat([a, b]), WHY)
    assert resolve(a) == resolve(b) == resolve(each)


def test_what_does_not_line_up_is_frozen_on_both_sides() -> None:
    dims = Dims()
    a, b = dims.fresh(3) + dims.fresh(4), dims.fresh(6) + dims.fresh(2)
    assert dims.unify(a, b, WHY)
    three, two = dims.fresh(3) + dims.fresh(5), dims.fresh(5) + dims.fresh(3)
    assert not dims.unify(three, two, WHY)
    assert all(var.frozen == WHY for term in (three, two) for var in variables(resolve(term)))


def test_overlapping_factors_keep_what_their_ends_have_in_common() -> None:
    dims = Dims()
    left, right = dims.fresh(6) + dims.fresh(4), dims.fresh(4) + dims.fresh(6)
    assert dims.unify(left, right, WHY)
    first, last = resolve(left), resolve(right)
    assert [term_size((atom,)) for atom in first] == [2, 3, 2, 2]
    assert (first[0], first[-1]) == (last[0], last[-1])
    assert [var.frozen for var in variables(first)] == [None, WHY, WHY, None]


def test_freezing_reaches_what_a_variable_is_bound_to() -> None:
    dims = Dims()
    flat = dims.fresh(12)
    dims.freeze(flat, WHY)
    rows, columns = dims.fresh(3), dims.fresh(4)
    dims.unify(rows + columns, flat, WHY)
    assert all(var.frozen == WHY for var in variables(resolve(rows + columns)))


def test_a_cut_inside_the_minor_factor_keeps_the_major_one_whole() -> None:
    dims = Dims()
    rows, columns = dims.fresh(3), dims.fresh(4)
    pieces = dims.pieces(rows + columns, [6, 6], WHY)
    assert pieces is not None
    assert [term_size(piece) for piece in pieces] == [6, 6]
    assert all(var.frozen for var in variables(resolve(rows)))


def test_masks_of_products_and_blocks() -> None:
    dims = Dims()
    heads, width, tail = dims.fresh(2), dims.fresh(3), dims.fresh(2)
    keep = {heads[0]: np.array([True, False]), width[0]: np.array([True, False, True])}
    term = concat([heads + width, tail])
    assert mask_of(term, keep).tolist() == [True, False, True, False, False, False, True, True]
    assert kept_size(term, {heads[0]: 1, width[0]: 2}) == 4


def test_index_maps_say_where_a_variable_stands() -> None:
    dims = Dims()
    heads, width = dims.fresh(2), dims.fresh(3)
    assert [m.tolist() for m in index_maps(heads + width, width[0])] == [[0, 1, 2, 0, 1, 2]]
    assert [m.tolist() for m in index_maps(concat([width, heads, width]), width[0])] == [[0, 1, 2, -1, -1, 0, 1, 2]]


# -- single positions ------------------------------------------------------------------------------


def test_an_axis_added_to_its_reverse_is_pruned_by_pairs() -> None:
    dims = Dims()
    axis = dims.fresh(5)
    cells = dims.unroll(axis, WHY)
    assert cells is not None
    assert dims.unify(axis, concat(reversed(cells)), WHY)
    assert dims.join([axis], variables(resolve(axis)))
    (pairs, middle, again) = resolve(axis)[0].blocks
    assert repr(again[0]) == f"{pairs[0]}[1,0]"
    keep = {pairs[0]: np.array([False, True])}
    assert mask_of(axis, keep).tolist() == [False, True, True, True, False]
    assert kept_size(axis, {pairs[0]: 1}) == 3
    assert [m.tolist() for m in index_maps(axis, pairs[0])] == [[0, 1, -1, 1, 0]]
    assert term_size(middle) == 1


def test_what_is_seen_alone_stays_a_variable_of_its_own() -> None:
    dims = Dims()
    axis = dims.fresh(6)
    pieces = dims.pieces(axis, [1, 2, 3], WHY)
    assert pieces is not None
    assert dims.join([axis, pieces[2]], variables(resolve(axis)))
    assert resolve(pieces[0]) != resolve(pieces[2])
    assert repr(resolve(axis)) == f"(({resolve(axis)[0].blocks[0][0]}|{pieces[2][0]}),)"
    assert [term_size(block) for block in resolve(axis)[0].blocks] == [3, 3]


def test_factors_beside_a_block_keep_it_apart() -> None:
    dims = Dims()
    a, b, width = dims.fresh(2), dims.fresh(3), dims.fresh(4)
    assert not dims.join([concat([a + width, b])], [a[0], b[0]])
    assert dims.join([concat([a + width, b + width])], [a[0], b[0]])


@settings(max_examples=200, deadline=None)
@given(st.permutations(range(8)), st.permutations(range(8)), st.data())
def test_joined_orbits_are_what_permutations_leave(one: list[int], other: list[int], data: st.DataObject) -> None:
    """Against union-find: positions that two permutations of an axis tie lose or keep their index together."""
    dims = Dims()
    axis = dims.fresh(8)
    cells = dims.unroll(axis, WHY)
    assert cells is not None
    seen = [axis, concat(cells[i] for i in one)]
    dims.unify(axis, concat(cells[i] for i in other), WHY)
    dims.join(seen, variables(resolve(axis)))
    orbit = list(range(8))
    for _ in range(8):
        for i, j in enumerate(other):
            orbit[i] = orbit[j] = min(orbit[i], orbit[j])
    free = set(variables(resolve(axis)))
    keep = {var: np.array(data.draw(st.lists(st.booleans(), min_size=int(var.size), max_size=int(var.size)))) for var in free}
    mask = mask_of(axis, keep)
    assert all(mask[i] == mask[orbit[i]] for i in range(8))
    assert sum(int(var.size) for var in free) == len(set(orbit))
    assert mask_of(seen[1], keep).tolist() == mask[list(one)].tolist()
    for term in seen:
        assert kept_size(term, {var: int(mask.sum()) for var, mask in keep.items()}) == mask_of(term, keep).sum()


# -- the algebra, for random terms ----------------------------------------------------------------

sizes = st.lists(st.sampled_from([2, 2, 3, 4, 6]), min_size=1, max_size=3)


def _random_term(dims: Dims, data: st.DataObject, size: int, depth: int = 2) -> tuple:
    """A random term of a given size."""
    choice = data.draw(st.sampled_from(["var", "product", "concat"])) if depth and size > 1 else "var"
    if choice == "product":
        factors = [f for f in range(2, size) if size % f == 0]
        if factors:
            minor = data.draw(st.sampled_from(factors))
            return _random_term(dims, data, size // minor, depth - 1) + _random_term(dims, data, minor, depth - 1)
    if choice == "concat" and size > 2:
        cut = data.draw(st.integers(1, size - 1))
        return concat([_random_term(dims, data, cut, depth - 1), _random_term(dims, data, size - cut, depth - 1)])
    return dims.block(size)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([4, 6, 8, 12, 16, 24]))
def test_unified_terms_have_equal_masks(data: st.DataObject, size: int) -> None:
    """Whatever is pruned afterwards, both axes lose the same positions; or both are frozen whole."""
    dims = Dims()
    s, t = _random_term(dims, data, size), _random_term(dims, data, size)
    equal = dims.unify(s, t, WHY)
    free = {var for term in (s, t) for var in variables(resolve(term)) if var.frozen is None}
    keep = {var: np.array(data.draw(st.lists(st.booleans(), min_size=int(var.size), max_size=int(var.size)))) for var in free}
    a, b = mask_of(s, keep), mask_of(t, keep)
    assert len(a) == len(b) == size
    assert a.tolist() == b.tolist()
    assert equal or not free
    assert kept_size(s, {var: int(mask.sum()) for var, mask in keep.items()}) == a.sum()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([6, 8, 12, 16]))
def test_pieces_are_the_positions_they_stand_for(data: st.DataObject, size: int) -> None:
    dims = Dims()
    term = _random_term(dims, data, size)
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    pieces = dims.pieces(term, lengths, WHY)
    assert pieces is not None
    free = {var for var in variables(resolve(term)) if var.frozen is None}
    keep = {var: np.array(data.draw(st.lists(st.booleans(), min_size=int(var.size), max_size=int(var.size)))) for var in free}
    whole = mask_of(term, keep)
    assert np.concatenate([mask_of(piece, keep) for piece in pieces]).tolist() == whole.tolist()


@pytest.mark.parametrize("size", [2, 5])
def test_unrolled_positions_are_prunable_one_by_one(size: int) -> None:
    dims = Dims()
    term = dims.fresh(size)
    units = dims.unroll(term, WHY)
    assert units is not None
    keep = {units[1][0]: np.array([False])}
    assert mask_of(term, keep).tolist() == [i != 1 for i in range(size)]
