"""C31, C32: the sequence against plain floats, the judges on planted evidence, the figures from parquet."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tests.lecture.evidence import FAILS, HOLDS, MIXED, Draw, Races, Stored, Tables, overall, verdicts

from losslab.lecture.claim import Lab, Verdict, quiet
from losslab.lecture.section_6_3 import adam, adam_convergence, adam_remedies, adam_sequence
from losslab.lecture.section_6_3.adam_sequence import MEAN, OFFSETS, PERIOD, PLAIN
from losslab.rules import SGD, Adam, AdamNC, AMSGrad
from losslab.rules.schedules import inverse_sqrt


def reference_run(kind: str, gradients: list[float], alpha: float, beta1: float, beta2: float) -> list[float]:
    """The points played by each rule of the paper, in plain floats, clipped to [-1, 1]."""
    x = m = v = top = 0.0
    path = []
    for t, g in enumerate(gradients, 1):
        path.append(x)
        b2 = 1 - 1 / t if kind == "AdamNC" else beta2
        m, v = beta1 * m + (1 - beta1) * g, b2 * v + (1 - b2) * g * g
        top = max(top, v)
        first = 1 - beta1**t if kind == "Adam" else 1.0
        scale = {"Adam": v / (1 - beta2**t), "AMSGrad": top}.get(kind, v)
        step = g if kind == "SGD" else m / first / math.sqrt(scale)
        x = min(1.0, max(-1.0, x - alpha / math.sqrt(t) * step))
    return path


@pytest.mark.parametrize("kind", ["Adam", PLAIN, "AMSGrad", "AdamNC", "SGD"])
def test_the_rules_and_the_regret_on_the_sequence(kind: str) -> None:
    steps, alpha = 3 * PERIOD, 0.3
    lr = inverse_sqrt(alpha)
    rule = {
        "Adam": Adam(lr=lr, beta2=0.99, eps=0.0, box=1.0),
        PLAIN: Adam(lr=lr, beta2=0.99, eps=0.0, box=1.0, variant="uncorrected"),
        "AMSGrad": AMSGrad(lr=lr, beta2=0.99, eps=0.0, box=1.0),
        "AdamNC": AdamNC(lr=lr, eps=0.0, box=1.0),
        "SGD": SGD(lr=lr, box=1.0),
    }[kind]
    table = adam_sequence.drive({kind: rule}, adam_sequence.online, steps, MEAN, quiet, chunk=70)
    for run, offset in list(enumerate(OFFSETS))[::3]:
        gradients = [1010.0 if (t + offset) % 101 == 1 else -10.0 for t in range(1, steps + 1)]
        path = reference_run(kind, gradients, alpha, 0.9, 0.99)
        one = table[table["run"] == run]
        assert one["step"].max() == steps
        for row in one.itertuples():
            played, seen = np.array(path[: row.step]), np.array(gradients[: row.step])
            assert row.x == pytest.approx(path[row.step - 1], abs=1e-9)
            assert row.exact == pytest.approx((seen * played + seen).mean(), abs=1e-7)
            assert row.expected == pytest.approx(10 / 101 * (played + 1).mean(), abs=1e-9)


def test_the_sweep_repeats_the_streams_for_every_decay() -> None:
    beta2 = torch.tensor([0.9, 0.99], dtype=torch.float64).repeat_interleave(len(OFFSETS))
    rules = {
        name: Adam(lr=inverse_sqrt(1.0), beta2=b, eps=0.0, box=1.0) for name, b in (("a", beta2), ("b", 0.99))
    }
    table = adam_sequence.drive(rules, adam_sequence.online, 300, MEAN, quiet)
    both = [adam_convergence.ends(table, name, 0.99).sort_values("run") for name in ("a", "b")]
    assert both[0]["run"].tolist() == list(range(len(OFFSETS)))
    assert both[0]["x"].to_numpy() == pytest.approx(both[1]["x"].to_numpy(), abs=1e-12)
    assert {1, 30, 300} <= set(table["step"])


def test_the_repeating_period_is_the_one_that_adam_reaches() -> None:
    m = v = 0.0
    for t in range(100 * PERIOD):
        g = 1010.0 if t % PERIOD == 0 else -10.0
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        if t % PERIOD == 7:
            seventh = m, v
    first, second = adam_sequence.period(0.9, 0.99)
    assert (first[7], second[7]) == pytest.approx(seventh, rel=1e-9)
    assert first.sum() == pytest.approx(10.0)


def test_the_drift_changes_its_sign_at_the_critical_decay() -> None:
    critical = adam_sequence.critical_beta2()
    assert adam_sequence.drift(critical - 1e-5) < 0 < adam_sequence.drift(critical + 1e-5)
    assert adam_sequence.drift(0.99) < -1


def test_the_rate_leaves_room_on_both_sides_at_the_quick_horizon() -> None:
    steps = adam_convergence.horizon(Lab())
    assert adam_sequence.rate() == pytest.approx(adam_sequence.RATE, rel=0.01)
    slowest = 10 / math.sqrt(adam_sequence.period(0.9, 0.99)[1].max()) / PERIOD
    assert 2 * slowest * adam_sequence.RATE * math.sqrt(steps) > 1.9
    widest = 1000 / math.sqrt((1010**2 + 100 * 100) / PERIOD)
    assert widest * adam_sequence.RATE / math.sqrt(steps) < 0.1
    assert steps % 10 == 0


def test_the_stochastic_stream() -> None:
    stream = adam_sequence.random_stream(0, 40_000, 3)
    assert stream.shape == (40_000, 3)
    share = (stream == 1010).double().mean(0)
    assert ((share - 0.01).abs() < 4 * math.sqrt(0.01 * 0.99 / 40_000)).all()
    assert set(stream.unique().tolist()) == {-10.0, 1010.0}
    assert not torch.equal(stream[:, 0], stream[:, 1])
    assert not torch.equal(stream, adam_sequence.random_stream(40_000, 80_000, 3))


def test_theorem_1() -> None:
    table = adam_sequence.theorem_1(instances=30, steps=150)
    assert (table["C"] > 2).all()
    assert (table["alpha"] < np.sqrt(1 - 1 / (1 + table["C"] ** 2))).all()
    assert table["deviation"].max() <= 1e-12


def planted(
    adam_end: float = 0.97, other_end: float = -0.97, before: float = 0.93, after: float = 0.95
) -> Tables:
    """Online evidence of ten offsets at steps T/10 and T; regrets in units of that of x = 1."""
    ends = {"Adam": adam_end, PLAIN: adam_end, "AMSGrad": other_end, "AdamNC": other_end, "SGD": other_end}
    decays = {"Adam": (0.99, 0.99999), PLAIN: (0.99,), "AMSGrad": (0.99,)}
    rows = [
        {"rule": rule, "beta2": beta2, "run": run, "step": step, "exact": 0.5, "expected": 2 * MEAN * share}
        | {"x": -0.97 if beta2 > 0.999 else end}
        for rule, end in ends.items()
        for beta2 in decays.get(rule, (math.nan,))
        for run in range(10)
        for step, share in ((10_000, before), (100_000, after))
    ]
    theorem = pd.DataFrame({"C": 3.0, "alpha": 0.1, "deviation": np.zeros(100)})
    return {"online": pd.DataFrame(rows), "theorem": theorem}


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        ({}, HOLDS),
        ({"adam_end": -0.97}, MIXED),  # Adam converges like the others
        ({"adam_end": 0.89}, MIXED),
        ({"other_end": 0.5}, MIXED),  # nobody converges
        ({"before": 0.96, "after": 0.95}, MIXED),  # the regret falls
        ({"before": 0.8, "after": 0.89}, MIXED),
    ],
)
def test_c31(evidence: dict[str, float], verdict: Verdict, stored: Stored) -> None:
    assert overall(adam.C31, stored(planted(**evidence))) is verdict


def test_c31_its_parts() -> None:
    found = verdicts(adam.C31, planted(adam_end=-0.97, after=0.1))
    assert found["Adam ends at the worst point, x > 0.9 (online)"] is FAILS
    assert found["Adam's average regret does not vanish (online)"] is FAILS
    assert found["AMSGrad ends at the optimum, x < −0.9 (online)"] is HOLDS
    assert found[adam_convergence.SWEEP] is FAILS
    wrong = planted() | {"theorem": planted()["theorem"].assign(deviation=1e-3)}
    assert verdicts(adam.C31, wrong)["Theorem 1: x = 1 at the start of every period"] is FAILS


def test_c31_the_sweep_has_no_part_in_the_verdict() -> None:
    tables = planted()
    table = tables["online"]
    odd = tables | {"online": table.assign(x=table["x"].where(table["beta2"] != 0.99999, 0.9))}
    assert verdicts(adam.C31, odd)[adam_convergence.SWEEP] is FAILS
    assert overall(adam.C31, odd) is HOLDS


def test_c31_judges_the_stochastic_version_where_there_is_one() -> None:
    tables = planted()
    random = tables["online"].query("rule in ['Adam', 'AMSGrad'] and beta2 == 0.99")
    random = random.assign(expected=random["expected"] / (2 * MEAN) * 0.4)
    assert overall(adam.C31, tables | {"random": random}) is HOLDS
    astray = random.assign(x=-random["x"])
    assert (
        verdicts(adam.C31, tables | {"random": astray})["AMSGrad ends at the optimum, x < −0.9 (stochastic)"]
        is FAILS
    )
    assert overall(adam.C31, tables | {"random": astray}) is MIXED


@pytest.fixture(scope="module")
def short() -> pd.DataFrame:
    """The experiment of C31 over 20 periods: too short to converge, long enough to draw."""
    rules = adam_sequence.contestants(adam_sequence.RATE, (0.99, 0.9999), len(OFFSETS))
    return adam_sequence.drive(rules, adam_sequence.online, 20 * PERIOD, MEAN, quiet)


def test_c31_draws_its_own_experiment(short: pd.DataFrame, stored: Stored, draw: Draw) -> None:
    tables = {"online": short, "theorem": adam_sequence.theorem_1(instances=5, steps=30)}
    assert set(verdicts(adam.C31, stored(tables)).values()) <= set(Verdict)
    draw(adam.C31, tables)


# -- C32 -----------------------------------------------------------------------------------------------

NAMES = ("Adam, β₂ = 0.99", "Adam, β₂ = 0.999", "AMSGrad, β₂ = 0.99", "AMSGrad, β₂ = 0.999")


@pytest.mark.parametrize(
    ("other_end", "losses", "verdict"),
    [
        (-0.97, (1.2, 1.0, 1.1, 0.9), HOLDS),
        (-0.97, (1.2, 1.0, 0.9, 1.1), HOLDS),  # each rule has its own best decay
        (-0.97, (0.9, 1.0, 1.1, 1.2), MIXED),
        (0.97, (0.9, 1.0, 1.1, 1.2), FAILS),
        (-0.97, (1.0, 1.1, 0.995, 1.1), MIXED),  # better, but by less than 1 %
    ],
)
def test_c32(
    other_end: float, losses: tuple[float, ...], verdict: Verdict, stored: Stored, races: Races
) -> None:
    practice = races(dict(zip(NAMES, losses, strict=True)), ("logistic regression", "MLP"))
    tables = {"online": planted(other_end=other_end)["online"], **practice}
    assert overall(adam.C32, stored(tables)) is verdict


def test_c32_draws(short: pd.DataFrame, draw: Draw, races: Races) -> None:
    practice = races(dict.fromkeys(NAMES, 1.0), ("logistic regression", "MLP"))
    draw(adam.C32, {"online": short, **practice})


def test_c32_arms_are_adam_and_the_papers_amsgrad_at_both_decays() -> None:
    arms = adam_remedies._arms(decaying=True)
    assert tuple(arm.name for arm in arms) == NAMES
    rules = [arm.make([0.1, 0.2]) for arm in arms]
    assert [rule.beta2 for rule in rules] == [0.99, 0.999, 0.99, 0.999]
    assert rules[2].variant == "paper"
    assert rules[0].members() == 2
    assert vars(rules[0].at(3))["lr"].tolist() == pytest.approx([0.05, 0.1])
