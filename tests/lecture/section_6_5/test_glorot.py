"""C61: the start and the training at small sizes, and the judge on planted evidence."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.errors import LosslabError
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_5 import glorot as g
from losslab.lecture.section_6_5 import glorot_start as start
from losslab.lecture.section_6_5 import glorot_training as training
from losslab.lecture.section_6_5.networks import drawn


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "GRIDS", {name: grid[:5] for name, grid in training.GRIDS.items()})
        where = dataclasses.replace(training.setting(Lab()), width=8, epochs=1, seeds=2, tuning_seeds=1)
        runs, tuning = training.table_1(where, lambda told: None)
    return {
        "start": start.at_start((40, 60, 60, 60, 10), draws=3, examples=30),
        "jacobians": start.jacobians(40, 3, draws=2),
        "runs": runs,
        "tuning": tuning,
    }


def test_small_run(verdicts, small) -> None:
    found = verdicts(g.C61, small)
    assert found["tanh: the normalised start has the smaller test error"] == "undecided"  # two seeds
    assert small["runs"].groupby("arm").seed.nunique().to_dict() == dict.fromkeys(training.ARMS, 2)
    assert small["runs"].error.between(0, 100).all()


def test_the_start_by_the_recursion(small) -> None:
    rows = small["start"].groupby(["init", "layer"]).mean()
    assert np.allclose(rows["std"], rows.std_theory, rtol=0.12)
    assert np.allclose(rows.gradient, rows.gradient_theory, rtol=0.2)


def test_theory_in_the_linear_limit() -> None:
    """Small weights: the signal falls by the root of n Var w, gradients by as much on their way down."""
    std, gradient = start.theory("standard", [50, 50, 50, 50, 10])
    assert np.allclose(np.diff(np.log(gradient)), 0.5 * math.log(3), atol=0.25)
    assert np.allclose(np.diff(np.log(std)), -0.5 * math.log(3), atol=0.25)


def test_jacobians_against_autograd() -> None:
    table = start.jacobians(6, 3, draws=1)
    row = table[(table.init == "normalised") & (table.layer == 2)].iloc[0]
    from losslab.engine.randomness import generator

    a = torch.randn(6, generator=generator(0, "jacobians normalised"))
    weights = [drawn(start.INITIALISATIONS["normalised"], (6, 6), 1, seed=k)[0][0] for k in range(3)]
    for w in weights[:2]:
        a = torch.tanh(w @ a)
    jacobian = torch.autograd.functional.jacobian(lambda a: torch.tanh(weights[2] @ a), a)
    assert row.jacobian == pytest.approx(float(torch.linalg.svdvals(jacobian).mean()), rel=1e-5)
    assert math.isnan(row.weights)
    first = table[(table.init == "normalised") & (table.layer == 1)].iloc[0]
    values = torch.linalg.svdvals(weights[1])
    assert first.weights == pytest.approx(float(values.mean()), rel=1e-5)
    assert first.squares == pytest.approx(float(weights[1].square().sum()) / 6, rel=1e-5)


def test_members_start_from_their_arms_initialisation() -> None:
    runs = training.Runs("tanh", dataclasses.replace(training.setting(Lab()), width=8))
    points = runs._start([("tanh", 0.1, 3), ("tanh N", 0.1, 3), ("tanh N", 0.2, 3)])
    first = points.weights["0.weight"]
    assert torch.equal(first[1], first[2])
    assert float(first[0].abs().max()) <= 1 / math.sqrt(64)
    assert float(first[1].abs().max()) > 1 / math.sqrt(64)


def test_settings_of_the_profiles(tmp_path, monkeypatch) -> None:
    quick, full = (training.setting(Lab(profile)) for profile in ("quick", "full"))
    assert (quick.name, quick.delta, quick.least) == ("digits", 0.5, 10)
    assert full.width > quick.width
    assert "digits stand in" in training.setting(Lab("paper")).note
    lab = Lab("paper", data=tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = training.setting(lab)
    assert "no GPU" in small.note
    assert (small.name, small.delta, small.device) == ("MNIST", 0.05, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = training.setting(lab)
    assert (whole.width, whole.device) == (1000, "cuda")
    with pytest.raises(LosslabError, match="parquet"):
        whole.task(lambda: torch.nn.Linear(784, 10))


def planted(tanh=2.0, sigmoid=50.0, softsign=2.0, shrunk=1.0, jacobian=0.8, weight_gradient=1.0):
    """Errors of the standard starts above the normalised ones; ratios to theory; Jacobians."""
    wiggle = np.linspace(-0.1, 0.1, 10)
    errors = {"softsign": 3 + softsign, "softsign N": 3, "tanh": 3 + tanh, "tanh N": 3}
    errors["sigmoid"] = 6 + sigmoid
    told = {"data": "digits", "note": "small", "least": 10, "delta": 0.5, "lr": 0.1, "paper": 1.7}
    runs = [
        pd.DataFrame({"arm": arm, "seed": range(10), "error": error + k * wiggle}).assign(**told)
        for k, (arm, error) in enumerate(errors.items(), start=1)
    ]
    tuning = pd.DataFrame({"arm": list(errors), "lr": 0.1, "score": 1.0, "at_edge": False})
    layers = [
        {"init": init, "draw": draw, "layer": layer, "std": shrunk * 0.5**layer * (1 + 0.001 * draw),
         "std_theory": 0.5**layer, "gradient": 0.5 ** (5 - layer) * (1 + 0.001 * draw),
         "gradient_theory": 0.5 ** (5 - layer), "weight_gradient": weight_gradient ** (5 - layer)}
        for init in ("standard", "normalised") for draw in range(5) for layer in range(1, 6)
    ]  # fmt: skip
    jacobians = [
        {"init": init, "draw": draw, "layer": layer, "jacobian": value + 0.001 * draw,
         "weights": 1.0, "weights_theory": 1.0 + 0.001 * draw, "squares": 1.0}
        for init, value in (("standard", 0.5), ("normalised", jacobian))
        for draw in range(3) for layer in (1, 2)
    ]  # fmt: skip
    return {
        "runs": pd.concat(runs, ignore_index=True),
        "tuning": tuning,
        "start": pd.DataFrame(layers),
        "jacobians": pd.DataFrame(jacobians),
    }


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, set()),
        ({"tanh": -1.0}, {"tanh: the normalised start has the smaller test error"}),
        ({"sigmoid": -2.0}, {"sigmoid has the largest test error"}),
        ({"softsign": -1.0}, {g.SOFTSIGN}),
        (
            {"shrunk": 0.8},
            {f"{init}: the recursion gives every layer's spread" for init in ("standard", "normalised")},
        ),
        ({"jacobian": 0.7}, {"normalised: the Jacobians' mean singular value is the paper's 0.8"}),
        ({"weight_gradient": 0.7}, {"standard: weight gradients hardly do"}),
    ],
)
def test_judge(verdicts, change, failing) -> None:
    found = verdicts(g.C61, planted(**change))
    overall = found.pop("all")
    assert {name for name, verdict in found.items() if verdict == "does not hold"} == failing
    assert overall == ("holds" if failing <= {g.SOFTSIGN} else "mixed")


def test_edges_of_the_search_are_told() -> None:
    tables = planted()
    tables["tuning"].loc[0, "at_edge"] = True
    assert "the best rate of softsign lay at the edge" in g.judge(tables)[0].note
