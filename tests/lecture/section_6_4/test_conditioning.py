"""C42: linear units against autograd, rates that work, and the judge on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from losslab.layers import BatchNorm
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import conditioning as c
from losslab.lecture.section_6_4 import linear_units as u

HOLDS, FAILS, MIXED, UNDECIDED = "holds", "does not hold", "mixed", "undecided"


@pytest.mark.parametrize("arm", [u.PLAIN, u.NORMALISED, u.ONE_RATE])
@pytest.mark.parametrize("seed", range(3))
def test_every_unit_is_what_one_module_gives_alone(arm, seed):
    problems = u.scaled_inputs(2, examples=12 + seed, dimension=2 + seed, decades=0.3)
    rates, steps = [0.01, 0.3], 6
    found = u.descend(problems, rates, arm, steps, seed)
    generator = torch.Generator().manual_seed(seed)
    d = problems.x.shape[2]
    starts = torch.randn(2, d, 1, generator=generator, dtype=torch.float64) / d**0.5
    for s, x, y in zip(range(2), problems.x, problems.y, strict=True):
        for r, rate in enumerate(rates):
            linear = nn.Linear(d, 1, bias=arm == u.PLAIN).double()
            with torch.no_grad():
                linear.weight.copy_(starts[s].T)
                if arm == u.PLAIN:
                    linear.bias.zero_()
            norm = nn.Identity() if arm == u.PLAIN else BatchNorm(1, eps=1e-12).double()
            own = u.OWN_RATE if arm == u.NORMALISED else rate
            groups = [{"params": [linear.weight], "lr": rate}]
            others = [linear.bias] if arm == u.PLAIN else list(norm.parameters())
            rule = torch.optim.SGD([*groups, {"params": others, "lr": own}], lr=1.0)
            before = None
            for step in range(steps + 1):
                loss = (norm(linear(x)).squeeze(1) - y).square().mean() / 2
                assert loss.item() == pytest.approx(float(found.loss[step, s, r]), rel=1e-9)
                rule.zero_grad()
                loss.backward()
                g = linear.weight.grad.clone()
                if step < steps:
                    turned = before is not None and float((g * before).sum()) < 0
                    assert bool(found.turned[step, s, r]) == turned
                before = g
                rule.step()


def test_the_floor_is_the_least_squares_loss():
    problems = u.scaled_inputs(3, examples=20, dimension=4)
    floor = problems.floor()
    path = u.descend(problems.standardised(), [0.5], u.PLAIN, 2000)
    assert torch.allclose(path.loss[-1, :, 0], floor, rtol=1e-6)


def test_the_data_are_scaled_as_said():
    spread = u.scaled_inputs(20, examples=400, dimension=5).x.std(1)
    assert 0.008 < spread.min() < 0.05
    assert 20 < spread.max() < 120
    x, y = u.even_digits(2, examples=30)
    assert x.shape == (2, 30, 64)
    assert set(y.unique().tolist()) == {-1.0, 1.0}


def test_a_plain_unit_works_below_its_limit_only(monkeypatch):
    monkeypatch.setattr(u, "STEPS", 100)
    problems = u.scaled_inputs(2, examples=100, dimension=3).standardised()
    table = u.sweep("data", problems, [0.3, 30.0], [u.PLAIN, u.NORMALISED])
    works = np.isfinite(table.steps).groupby([table.arm, table.rate]).all()
    assert works[u.PLAIN, 0.3]
    assert not works[u.PLAIN, 30.0]
    assert works[u.NORMALISED, 30.0]
    assert (table[(table.arm == u.PLAIN) & (table.rate == 30.0)].excess > 1e6).all()


def test_covariances_keep_the_bound_and_break_the_rule():
    table = c.covariances(300)
    ratio = table.standardised / table.kappa
    assert (ratio <= table["size"] * (1 + 1e-9)).all()
    assert (ratio[table["size"] == 2] <= 1 + 1e-9).all()  # in two dimensions standardising is optimal
    assert ratio.max() > 1.1
    row = table[table["size"] == 3].iloc[0]
    entries = [row[f"a{place}"] for place in ("11", "12", "13", "22", "23", "33")]
    matrix = np.zeros((3, 3))
    matrix[np.triu_indices(3)] = entries
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    assert np.linalg.cond(matrix) == pytest.approx(row.kappa, rel=1e-6)
    scale = np.sqrt(matrix.diagonal())
    assert np.linalg.cond(matrix / np.outer(scale, scale)) == pytest.approx(row.standardised, rel=1e-6)


def test_small_run(verdicts, monkeypatch):
    monkeypatch.setattr(c, "RATES", (0.01, 0.1, 1.0))
    monkeypatch.setattr(u, "STEPS", 40)
    monkeypatch.setattr(c, "slowest_runs", lambda _: planted()["slowest"])
    found = verdicts(c.C42, c.experiment(Lab(seeds=2)))
    assert found[f"{c.DIGITS}: {c.DROP}"] == UNDECIDED  # two seeds
    assert found[c.BOUND] == HOLDS


def test_the_slowest_runs_obey_the_law():
    runs = c.slowest_runs(20)
    for name in ("raw", "standardised"):
        predicted = np.log(c.FALL) / (2 * np.log1p(-1 / runs[f"kappa_{name}"]))
        assert (runs[f"steps_{name}"] == np.ceil(predicted)).all()


def planted(drop=100.0, power=1.0, wider=3.0, scaled_wider=3.0, turning=0.0, ratio=0.9, seeds=10):
    """Evidence with the given fall of kappa, power of the law, and decades won."""
    conditions = [
        {"data": data, "seed": seed, "arm": arm, "kappa": 10.0 * (drop if arm == c.RAW else 1) + seed / 10}
        for data in (c.DIGITS, c.SCALED)
        for seed in range(seeds)
        for arm in (c.RAW, c.CENTRED, c.STANDARD)
    ]
    kappa = np.geomspace(10, 1000, 30)
    slowest = pd.DataFrame({"kappa_raw": 10 * kappa, "kappa_standardised": kappa**0 * 10})
    slowest["steps_raw"] = 100 * kappa**power
    slowest["steps_standardised"] = 100.0
    rows = []
    for data, won in ((c.DIGITS, wider), (c.SCALED, scaled_wider)):
        for name in (data, f"{data}, standardised"):
            for arm in (u.PLAIN, u.NORMALISED, u.ONE_RATE):
                if arm == u.ONE_RATE and name != data:
                    continue
                works = 2 + 2 * won * (arm == u.NORMALISED)
                for seed in range(seeds):
                    for k, rate in enumerate(c.RATES):
                        arrives = k < works
                        rows.append(
                            {"data": name, "arm": arm, "seed": seed, "rate": rate}
                            | {"excess": 0.01 if arrives else np.inf, "steps": 5.0 if arrives else np.inf}
                            | {"turning": turning if (arm == u.PLAIN and name == data) else 0.0}
                        )
    covariances = pd.DataFrame({"size": 3, "kappa": 100.0, "standardised": 100 * ratio}, index=range(120))
    covariances = covariances.assign(**dict.fromkeys(("a11", "a12", "a13", "a22", "a23", "a33"), 1.0))
    return {
        "conditions": pd.DataFrame(conditions),
        "slowest": slowest,
        "rates": pd.DataFrame(rows),
        "covariances": covariances,
    }


@pytest.mark.parametrize(
    ("change", "failed", "overall"),
    [
        ({}, set(), HOLDS),
        ({"drop": 3.0}, {f"{c.DIGITS}: {c.DROP}", f"{c.SCALED}: {c.DROP}"}, MIXED),
        ({"power": 0.5}, {c.LAW}, MIXED),
        (
            {"scaled_wider": 0.0},
            {f"{c.SCALED}: {c.WIDER}", f"{c.SCALED}, standardised: {c.WIDER}"},
            MIXED,
        ),
        ({"ratio": 1.5}, {c.ALWAYS}, HOLDS),
        ({"ratio": 4.0}, {c.ALWAYS, c.BOUND}, HOLDS),
    ],
)
def test_judge(verdicts, change, failed, overall):
    found = verdicts(c.C42, planted(**({"turning": 0.5} | change)))
    assert {name for name, verdict in found.items() if verdict == FAILS} == failed
    assert found["all"] == overall


def test_jitter_is_context(verdicts):
    found = verdicts(c.C42, planted(turning=0.0))
    assert {found[name] for name in found if name.startswith(c.TURNS)} == {FAILS}
    assert found["all"] == HOLDS


def test_decades_count_the_rates_that_work():
    wide = c.decades(planted(wider=2.5)["rates"])
    assert (wide.loc[c.DIGITS][u.NORMALISED] - wide.loc[c.DIGITS][u.PLAIN]).eq(2.5).all()
    assert wide.loc[f"{c.DIGITS}, standardised"][u.ONE_RATE].isna().all()
