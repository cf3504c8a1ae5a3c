"""C45: the variance over the company, the noisy data, a small race, and the judge on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.layers import BatchNorm, population_statistics
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import ghosts as g
from losslab.lecture.training import trained
from losslab.rules import SGD
from losslab.tasks import digits

HOLDS, FAILS, MIXED, UNDECIDED = "holds", "does not hold", "mixed", "undecided"


def test_variances_fall_with_the_batch():
    table = g.variances(seeds=2, draws=30, fixed=2, sizes=(8, 128), steps=3)
    middle = table.groupby("m").variance.mean()
    assert 4 < middle[8] / middle[128] < 64
    assert len(table) == 4


def test_the_noisy_digits_have_the_noise_they_say():
    train, validation, test = g.noisy_digits()
    x, y = train.all()
    assert len(x) == g.EXAMPLES
    clean_x, clean_y = digits().train.all()
    place = (x[:, None] == clean_x[None]).all(2).int().argmax(1)
    assert torch.equal(clean_x[place], x)
    assert int((clean_y[place] != y).sum()) == round(g.NOISE * g.EXAMPLES)
    assert set(y.tolist()) == set(range(10))
    assert (len(validation), len(test)) == (297, 500)


def test_all_groups_are_full():
    assert all(g.BATCH % size == 0 for size in g.GROUPS)
    assert g.BATCH <= g.EXAMPLES < 2 * g.BATCH  # one update an epoch


@pytest.mark.parametrize("group", [16, None])
def test_members_are_tested_with_the_statistics_of_all_their_data(group):
    setting = g.Setting(width=5, steps=2, seeds=2)
    found = setting.scores(group, [0.1, 0.1], [0, 1], ["train", "test"])
    population = trained(
        setting.task(group), SGD(lr=0.1), seeds=2, steps=2, batch_size=g.BATCH, drop_last=True
    )
    train, _, test = g.noisy_digits()
    plain = setting.task(None).model()
    for member, network in enumerate(population):
        plain.load_state_dict(network.state_dict())
        alone = population_statistics(plain, train.all()[0], exact=True).eval()
        for name, data in (("train", train), ("test", test)):
            x, y = data.all()
            with torch.no_grad():
                out = alone(x)
            accuracy = float((out.argmax(1) == y).float().mean())
            assert found[f"{name}_accuracy"][member] == pytest.approx(accuracy, abs=2 / len(y))
            loss = float(torch.nn.functional.cross_entropy(out, y))
            assert found[f"{name}_loss"][member] == pytest.approx(loss, rel=1e-3)


def test_arms_differ_in_their_groups_alone():
    setting = g.Setting(width=5, steps=0, seeds=1)
    norms = {
        group: [part for part in setting.task(group).model() if isinstance(part, BatchNorm)]
        for group in (*g.GROUPS, None)
    }
    assert {group: {norm.ghost for norm in found} for group, found in norms.items()} == {
        group: {group} for group in norms
    }
    weights = [trained(setting.task(k), SGD(), seeds=1, steps=0).points["0.weight"] for k in (8, None)]
    assert torch.equal(*weights)


def test_a_run_that_diverges_has_an_infinite_loss():
    found = g.Setting(width=4, steps=3, seeds=1).scores(8, [float("1e38")], [0], ["validation"])
    assert np.isinf(found.validation_loss).all()
    assert (found.validation_accuracy == 0).all()


def test_small_run(verdicts, monkeypatch, stored):
    monkeypatch.setattr(g, "TUNING_SEEDS", (1000,))
    monkeypatch.setattr(g, "GRID", tuple(g.rates(0.1, 10.0)))
    monkeypatch.setattr(g, "GROUPS", (16,))
    monkeypatch.setattr(g, "SIZES", (8, 16, 128, 256, 512))
    tables = g.race(g.Setting(width=6, steps=3, seeds=2), Lab())
    tables |= {"variances": g.variances(2, 10, 1, g.SIZES, steps=1)}
    groups = stored(tables)["groups"]
    assert sorted(groups.group.unique()) == [16, g.BATCH]
    assert len(groups) == 4
    assert verdicts(g.C45, tables)["all"] in (UNDECIDED, MIXED)


def planted(power=-1.0, gain=0.02, gap=0.02, seeds=10):
    """Variances that follow a power of m, and accuracies of groups above those of the whole batch."""
    rng = np.random.default_rng(0)
    variances = [
        {"seed": seed, "m": m, "variance": 3.0 * m**power * float(np.exp(rng.normal(0, 0.01)))}
        for seed in range(seeds)
        for m in g.SIZES
    ]
    groups = [
        {"seed": seed, "group": group, "arm": f"groups of {group}", "lr": 0.1, "at_edge": group == 8}
        | {"test_accuracy": 0.8 + seed / 1e3 + gain * (group < g.BATCH)}
        | {"train_accuracy": 0.95 + (gain - gap) * (group < g.BATCH)}
        for seed in range(seeds)
        for group in (*g.GROUPS, g.BATCH)
    ]
    tuning = [
        {"lr": lr, "score": 0.2, "arm": arm, "at_edge": False} for arm in ("a", "b") for lr in (0.1, 1.0)
    ]
    return {
        "variances": pd.DataFrame(variances),
        "groups": pd.DataFrame(groups),
        "tuning": pd.DataFrame(tuning),
    }


@pytest.mark.parametrize(
    ("change", "law", "better", "overall"),
    [
        ({}, HOLDS, HOLDS, HOLDS),
        ({"power": -0.5}, FAILS, HOLDS, MIXED),
        ({"gain": 0.0}, HOLDS, FAILS, MIXED),
        ({"gain": -0.02}, HOLDS, FAILS, MIXED),
        ({"gain": 0.0, "power": -2.0}, FAILS, FAILS, FAILS),
        ({"seeds": 5}, HOLDS, UNDECIDED, UNDECIDED),
    ],
)
def test_judge(verdicts, change, law, better, overall):
    found = verdicts(g.C45, planted(**change))
    assert (found[g.LAW], found[g.BETTER.format(16)], found["all"]) == (law, better, overall)


def test_the_gap_is_context(verdicts):
    assert verdicts(g.C45, planted(gap=0.03))[g.CLOSER] == HOLDS
    found = verdicts(g.C45, planted(gap=-0.01))
    assert found[g.CLOSER] == FAILS
    assert found["all"] == HOLDS


def test_an_edge_is_told():
    assert "groups of 8 82.45 % at the rate 0.1, at the edge" in g.C45.judge(planted())[1].note
