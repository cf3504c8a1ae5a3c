"""Schedules as functions of the step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losslab import LosslabError
from losslab.rules import schedules
from losslab.rules.schedules import (
    constant,
    cosine,
    exponential,
    inverse,
    inverse_sqrt,
    linear,
    step_decay,
    warmup,
)

ALL = {
    "constant(value=2.0)": (constant(2.0), lambda t: 2.0),
    "inverse_sqrt(value=2.0)": (inverse_sqrt(2), lambda t: 2 / math.sqrt(t)),
    "inverse(value=2.0)": (inverse(2.0), lambda t: 2 / t),
    "exponential(value=2.0, rate=0.9)": (exponential(2.0, rate=0.9), lambda t: 2 * 0.9 ** (t - 1)),
    "step_decay(value=2.0, by=0.1, every=10, milestones=None)": (
        step_decay(2.0, every=10),
        lambda t: 2 * 0.1 ** ((t - 1) // 10),
    ),
    "step_decay(value=2.0, by=0.5, every=None, milestones=(3, 7))": (
        step_decay(2.0, by=0.5, milestones=[3, 7]),  # type: ignore[arg-type]
        lambda t: 2.0 if t <= 3 else 1.0 if t <= 7 else 0.5,
    ),
    "linear(value=2.0, steps=20, final=0.5)": (
        linear(2.0, steps=20, final=0.5),
        lambda t: 2 - (t - 1) / 20 if t <= 20 else 1.0,
    ),
    "warmup(value=2.0, steps=5)": (warmup(2.0, steps=5), lambda t: 2 * min(t, 5) / 5),
    "cosine(value=2.0, steps=20, warmup=4, final=0.1)": (
        cosine(2.0, steps=20, warmup=4, final=0.1),
        lambda t: (
            2 * t / 4
            if t <= 4
            else 2 * (0.1 + 0.45 * (1 + math.cos(math.pi * (t - 5) / 16)))
            if t < 21
            else 0.2
        ),
    ),
}


@pytest.mark.parametrize("told", ALL)
def test_equals_its_formula(told: str) -> None:
    ours, formula = ALL[told]
    assert repr(ours) == told
    np.testing.assert_allclose(
        [ours(step) for step in range(40)], [formula(t) for t in range(1, 41)], rtol=1e-14
    )


@pytest.mark.parametrize("told", ALL)
def test_a_value_a_member_is_each_value(told: str) -> None:
    one = ALL[told][0]
    settings = {f: getattr(one, f) for f in one.__dataclass_fields__ if f != "value"}
    for values in ([2.0, 3.0], torch.tensor([2.0, 3.0])):
        several = type(one)(values, **settings)
        for step in (0, 1, 7, 30):
            value = several(step)
            assert isinstance(value, torch.Tensor)
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, torch.tensor([1.0, 1.5], dtype=torch.float64) * one(step))


def test_schedules_compose_and_compare() -> None:
    curve = warmup(cosine([0.1, 0.2], steps=10), steps=4)
    torch.testing.assert_close(
        curve(1), torch.tensor([0.1, 0.2], dtype=torch.float64) * cosine(0.5, steps=10)(1)
    )
    assert curve == warmup(cosine((0.1, 0.2), steps=10), steps=4)
    assert len({curve, warmup(cosine([0.1, 0.2], steps=10), steps=4)}) == 1
    assert inverse(0.1) != inverse_sqrt(0.1)


@given(st.integers(1, 50), st.integers(0, 49), st.floats(0, 1))
def test_a_cosine_rises_then_falls_to_its_end(steps: int, rise: int, final: float) -> None:
    if rise >= steps:
        return
    values = [cosine(1.0, steps=steps, warmup=rise, final=final)(step) for step in range(steps + 3)]
    assert np.all(np.diff(values[:rise]) > 0)
    assert np.all(np.diff(values[max(rise, 1) :]) <= 1e-15)
    assert values[-1] == pytest.approx(final)
    assert max(values) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: constant("fast"), "schedule constant got value = 'fast', it must be a number"),  # type: ignore[arg-type]
        (lambda: inverse([[1.0], [2.0]]), "must be a scalar or one value per member"),  # type: ignore[list-item]
        (lambda: cosine(0.1, steps=0), "schedule cosine got steps = 0, it must be at least 1: change steps"),
        (lambda: cosine(0.1, steps=5, warmup=5), "warmup = 5, it must be at least 0 and below steps = 5"),
        (lambda: linear(0.1, steps=-1), "schedule linear got steps = -1"),
        (lambda: exponential(0.1, rate=0.0), "rate = 0.0, it must be positive"),
        (lambda: step_decay(0.1), "pass every= or milestones="),
        (lambda: step_decay(0.1, every=2, milestones=(1,)), "it wants one of the two"),
        (lambda: step_decay(0.1, every=0), "every = 0, it must be at least 1"),
    ],
)
def test_bad_schedules_are_told(build: object, sentence: str) -> None:
    with pytest.raises(LosslabError) as told:
        build()  # type: ignore[operator]
    assert sentence in str(told.value)


def test_every_schedule_is_tested() -> None:
    public = {v for v in vars(schedules).values() if isinstance(v, type) and issubclass(v, constant)}
    assert public == {type(curve) for curve, _ in ALL.values()}
