"""C51 and C52: probes in miniature, the identity, and the judges on planted evidence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED

from losslab.layers import xavier
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import probes as p
from losslab.lecture.section_6_4.first_order import AT_LOSS, AT_STEP, C52, CONTEXT
from losslab.lecture.section_6_4.lipschitz import C51, IDENTITY, RELATIVE, identities, sides
from losslab.tasks import mlp

NETWORK = "net"
RANGE = f"range of the loss along the gradient, {NETWORK}"
SCALED = f"{RELATIVE}, {NETWORK}"
STEP, LOSS = f"{AT_STEP}, {NETWORK}", f"{AT_LOSS}, {NETWORK}"


@pytest.fixture(scope="module")
def small():
    first = p.settings(Lab(seeds=2))[0]
    return replace(
        first, name="small", factory=xavier().on(mlp(64, 6, 10)), steps=8, every=4, batch=32,
        grid=tuple(p.rates(0.1, 10.0)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def tables(small):
    found = p.run([small])
    return {"identity": identities(5), "probes": found.summary, "tuning": found.tuning}


def test_miniature_run(verdicts, tables):
    found = verdicts(C51, tables)
    assert found[IDENTITY] == "undecided"  # five instances
    verdicts(C52, tables)
    rows = tables["probes"]
    assert len(rows) == 2 * 2 * 2 * 3  # arms, seeds, kinds of step, probes
    assert rows["updates"].unique().tolist() == [0, 4, 8]
    assert np.isfinite(rows[["loss", "variation", "first_order_error", "train_loss"]]).all(axis=None)
    assert (rows["high"] - rows["low"]).to_numpy() == pytest.approx(rows["variation"].to_numpy())
    raw = rows[rows["kind"] == "raw"]
    assert np.isfinite(raw[["beta", "curvature", "gradient_change"]]).all(axis=None)


def test_arms_start_alike_and_are_probed_on_one_batch(small, tables):
    start = tables["probes"].query("updates == 0 and kind == 'raw'").set_index(["arm", "seed"])
    assert start.loc["standard", "train_loss"].nunique() == 2
    task = p.task_of(small, p.STANDARD)
    again = small.batch_at(p.task_of(small, p.NORMALISED), "probe", 4)
    assert torch.equal(small.batch_at(task, "probe", 4)[0], again[0])
    assert not torch.equal(small.batch_at(task, "probe", 8)[0], again[0])


def test_probes_of_a_profile_are_made_once(monkeypatch):
    calls = []
    monkeypatch.setattr(p, "_KEPT", {})
    monkeypatch.setattr(p, "run", lambda *a: calls.append(a) or "found")
    assert p.probes(Lab(seeds=3)) == p.probes(Lab(seeds=3)) == "found"
    assert p.probes(Lab(seeds=4)) == "found"
    assert len(calls) == 2


def test_the_paper_profile_has_a_convolutional_network(tmp_path):
    names = [s.name for s in p.settings(Lab("paper", data=tmp_path))]
    assert any("CIFAR-10" in name for name in names)
    assert len(p.settings(Lab("full", data=tmp_path))) == 2


@pytest.mark.parametrize("seed", range(10))
def test_identity_sides_agree(seed):
    left, right, _ = sides(torch.Generator().manual_seed(seed))
    torch.testing.assert_close(left, right, rtol=1e-9, atol=0)


# -- planted evidence -----------------------------------------------------------------------------------


def planted(variation=3.0, error=3.0, scaled=3.0, error_at_loss=None, seeds=10, lost=()):
    """Probes in which the standard network's range and error are so many times those with batch norm."""
    rows = []
    for seed in range(seeds):
        for updates in range(0, 220, 20):
            noise = 1 + 0.01 * math.sin(7 * seed + updates)
            for arm in ("standard", "batch norm"):
                plain = arm == "standard"
                # Both descend alike, or the standard network twice as slowly.
                pace = 1.0 if error_at_loss is None or not plain else 0.5
                loss = math.exp(-0.02 * updates * pace)
                slope = 0.2 if error_at_loss is None else 0.2 * loss**error_at_loss
                gone = plain and seed in lost and updates > 0
                for kind in ("raw", "relative"):
                    ratio = (variation if kind == "raw" else scaled) if plain else 1.0
                    value = {
                        "variation": 0.1 * ratio * noise,
                        "first_order_error": slope * (error if plain else 1.0) * noise,
                        "curvature": 2.0 * ratio,
                        "gradient_change": 0.5 * ratio,
                        "beta": 3.0 * ratio,
                        "loss": loss,
                        "low": 0.5 * loss,
                        "high": 1.1 * loss,
                        "train_loss": loss,
                    }
                    value = dict.fromkeys(value, math.nan) if gone else value
                    rows.append(
                        {"network": NETWORK, "arm": arm, "seed": seed, "updates": updates, "kind": kind}
                        | {"lr": 0.1, "least": 10}
                        | value
                    )
    tuning = pd.DataFrame(
        {"network": NETWORK, "arm": ["standard", "batch norm"], "lr": 0.1, "score": 1.0}
    ).assign(at_edge=[False, True], chosen=True)
    errors = pd.DataFrame({"error": np.full(200, 1e-15), "factor": 1.0})
    return {"identity": errors, "probes": pd.DataFrame(rows), "tuning": tuning}


