"""C33 and C34: the scalings, the runs at small sizes, and the judges on planted evidence."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.section_6_4 import input_scaling as s
from losslab.lecture.section_6_4 import inputs as c
from losslab.tasks import digits

HOLDS, FAILS, MIXED, UNDECIDED = "holds", "does not hold", "mixed", "undecided"
ARMS = (s.RAW, s.CENTRED, s.STANDARD, s.SHIFTED, s.PCA, s.ZCA, s.WHITE)


@pytest.mark.parametrize("arm", ARMS)
def test_each_scaling_does_what_it_is_called(arm):
    x = digits(raw=True).train.all()[0].double()
    z = s.fitted(arm, x)(x)
    mean, cov = z.mean(0), torch.cov(z.T, correction=0)
    varies = cov.diagonal() > 1e-12
    wanted = {s.RAW: x.mean(0), s.SHIFTED: torch.full((64,), s.SHIFT).double()}.get(
        arm, torch.zeros(len(mean))
    )
    assert torch.allclose(mean, wanted.double(), atol=1e-9)
    if arm in (s.RAW, s.CENTRED):
        assert torch.allclose(cov, torch.cov(x.T, correction=0))
    elif arm in (s.STANDARD, s.SHIFTED):
        assert torch.allclose(cov.diagonal()[varies], torch.ones(int(varies.sum())).double())
    elif arm == s.WHITE:
        spectrum = torch.linalg.eigvalsh(cov)
        assert torch.allclose(spectrum[spectrum > 1e-9], torch.ones(int(varies.sum())).double())
    else:
        spectrum = torch.linalg.eigvalsh(cov)
        assert spectrum[-1] < 1 < 2 * spectrum[spectrum > 1e-9][0]
        assert z.shape[1] == (60 if arm == s.PCA else 64)


def test_targets():
    assert s.signs(torch.tensor([2, 0]), 3).tolist() == [[-1, -1, 1], [1, -1, -1]]


def test_regressions_count_what_the_spectrum_says():
    counts, curves = s.regressions([s.CENTRED, s.STANDARD, s.WHITE], seeds=2, target=0.05)
    assert (counts.steps == counts.predicted).all()
    assert (counts[counts.arm == s.WHITE].steps == 1).all()
    assert np.allclose(counts[counts.arm == s.WHITE].kappa, 1)
    assert set(curves.seed) == {0, 1}
    assert (curves.groupby("arm").excess.min() <= 0.05).all()


def test_one_step_is_enough_on_whitened_data_only():
    table = s.one_step(30)
    assert (table.whitened < 1e-12).all()
    assert (table.standardised > 1e-3).all()


@pytest.fixture
def bench():
    return s.Bench(s.NETWORKS[0], (64, 8, 10), share=0.95, steps=20, seeds=2, looks=10)


def test_a_small_race(bench, monkeypatch, stored):
    monkeypatch.setattr(s, "TUNING_SEEDS", (1000,))
    monkeypatch.setattr(s, "GRID", tuple(s.rates(1e-3, 1e-1)))
    tables = stored(s.race(bench, [s.STANDARD, s.PCA]))
    networks, training = tables["networks"], tables["training"]
    assert len(networks) == 4
    assert networks.groupby("arm").lr.nunique().eq(1).all()
    assert training.step.max() == bench.steps
    first = training[training.train_loss <= training.target].groupby(["arm", "seed"]).step.min()
    steps = networks.set_index(["arm", "seed"]).steps
    assert (steps[first.index] == first).all()
    assert np.isinf(steps.drop(first.index)).all()


def test_the_target_is_a_share_of_the_best_constant(bench):
    task, target = s.scaled_task(bench, s.STANDARD)
    y = task.train.all()[1]
    constant = task.loss(lambda x: y.mean(0).expand(len(x), -1), task.train.all())
    assert target == pytest.approx(0.95 * float(constant), rel=1e-5)


def planted(ratios, network=s.NETWORKS[0], accuracies=(0.9, 0.9), edge=False):
    """Runs in which an arm takes ``ratios[arm]`` times ten steps; regressions in which the law is exact."""
    seeds = np.arange(10)
    networks = [
        pd.DataFrame({"seed": seeds, "steps": 10 * ratio * (1 + seeds / 100)}).assign(
            network=network, arm=arm, lr=0.1, at_edge=edge and arm == s.RAW, least=10,
            test_accuracy=accuracies[arm != s.STANDARD] + seeds / 1e4,
        )
        for arm, ratio in ratios.items()
    ]  # fmt: skip
    training = [
        pd.DataFrame({"step": [0, 5, 10], "train_loss": [2.0, 1.0, 0.1]}).assign(
            arm=arm, seed=seed, network=network, target=0.5
        )
        for arm in ratios
        for seed in (0, 1)
    ]
    arms = (s.RAW, s.CENTRED, s.STANDARD, s.SHIFTED, s.WHITE)
    linear = [
        pd.DataFrame({"seed": seeds, "kappa": 10.0**power, "arm": arm}).assign(
            predicted=10.0**power + seeds, steps=10.0**power + seeds
        )
        for power, arm in zip((4, 3, 1, 3, 0), arms, strict=True)
    ]
    descent = [
        pd.DataFrame({"step": [1, 10, 100], "excess": [1.0, 0.1, 0.001]}).assign(arm=arm, seed=seed)
        for arm in arms
        for seed in (0, 1)
    ]
    return {
        "networks": pd.concat(networks, ignore_index=True),
        "training": pd.concat(training, ignore_index=True),
        "linear": pd.concat(linear, ignore_index=True),
        "descent": pd.concat(descent, ignore_index=True),
        "one_step": pd.DataFrame({"whitened": [1e-15] * 120, "standardised": [0.5] * 120}),
    }


@pytest.mark.parametrize(
    ("ratio", "verdict", "overall"),
    [(8.0, HOLDS, HOLDS), (1.0, FAILS, MIXED), (1.3, FAILS, MIXED), (math.inf, HOLDS, HOLDS)],
)
def test_judge_c33(verdicts, ratio, verdict, overall):
    found = verdicts(c.C33, planted({s.RAW: ratio, s.CENTRED: 1.0, s.STANDARD: 1.0}))
    assert found[c.compared(s.NETWORKS[0], s.RAW, s.STANDARD)] == verdict
    assert found[c.THEORY] == found[c.RATIO] == HOLDS
    assert found["all"] == overall


def test_centring_alone_does_not_decide(verdicts):
    found = verdicts(c.C33, planted({s.RAW: 4.0, s.CENTRED: 4.0, s.STANDARD: 1.0}))
    assert found[c.compared(s.NETWORKS[0], s.RAW, s.CENTRED)] == FAILS
    assert found["all"] == HOLDS


def test_when_neither_arm_arrives_there_is_no_ratio(verdicts):
    found = verdicts(c.C33, planted({s.RAW: math.inf, s.CENTRED: 1.0, s.STANDARD: math.inf}))
    assert found[c.compared(s.NETWORKS[0], s.RAW, s.STANDARD)] == FAILS


def test_a_wrong_prediction_fails_the_law(verdicts):
    tables = planted({s.RAW: 8.0, s.CENTRED: 1.0, s.STANDARD: 1.0})
    tables["linear"]["steps"] = tables["linear"]["predicted"] ** 1.5
    assert verdicts(c.C33, tables)[c.THEORY] == FAILS


def test_an_edge_is_told():
    tables = planted({s.RAW: 8.0, s.CENTRED: 1.0, s.STANDARD: 1.0}, edge=True)
    assert f"edge of the grid: {s.RAW}" in c.C33.judge(tables)[0].note


@pytest.mark.parametrize(
    ("fast", "whitened", "accuracies", "expected"),
    [
        (1.0, 1e-15, (0.9, 0.88), (FAILS, HOLDS, HOLDS, MIXED)),
        (0.5, 1e-15, (0.9, 0.9), (HOLDS, HOLDS, FAILS, HOLDS)),
        (1.0, 1e-3, (0.9, 0.9), (FAILS, FAILS, FAILS, FAILS)),
    ],
)
def test_judge_c34(verdicts, fast, whitened, accuracies, expected):
    tables = planted({s.STANDARD: 1.0, s.PCA: fast, s.ZCA: fast}, accuracies=accuracies)
    tables["one_step"]["whitened"] = whitened
    found = verdicts(c.C34, tables)
    names = (
        c.compared(s.NETWORKS[0], s.STANDARD, s.PCA),
        c.ONE_STEP,
        f"{s.NETWORKS[0]}: {c.GENERAL}",
        "all",
    )
    assert tuple(found[name] for name in names) == expected


def test_five_seeds_are_enough_on_mnist_only(verdicts):
    tables = planted({s.RAW: 8.0, s.CENTRED: 1.0, s.STANDARD: 1.0}, network=s.NETWORKS[1])
    tables["networks"] = tables["networks"][tables["networks"].seed < 5].assign(least=5)
    name = c.compared(s.NETWORKS[1], s.RAW, s.STANDARD)
    assert verdicts(c.C33, tables)[name] == HOLDS
    tables["networks"]["least"] = 10
    assert verdicts(c.C33, tables)[name] == UNDECIDED
