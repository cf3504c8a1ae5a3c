"""The order of the data: a pure function of the seed, every example once an epoch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losslab import LosslabError
from losslab.engine import Batches

sizes = st.tuples(st.integers(1, 30), st.integers(1, 35) | st.none())
seeds = st.lists(st.integers(-5, 10**12), min_size=1, max_size=4)


def row(batches: Batches, step: int, member: int) -> list[int]:
    index = batches.at(step)
    return (index if batches.shared else index[member]).tolist()


@given(sizes, seeds, st.booleans(), st.integers(0, 5))
def test_each_example_comes_once_an_epoch_for_every_member(
    size: tuple[int, int | None], seeds: list[int], shared: bool, epoch: int
) -> None:
    examples, batch_size = size
    batches = Batches(examples, batch_size, seeds, shared, order_seed=3)
    per = min(batch_size or examples, examples)
    assert batches.per_epoch == math.ceil(examples / per)
    for member in range(len(seeds)):
        parts = [row(batches, epoch * batches.per_epoch + k, member) for k in range(batches.per_epoch)]
        assert sorted(i for part in parts for i in part) == list(range(examples))
        assert [len(part) for part in parts[:-1]] == [per] * (batches.per_epoch - 1)


@given(sizes, seeds, st.booleans(), st.booleans(), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_batch_is_a_function_of_the_seed_and_the_step(
    size: tuple[int, int | None], seeds: list[int], replacement: bool, drop_last: bool, calls: list[int]
) -> None:
    examples, batch_size = size
    if drop_last and batch_size is not None and batch_size > examples:
        return
    options: dict[str, Any] = {"replacement": replacement, "drop_last": drop_last}
    together = Batches(examples, batch_size, seeds, **options)
    picked = list(range(len(seeds)))[::-2]
    together.at(calls[0])
    some = together.select(picked)
    for step in calls:
        fresh = Batches(examples, batch_size, seeds, **options).at(step)
        assert torch.equal(together.at(step), fresh)
        for place, member in enumerate(picked):
            assert row(some, step, place) == row(together, step, member)
        for member, seed in enumerate(seeds):
            alone = Batches(examples, batch_size, [seed], **options)
            assert alone.at(step).tolist() == row(together, step, member)


@given(st.integers(2, 30), st.integers(1, 29))
def test_the_last_smaller_batch_may_be_dropped(examples: int, batch_size: int) -> None:
    if batch_size > examples:
        return
    batches = Batches(examples, batch_size, [0, 1], drop_last=True)
    assert batches.per_epoch == examples // batch_size
    epoch = [i for k in range(batches.per_epoch) for i in row(batches, k, 1)]
    assert len(set(epoch)) == len(epoch) == batches.per_epoch * batch_size


def test_orders_differ_between_seeds_epochs_and_from_the_order_of_the_data() -> None:
    batches = Batches(50, 50 - 1, [0, 1])
    first, second, later = row(batches, 0, 0), row(batches, 0, 1), row(batches, 2, 0)
    assert len({tuple(first), tuple(second), tuple(later), tuple(range(49))}) == 4
    shared = [Batches(50, 49, [0, 1], True, order_seed=k).at(0).tolist() for k in (0, 7)]
    assert shared[0] == first
    assert shared[1] != first


def test_all_examples_in_one_batch_keep_their_order_and_are_shared() -> None:
    for size in (None, 8, 9):
        batches = Batches(8, size, [0, 1])
        assert batches.whole
        assert batches.at(3).tolist() == list(range(8))
    assert not Batches(8, 8, [0, 1], replacement=True).whole
    assert Batches(8, 3, [5, 5]).shared


def test_draws_with_replacement_are_uniform() -> None:
    batches = Batches(10, 10, [0, 1], replacement=True)
    drawn = torch.stack([batches.at(k) for k in range(400)])
    for member in range(2):
        counts = torch.bincount(drawn[:, member].flatten(), minlength=10)
        assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # chi-square, 9 degrees of freedom, 0.1 %
    assert any(len(set(drawn[k, 0].tolist())) < 10 for k in range(5))


def test_orders_are_pinned() -> None:
    assert Batches(6, 4, [0, 1]).at(0).tolist() == [[5, 2, 1, 3], [2, 5, 4, 3]]
    assert Batches(6, 4, [0, 1]).at(3).tolist() == [[2, 4], [0, 5]]
    assert Batches(6, 4, [0, 1], replacement=True).at(7).tolist() == [[0, 4, 5, 2], [4, 5, 2, 1]]


@pytest.mark.parametrize(
    ("size", "drop", "told"), [(0, False, "at least 1, or None"), (7, True, "nothing is left")]
)
def test_sizes_that_cannot_be(size: int, drop: bool, told: str) -> None:
    with pytest.raises(LosslabError, match=f"batch_size is {size}.*{told}"):
        Batches(6, size, [0], drop_last=drop)