def test_smoother_in_every_way(verdicts):
    assert set(verdicts(C51, planted()).values()) == {HOLDS}
    assert set(verdicts(C52, planted()).values()) == {HOLDS}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"variation": 0.5}, {RANGE: FAILS, SCALED: HOLDS, IDENTITY: HOLDS, "all": MIXED}),
        ({"variation": 1.5}, {RANGE: FAILS, "all": MIXED}),
        ({"scaled": 0.5}, {RANGE: HOLDS, SCALED: FAILS, "all": HOLDS}),
        ({"seeds": 9}, {RANGE: UNDECIDED}),
        # An arm that diverges is as rough as can be.
        ({"lost": range(10)}, {RANGE: HOLDS, "all": HOLDS}),
    ],
)
def test_ranges_decide(verdicts, change, wanted):
    found = verdicts(C51, planted(**change))
    assert {name: found[name] for name in wanted} == wanted


def test_a_broken_identity_fails(verdicts):
    tables = planted()
    tables["identity"].loc[3, "error"] = 1e-6
    assert verdicts(C51, tables)[IDENTITY] == FAILS


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"error": 1.5}, {STEP: MIXED, LOSS: MIXED, "all": MIXED}),
        ({"error": 0.7}, {STEP: MIXED, LOSS: MIXED, "all": MIXED}),
        ({"error": 0.3}, {STEP: FAILS, LOSS: FAILS, "all": FAILS}),
        ({"variation": 0.3}, {STEP: HOLDS, f"{CONTEXT['beta']}, {NETWORK}": FAILS, "all": HOLDS}),
        # The error falls with the loss, and batch norm is only further on: nothing left at equal loss.
        ({"error": 1.0, "error_at_loss": 2.0}, {STEP: HOLDS, LOSS: MIXED, "all": MIXED}),
        ({"lost": range(10)}, {STEP: HOLDS, LOSS: HOLDS}),
    ],
)
def test_errors_decide(verdicts, change, wanted):
    found = verdicts(C52, planted(**change))
    assert {name: found[name] for name in wanted} == wanted


def test_rates_at_the_edge_are_told():
    notes = [f.note for f in C51.judge(planted()) if f.name == RANGE]
    assert "batch norm 0.1 (edge of the grid)" in notes[0]


# -- what the judges are made of ------------------------------------------------------------------------


def test_log_ratio_of_what_is_not_finite():
    a, b = pd.Series([2.0, math.nan, math.inf, 1.0]), pd.Series([1.0, 1.0, math.nan, math.inf])
    assert p.log_ratio(a, b).tolist() == [pytest.approx(math.log(2)), math.inf, 0.0, -math.inf]


def curves(losses_a, losses_b, f, g):
    rows = [
        {"seed": 0, "arm": arm, "updates": k, "train_loss": loss, "e": math.nan if loss != loss else h(loss)}
        for arm, losses, h in (("standard", losses_a, f), ("batch norm", losses_b, g))
        for k, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows)


def test_equal_loss_interpolates_power_laws_exactly():
    rows = curves([4.0, 2.0, 0.5], [3.0, 1.0, 0.1], lambda x: 6 * x, lambda x: 2 * x)
    assert p.at_equal_loss(rows, "e")[0] == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ([4.0, 3.0], [2.0, 1.0], math.nan),
        ([4.0, math.nan], [2.0, 1.0], math.inf),
        ([4.0, 3.0], [2.0, math.nan], -math.inf),
        ([4.0, math.nan], [2.0, math.nan], math.nan),
    ],
)
def test_no_loss_in_common(first, second, wanted):
    found = p.at_equal_loss(curves(first, second, abs, abs), "e")[0]
    assert found == pytest.approx(wanted, nan_ok=True)
