"""Members, schedules, dtypes, purity, and the in-place steppers: what every rule owes its callers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.rules.cases import (
    CASES,
    KERNELS,
    MEMBERS,
    SECOND_ORDER,
    SHAPES,
    Bowl,
    Case,
    alone,
    draw,
    flat,
    per_member,
    run,
)

from losslab.rules import SGD, Adam, Momentum, Rule, fused, schedules, stepper
from losslab.rules.rule import Coefficients

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_kernel = pytest.mark.parametrize("case", KERNELS, ids=str)


def close(ours: Any, theirs: Any, **told: float) -> None:
    torch.testing.assert_close(ours, theirs, **(told or {"rtol": 1e-12, "atol": 1e-13}))


@every_case
def test_members_with_their_own_hyperparameters_equal_each_alone(case: Case) -> None:
    weights, gradients = draw(0), draw(1, steps=8)
    rule = case.make(
        **per_member(case), weight_decay=[0.0, 0.1, 0.2, 0.3], clip=[0.5, 1.0, 2.0, 4.0], box=1.5
    )
    together, state = run(rule, weights, gradients, case.first)
    for i in range(MEMBERS):
        one, its = run(rule.select([i]), alone(weights, i), [alone(g, i) for g in gradients], case.first)
        close(alone(together, i), one)
        close({s: alone(t, i) for s, t in state.items()}, its)


@every_case
def test_a_value_equals_the_same_value_for_every_member(case: Case) -> None:
    weights, gradients = draw(2), draw(3, steps=8)
    repeated = {name: [value] * MEMBERS for name, value in case.numbers().items()}
    close(
        run(case.make(**repeated), weights, gradients, case.first),
        run(case.make(), weights, gradients, case.first),
    )


@every_case
def test_nothing_that_is_given_changes(case: Case) -> None:
    weights, gradients = draw(4), draw(5, steps=3)
    rule = case.make(weight_decay=0.1, clip=1.0, box=0.8)
    state = rule.init(weights)
    for step in (case.first, case.first + 1):
        copies = [{n: t.clone() for n, t in ts.items()} for ts in (weights, gradients[step], *state.values())]
        new, after = rule.update(gradients[step], state, weights, step, Bowl(MEMBERS))
        close([weights, gradients[step], *state.values()], copies, rtol=0, atol=0)
        weights, state = new, after


@every_case
def test_a_schedule_is_a_value_at_each_step(case: Case) -> None:
    weights, gradients = draw(6), draw(7, steps=6)
    numbers = case.numbers()
    for name in ("initial_sum", *case.started):
        numbers.pop(name, None)
    curves = {name: schedules.inverse_sqrt(value) for name, value in numbers.items()}
    curves["lr"] = schedules.inverse_sqrt([numbers["lr"] * f for f in (1, 2, 3, 4)])
    scheduled, _ = run(case.make(**curves), weights, gradients, case.first)
    by_hand, state = weights, case.make().init(weights)
    for step, g in enumerate(gradients, case.first):
        rule = case.make(**{name: curve(step) for name, curve in curves.items()})
        by_hand, state = rule.update(g, state, by_hand, step, Bowl(MEMBERS))
    close(scheduled, by_hand)


@every_case
def test_members_can_be_selected_under_a_schedule(case: Case) -> None:
    weights, gradients = draw(8), draw(9, steps=4)
    rule = case.make(lr=schedules.warmup([0.1, 0.2, 0.3, 0.4], steps=3))
    picked = [3, 1]
    some, _ = run(
        rule.select(picked),
        {n: w[picked] for n, w in weights.items()},
        [{n: w[picked] for n, w in g.items()} for g in gradients],
        case.first,
    )
    whole, _ = run(rule, weights, gradients, case.first)
    close(some, {n: w[picked] for n, w in whole.items()})


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_state_keep_their_dtypes(case: Case, dtype: torch.dtype) -> None:
    weights, gradients = draw(10, dtype=dtype), draw(11, steps=3, dtype=dtype)
    rule = case.make(lr=[0.1] * MEMBERS, weight_decay=0.01)
    if rule.whole_vector and dtype is torch.bfloat16:
        return  # linear algebra has no bfloat16
    new, state = run(rule, weights, gradients, case.first)
    assert {t.dtype for ts in (new, *state.values()) for t in ts.values()} == {dtype}
    assert {n: w.shape for n, w in new.items()} == {n: (MEMBERS, *s) for n, s in SHAPES.items()}
    if not rule.whole_vector:
        wide = {slot: {n: t.double() for n, t in ts.items()} for slot, ts in rule.init(weights).items()}
        new, state = rule.update(gradients[0], wide, weights, case.first)
        assert {t.dtype for t in new.values()} == {dtype}
        assert {t.dtype for ts in state.values() for t in ts.values()} <= {torch.float64}


@every_case
def test_float32_is_near_float64(case: Case) -> None:
    weights, gradients = draw(12), draw(13, steps=10)
    single = [{n: t.float() for n, t in ts.items()} for ts in gradients]
    ours, _ = run(case.make(), {n: t.float() for n, t in weights.items()}, single, case.first)
    close(
        flat(ours).double(), flat(run(case.make(), weights, gradients, case.first)[0]), rtol=1e-3, atol=1e-3
    )


@every_case
def test_a_diverged_member_disturbs_no_other(case: Case) -> None:
    weights, gradients = draw(14), draw(15, steps=4)
    rule = case.make(clip=1.0)
    clean, _ = run(rule, weights, gradients, case.first)
    gradients[1] = {n: g.index_fill(0, torch.tensor([2]), torch.nan) for n, g in gradients[1].items()}
    spoilt, _ = run(rule, weights, gradients, case.first)
    close(flat(spoilt)[[0, 1, 3]], flat(clean)[[0, 1, 3]], rtol=0, atol=0)
    if case.rule not in ("adagrad-full", *SECOND_ORDER):
        assert flat(spoilt)[2].isnan().all()


# -- in place -----------------------------------------------------------------------------------------------


def in_place(rule: Rule, weights: Any, gradients: Any, first: int = 0) -> Any:
    step = stepper(rule)
    assert step is not None
    weights = {n: w.clone() for n, w in weights.items()}
    state = rule.init(weights)
    kept = [{n: g.clone() for n, g in gs.items()} for gs in gradients]
    for k, g in enumerate(gradients, first):
        step(g, state, weights, k)
    close(gradients, kept, rtol=0, atol=0)
    return weights, state


ways = {
    "one value": lambda case: {},
    "rates": lambda case: {"lr": [0.1, 0.2, 0.3, 0.4]},
    "all values": per_member,
    "l2": lambda case: {"weight_decay": 0.2},
    "l2 and rates": lambda case: {"weight_decay": [0.1, 0.2, 0.3, 0.0], "lr": [0.1, 0.2, 0.3, 0.4]},
    "decoupled": lambda case: {"weight_decay": 0.2, "decay": "decoupled"},
    "decoupled and all values": lambda case: {**per_member(case), "weight_decay": 0.2, "decay": "decoupled"},
    "schedule": lambda case: {"lr": schedules.inverse_sqrt([0.1, 0.2, 0.3, 0.4])},
}


@every_kernel
@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("sliced_from", [0, 5, fused.SLICED_FROM], ids=["sliced", "mixed", "buffered"])
def test_in_place_equals_the_equation(
    case: Case, way: str, sliced_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SLICED_FROM", sliced_from)
    weights, gradients = draw(16), draw(17, steps=6)
    rule = case.make(**ways[way](case))
    close(in_place(rule, weights, gradients), run(rule, weights, gradients))


@every_kernel
def test_in_place_in_float32_is_near_float64(case: Case) -> None:
    weights, gradients = draw(18), draw(19, steps=6)
    narrow = [{n: t.float() for n, t in ts.items()} for ts in (weights, *gradients)]
    ours, state = in_place(case.make(), narrow[0], narrow[1:])
    assert {t.dtype for ts in (ours, *state.values()) for t in ts.values()} == {torch.float32}
    close(flat(ours).double(), flat(run(case.make(), weights, gradients)[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [c for c in KERNELS if not c.zeros], ids=str)
def test_in_place_a_dead_coordinate_without_eps_is_nan_too(case: Case) -> None:
    weights, gradients = draw(22), draw(23, steps=2)
    for g in gradients:
        g["bias"][:, 1] = 0.0
    ours, _ = in_place(case.make(), weights, gradients)
    assert ours["bias"].isnan().nonzero()[:, 1].unique().tolist() == [1]


def test_which_rules_have_a_kernel() -> None:
    assert [str(c) for c in CASES if stepper(c.make()) is not None] == [str(c) for c in KERNELS]
    assert all(stepper(c.make(clip=1.0)) is None and stepper(c.make(box=1.0)) is None for c in KERNELS)


def test_a_stepper_follows_weights_that_move_in_memory() -> None:
    rule = Adam(lr=[0.1, 0.2], beta1=[0.8, 0.9])
    step, gradients = stepper(rule), draw(21, steps=4, members=2)
    assert step is not None
    weights = draw(20, members=2)
    expected, _ = run(rule, weights, gradients)
    state = rule.init(weights)
    for k, g in enumerate(gradients):
        weights = {n: w.clone() for n, w in weights.items()}
        state = {slot: {n: t.clone() for n, t in ts.items()} for slot, ts in state.items()}
        step(g, state, weights, k)
    close(weights, expected)


# -- values -------------------------------------------------------------------------------------------------


def test_rules_are_values() -> None:
    rule = Adam(lr=(0.1, 0.2), beta1=torch.tensor(0.5))
    assert rule.members() == 2
    assert SGD(lr=torch.tensor([0.1])).members() == 1
    assert SGD(lr=schedules.cosine([0.1, 0.2, 0.3], steps=5)).members() == 3
    assert Momentum().members() is None
    assert rule.replace(lr=0.5).members() is None
    told = rule.select([1]).describe()
    assert (told["rule"], told["lr"], told["beta1"], told["variant"]) == ("adam", [0.2], 0.5, "kingma-ba")
    assert SGD(lr=schedules.inverse(0.5)).describe()["lr"] == "inverse(value=0.5)"


def test_coefficients_name_what_is_missing() -> None:
    with pytest.raises(AttributeError, match="no hyperparameter 'lr'"):
        Coefficients({}).lr  # noqa: B018


def test_clipping_is_by_member() -> None:
    x = {"a": torch.zeros(2, 2), "b": torch.zeros(2)}
    g = {"a": torch.tensor([[3.0, 0.0], [0.3, 0.0]]), "b": torch.tensor([4.0, 0.4])}
    new, _ = SGD(lr=1.0, clip=1.0).update(g, {}, x, 0)
    np.testing.assert_allclose(new["a"], [[-0.6, 0], [-0.3, 0]], atol=1e-6)
    np.testing.assert_allclose(new["b"], [-0.8, -0.4], atol=1e-6)


def test_no_weights_is_no_update() -> None:
    assert SGD().update({}, {}, {}, 0) == ({}, {})
    step = stepper(SGD())
    assert step is not None
    step({}, {}, {}, 0)
