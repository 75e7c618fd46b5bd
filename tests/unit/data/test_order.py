"""Order is a pure permutation per epoch."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.data import order
from trainers.data.order import deal_by_group, deal_by_length, drawn_rows, global_sample, sample_at


@given(size=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(sample_at("d", seed, epoch, position, size) for position in range(size)) == list(range(size))


def test_order_is_fixed_for_ever() -> None:
    assert [sample_at("digest", 7, 0, position, 10) for position in range(10)] == [9, 3, 0, 4, 2, 1, 8, 5, 7, 6]


def test_orders_of_epochs_seeds_and_digests_differ() -> None:
    def rows(digest: str, seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(sample_at(digest, seed, epoch, position, 50) for position in range(50))

    assert len({rows("a", 0, 0), rows("a", 0, 1), rows("a", 1, 0), rows("b", 0, 0), tuple(range(50))}) == 5


@pytest.mark.parametrize("size", [1, 2, 17, 300])
def test_an_epoch_at_once_has_the_order_of_one_position_at_a_time(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    at_once = [sample_at("digest", 5, 2, position, size) for position in range(size)]
    monkeypatch.setattr(order, "TABLE_ROWS", 0)
    assert [sample_at("digest", 5, 2, position, size) for position in range(size)] == at_once


def test_global_positions_run_through_epochs() -> None:
    ids = [global_sample("d", 3, position, 7) for position in range(21)]
    for epoch in range(3):
        assert ids[7 * epoch : 7 * epoch + 7] == [sample_at("d", 3, epoch, position, 7) for position in range(7)]


def test_a_far_position_needs_no_walk() -> None:
    assert 0 <= global_sample("d", 0, 10**15, 10**9) < 10**9


def test_first_positions_are_spread_evenly() -> None:
    """Over many seeds each row stands first about equally often (chi-squared, 9 degrees of freedom, p > 1e-4)."""
    counts = [0] * 10
    for seed in range(2000):
        counts[sample_at("d", seed, 0, 0, 10)] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 33.7


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_the_epoch_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        sample_at("d", 0, 0, position, 5)


def test_drawn_rows_are_distinct_and_at_most_all() -> None:
    assert len(set(drawn_rows("d", 1, 20, 100))) == 20
    assert sorted(drawn_rows("d", 1, 20, 5)) == [0, 1, 2, 3, 4]


@given(st.data())
def test_dealing_by_length_splits_the_rows_whatever_the_ranks(data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, 4))
    per_rank = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=workers * per_rank, max_size=workers * per_rank))
    micro = data.draw(st.integers(1, 4))
    rows = list(range(len(lengths)))
    shares = [deal_by_length(rows, lengths, rank, workers, micro) for rank in range(workers)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for batch in share for row in batch) == rows
    for share in shares:
        dealt = [lengths[row] for batch in share for row in batch]
        assert dealt == sorted(dealt, reverse=True)


@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    workers=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_dealing_by_group_gives_every_rank_equally_many_rows(
    groups: list[int], workers: int, micro: int, seed: int
) -> None:
    groups = groups * workers
    lengths = np.random.default_rng(seed).integers(1, 9, len(groups)).tolist()
    rows = np.random.default_rng(seed).permutation(len(groups)).tolist()
    shares = [deal_by_group(rows, lengths, groups, rank, workers, micro) for rank in range(workers)]
    assert sorted(row for own in shares for share in own for row in share) == list(range(len(groups)))
    assert len({tuple(map(len, own)) for own in shares}) == 1
    assert max(len(share) for own in shares for share in own) <= micro
    order = [groups[row] for together in zip(*shares, strict=True) for share in together for row in share]
    assert len({*groups}) == 1 + sum(one != other for one, other in pairwise(order))
