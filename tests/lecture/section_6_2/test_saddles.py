"""C14: the five saddles at small sizes, and the judge on planted evidence."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_2 import saddle_functions as f
from losslab.lecture.section_6_2 import saddle_networks as n
from losslab.lecture.section_6_2 import saddles as s
from losslab.lecture.section_6_2.motion import growth_time
from losslab.tasks import mlp

HOLDS, FAILS = "holds", "does not hold"


@pytest.fixture(scope="module")
def tables():
    sizes = s.Sizes(
        runs=20,
        resting=20,
        octopus_runs=3,
        dimensions={2: f.horizon(2)},
        seeds=2,
        linear=20,
        neurons=30,
        plateau=10,
    )
    return s.evidence(Lab(), sizes)


def test_small_run(verdicts, tables):
    found = verdicts(s.C14, tables)
    assert found["all"] == "mixed"
    escapes = tables["escapes"]
    assert np.isinf(escapes[escapes.noise == 0].steps).all()
    assert np.isfinite(escapes[escapes.noise == 1e-3].steps).all()


def test_paths_start_and_end_where_they_are_said_to(tables):
    ends = tables["paths"].groupby("path").last()
    assert ends.loc["GD, y₀ = 0", "y"] == 0
    assert abs(ends.loc["GD, y₀ = 0.1", "y"] - 1) < 1e-6
    assert abs(ends.loc["GD, y₀ = -0.001", "y"] + 1) < 1e-6
    assert (ends.loc[["SGD, run 1", "SGD, run 2"], "y"].abs() > 0.5).all()


def test_symmetric_starts(tables):
    linear = tables["linear"]
    assert (linear[linear.start == "W = 0"].moved == 0).all()
    assert np.allclose(linear[linear.start == "W = 0"].loss, 1)
    neurons = tables["neurons"].groupby("arm").difference
    assert neurons.max()["identical"] == 0
    assert neurons.min()["kicked"] > 0


@pytest.mark.parametrize("hidden", [3, 5, 8])
def test_the_elementwise_network_is_the_ordinary_one(hidden):
    plain = mlp(6, hidden, 4, activation="tanh")().double()
    ours = n.Elementwise(6, hidden, 4).double()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights[n.MATMUL_NAMES[name]])
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), plain(x), rtol=1e-12)


def test_a_kick_is_seen_as_a_difference():
    kicked = n.identical_neurons(seeds=1, steps=0, hidden=3, kick=0.5).set_index("arm").difference
    assert kicked["identical"] == kicked["matrix products"] == 0
    assert kicked["kicked"] > 0.1


def test_the_small_start_is_small_and_on_the_plateau():
    rows = n.plateau([None], seeds=2, steps=2, every=1)
    assert np.allclose(rows.train_loss, math.log(10), atol=1e-3)
    assert np.isinf(n.escape_steps(rows)).all().all()


def test_escape_steps():
    rows = pd.DataFrame(
        {"arm": 4 * ["GD"] + 4 * ["B = 1"], "seed": 2 * [0, 0, 1, 1], "step": 4 * [0, 2]}
    ).assign(train_loss=[2.3, 2.0, 2.3, 2.3, 1.0, 2.3, 2.3, 2.0])
    assert n.escape_steps(rows)["GD"].tolist() == [2, math.inf]
    assert n.escape_steps(rows)["B = 1"].tolist() == [0, 2]


def planted(escaped=1.0, slope=1.0, still=1.0, octopus=1.0, moved=0.0, apart=0.0, saved=0.0, kick=1.0):
    """Evidence in which the given shares of the runs escape, stay, arrive, move, part, and save updates."""
    runs = np.arange(200)
    escapes = [
        pd.DataFrame({"noise": noise, "run": runs, "limit": 999}).assign(
            steps=np.where(runs < escaped * 200, slope * growth_time(1 / noise, 1 + f.RATE), np.inf)
        )
        for noise in f.NOISES
    ]
    rest = np.where(runs < still * 200, np.inf, 9.0)
    escapes.append(pd.DataFrame({"noise": 0.0, "run": runs, "limit": 999, "steps": rest}))
    arrived = {"SGD": octopus, "GD": 1 - octopus}
    octopuses = [
        pd.DataFrame({"dimension": d, "rule": rule, "run": runs, "limit": 999}).assign(
            steps=np.where(runs < share * 200, 100.0, np.inf)
        )
        for d in (5, 10)
        for rule, share in arrived.items()
    ]
    seeds = np.arange(10)
    linear = [
        pd.DataFrame({"rule": "sgd", "start": start, "seed": seeds, "moved": far, "loss": 1 - 0.9 * kick})
        for start, far in (("W = 0", moved), ("kicked", 1.0))
    ]
    neurons = [
        pd.DataFrame({"arm": arm, "seed": seeds, "difference": far, "loss": 1.0})
        for arm, far in (("identical", apart), ("kicked", kick), ("matrix products", 1e-7))
    ]
    steps = np.arange(0, 200, 2)
    plateau = [
        pd.DataFrame({"arm": arm, "seed": seed, "step": steps}).assign(
            train_loss=np.where(steps >= 100 * (1 - saved * (arm != "GD")) + 2 * (seed % 3), 1.0, 2.3)
        )
        for arm in ("GD", "B = 1", "B = 10", "B = 100")
        for seed in seeds
    ]
    path = pd.DataFrame({"path": "GD", "step": range(5), "x": 0.0, "y": np.linspace(0, 1, 5)})
    return {
        "paths": path,
        "escapes": pd.concat(escapes, ignore_index=True),
        "octopus": pd.concat(octopuses, ignore_index=True),
        "linear": pd.concat(linear, ignore_index=True),
        "neurons": pd.concat(neurons, ignore_index=True),
        "plateau": pd.concat(plateau, ignore_index=True),
    }


UNQUALIFIED = {
    "SGD leaves W = 0 of a three-layer linear network",
    "SGD tells identical neurons apart",
    *(f"fewer updates to leave the plateau of a small start, B = {size}" for size in (1, 10, 100)),
}


def failed(found):
    return {name for name, verdict in found.items() if verdict == FAILS}


def test_judge_on_the_expected_picture(verdicts):
    found = verdicts(s.C14, planted())
    assert failed(found) == UNQUALIFIED
    assert {v for name, v in found.items() if name not in UNQUALIFIED and name != "all"} == {HOLDS}
    assert found["all"] == "mixed"


def test_judge_when_noise_always_helps(verdicts):
    assert set(verdicts(s.C14, planted(moved=1.0, apart=1.0, saved=0.4)).values()) == {HOLDS}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"escaped": 0.8}, {"x²/2 − y²/2 + y⁴/4: SGD leaves y = 0"}),
        ({"still": 0.5}, {"gradient descent stays on y = 0"}),
        ({"slope": 1.3}, {"SGD's growth until escape ∝ 1/(η × noise)"}),
        (
            {"octopus": 0.5},
            {
                f"octopus, d = {d}: {name}"
                for d in (5, 10)
                for name in ("SGD passes all saddles", "gradient descent does not, in as many updates")
            },
        ),
        (
            {"kick": 0.0},
            {
                "after a Gaussian kick to the weights it does",
                "after a Gaussian kick to the weights they part",
            },
        ),
    ],
)
def test_judge_fails(verdicts, change, names):
    assert failed(verdicts(s.C14, planted(moved=1.0, apart=1.0, saved=0.4, **change))) == names


def test_the_horizon_of_the_octopus_grows_in_proportion_to_the_saddles():
    assert f.horizon(10) == pytest.approx(2 * f.horizon(5), abs=2)
