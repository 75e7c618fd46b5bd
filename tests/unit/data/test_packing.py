"""Packing keeps every piece once, within the capacity, and is a function of the lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.data.packing import best_fit, split_lengths


@given(lengths=st.lists(st.integers(1, 64), max_size=200))
def test_every_piece_stands_in_one_bin_that_holds_it(lengths: list[int]) -> None:
    bins = best_fit(lengths, 64)
    assert sorted(piece for pieces in bins for piece in pieces) == list(range(len(lengths)))
    assert all(sum(lengths[piece] for piece in pieces) <= 64 for pieces in bins)
    assert bins == best_fit(lengths, 64)


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_no_more_bins_than_the_bound(lengths: list[int]) -> None:
    assert len(best_fit(lengths, 64)) <= 11 / 9 * -(-sum(lengths) // 64) * 1.5 + 4
    halves = [sum(lengths[piece] for piece in pieces) for pieces in best_fit(lengths, 64)]
    assert sum(half <= 32 for half in halves) <= 1, "two bins that fit together"


def test_the_fullest_bin_with_room_is_taken() -> None:
    bins = best_fit([6, 5, 4, 3], 10)
    assert {frozenset(pieces) for pieces in bins} == {frozenset({0, 2}), frozenset({1, 3})}


def test_neighbours_of_equal_length_are_scattered() -> None:
    bins = best_fit([16] * 64, 64)
    assert sum(pieces == list(range(pieces[0], pieces[0] + 4)) for pieces in bins) == 0


@pytest.mark.parametrize("length", [0, 65])
def test_a_piece_that_cannot_fit_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 64"):
        best_fit([3, length], 64)


@pytest.mark.parametrize(("length", "pieces"), [(8, [8]), (17, [8, 8, 1]), (16, [8, 8]), (3, [3])])
def test_texts_are_cut_at_the_capacity(length: int, pieces: list[int]) -> None:
    assert split_lengths(length, 8) == pieces
