"""Random numbers that are functions of (seed, purpose, step): uniform, independent, the same everywhere."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from losslab.engine import randomness
from losslab.engine.randomness import (
    MemberRandom,
    bits,
    coins,
    fold,
    integers,
    key,
    member_keys,
    normal,
    uniform,
)

KEYS = member_keys(range(8), "test")


def reference(key: int, place: int) -> int:
    """Splitmix64 of a counter, in Python's own integers."""
    mask = (1 << 64) - 1
    z = (key + place * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_bits_are_splitmix64_of_a_counter(start: int, index: int) -> None:
    keys = torch.tensor([start, 1])
    found = bits(keys, (2, 3))[0].flatten().tolist()
    assert [b % (1 << 64) for b in found] == [reference(start, k) for k in range(1, 7)]
    assert int(fold(keys, index)[0]) % (1 << 64) == reference(start, index + 1)


def test_numbers_are_pinned() -> None:
    assert key(0, "init") == 5621797835976536519
    assert member_keys([0, 1, -3], "forward").tolist() == [
        2518012511718293088, 7898863164480944413, 1001172924932971268,
    ]  # fmt: skip
    assert fold(torch.tensor([5]), 2).tolist() == [4292726422858613063]
    grid = [6488891, 12621617, 3904211]
    assert uniform(torch.tensor(5), (3,)).tolist() == [k / 2**24 for k in grid]
    assert integers(torch.tensor(5), (6,), 10).tolist() == [3, 7, 2, 0, 1, 3]
    assert normal(torch.tensor(5), (2,), torch.float64).tolist() == pytest.approx(
        [-0.28775264060273376, 0.6817675150599002], rel=1e-13
    )
    assert coins(torch.tensor(5), (8,), 0.5).int().tolist() == [1, 1, 0, 0, 0, 1, 0, 1]
    assert torch.randperm(6, generator=randomness.generator(0, "order", 0)).tolist() == [5, 2, 1, 3, 4, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_are_uniform_and_independent(dtype: torch.dtype) -> None:
    u = uniform(KEYS, (50_000,), dtype)
    assert u.dtype == dtype
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert bool((u * 2**24 == (u * 2**24).round()).all())
    for row in u:
        counts = torch.histc(row.float(), 100, 0, 1)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert float(torch.corrcoef(u).fill_diagonal_(0).abs().max()) < 5 / math.sqrt(50_000)
    for lag in (1, 2, 8):  # along a member's own numbers
        pairs = torch.stack([u[:, :-lag].flatten(), u[:, lag:].flatten()])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 5 / math.sqrt(400_000)


def test_steps_calls_and_neighbouring_seeds_are_independent() -> None:
    keys = member_keys(range(200), "forward")
    streams = torch.stack([uniform(fold(keys, step), (64,), torch.float64).flatten() for step in range(6)])
    calls = torch.stack(
        [uniform(fold(fold(keys, 1), call), (64,), torch.float64).flatten() for call in range(6)]
    )
    for rows in (streams, calls, torch.cat([streams, calls])):
        assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 5 / math.sqrt(12_800)
    first = uniform(keys, (), torch.float64)
    assert stats.kstest(first.numpy(), "uniform").pvalue > 1e-3
    assert len(set(fold(keys, 3).tolist()) | set(keys.tolist())) == 400


@given(st.integers(1, 2**40), st.integers(0, 2**62))
def test_integers_are_in_range(high: int, start: int) -> None:
    found = integers(torch.tensor([start, start + 1]), (50,), high)
    assert found.dtype == torch.int64
    assert int(found.min()) >= 0
    assert int(found.max()) < high


def test_integers_are_uniform() -> None:
    counts = torch.bincount(integers(KEYS, (20_000,), 7).flatten(), minlength=7)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_normal_numbers_are_normal() -> None:
    z = normal(KEYS, (50_000,), torch.float64).flatten()
    assert bool(torch.isfinite(z).all())
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert float(z.mean()) == pytest.approx(0, abs=5 / math.sqrt(z.numel()))
    assert float((z**2).mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / z.numel()))
    assert float((z**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / z.numel()))
    assert bool(torch.isfinite(normal(torch.tensor(0), (1000,), torch.float32)).all())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])


@DTYPES
def test_uniform_numbers_lie_below_one_in_every_dtype(dtype: torch.dtype) -> None:
    u = uniform(KEYS, (20_000,), dtype)
    assert u.dtype == dtype
    assert 0 <= float(u.min()) < 1e-2
    assert 0.99 < float(u.max()) < 1
    assert float(u.double().mean()) == pytest.approx(0.5, abs=5e-3)
    assert uniform(KEYS[0], (), dtype).shape == ()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@DTYPES
def test_dropout_keeps_its_share_and_the_mean(p: float, dtype: torch.dtype) -> None:
    x = torch.ones(200, 500, dtype=dtype)
    with MemberRandom(KEYS[0]):
        y = F.dropout(x, p)
    kept = (y != 0).double().mean()
    assert float(kept) == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / 100_000))
    assert y.dtype == dtype
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p), dtype=torch.float64).to(dtype))}


def test_dropout_draws_the_same_mask_in_every_dtype_and_another_at_every_call() -> None:
    masks = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with MemberRandom(KEYS[1]):
            masks.append([F.dropout(torch.ones(40, 5, dtype=dtype), 0.3) != 0 for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][0], masks[2][0])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_coins_are_independent_and_as_likely_as_asked() -> None:
    for chance in (0.25, 0.5, 0.9):
        found = coins(KEYS, (40_000,), chance)
        near = 5 * math.sqrt(chance * (1 - chance) / found.numel())
        assert float(found.double().mean()) == pytest.approx(chance, abs=near)
        quarters = found.double().view(8, -1, 4).permute(2, 0, 1).flatten(1)  # the four coins of a hash
        for rows in (quarters, found.double()):
            assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 5 / math.sqrt(40_000)
    assert torch.func.vmap(lambda k: coins(k, (3, 5), 0.3))(KEYS).equal(coins(KEYS, (3, 5), 0.3))


def test_dropout_at_its_ends_and_of_whole_channels() -> None:
    x = torch.ones(2, 6, 3, 3)
    with MemberRandom(KEYS[2]) as mode:
        assert torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert mode.calls == 0
        assert not F.dropout(x, 1.0).any()
        assert float((F.dropout(x, 1e-6) != 0).float().mean()) > 0.9
        assert F.dropout(x.sum(), 0.5).shape == ()
        y = F.dropout2d(x, 0.5)
        assert torch.equal(y, y[:, :, :1, :1].expand_as(y))
        z = torch.rand_like(x, dtype=torch.float64)
        assert z.dtype == torch.float64
        assert mode.calls == 5


def test_seeding_is_put_back_even_after_an_error() -> None:
    before = torch.get_rng_state()
    draws: list[Tensor] = []
    for _ in range(2):
        with contextlib.suppress(KeyError), randomness.seeded(3, "x"):
            draws.append(torch.rand(2))
            raise KeyError
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(before, torch.get_rng_state())
    with randomness.spared() as moved:
        assert not moved()
        torch.rand(1)
        assert moved()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(key(3, "x"))
    assert torch.equal(torch.rand(2), draws[0])
    torch.set_rng_state(before)


def test_keys_depend_on_everything() -> None:
    keys = {key(s, p, *i) for s in range(20) for p in ("init", "order") for i in ((), (0,), (1,), (0, 1))}
    assert len(keys) == 160
    assert all(0 <= k < 2**63 for k in keys)
