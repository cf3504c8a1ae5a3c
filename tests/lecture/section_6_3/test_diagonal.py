"""C21: turned quadratics, AdaGrad's sums, and the judge on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_3 import diagonal as d

HOLDS, FAILS = "holds", "does not hold"


def test_turned_quadratics_have_the_spectrum_and_the_start_is_turned_with_them():
    plain, start = d.tilted(0, range(3))
    assert torch.equal(plain.diagonal(), torch.tensor([1.0, d.KAPPA], dtype=torch.float64))
    for angle in d.ANGLES:
        matrix, turned = d.tilted(angle, range(3))
        wanted = torch.tensor([1.0, d.KAPPA], dtype=torch.float64)
        torch.testing.assert_close(torch.linalg.eigvalsh(matrix), wanted, rtol=1e-9, atol=0)
        heights = (turned * (turned @ matrix)).sum(1), (start * (start @ plain)).sum(1)
        torch.testing.assert_close(*heights, rtol=1e-9, atol=0)


def test_arrivals_of_known_methods():
    one, _ = d.arrivals("diagonal Newton", 0, [1.0, 0.5], [0, 1], 100)
    assert one.tolist() == [1.0, 10.0]  # (1/2)^(2 t) <= 1e-6
    assert d.arrivals("gradient descent", 0, [1e-6], [0], 20)[0].tolist() == [np.inf]
    assert d.arrivals("gradient descent", 45, [1.0], [0], 200)[0].tolist() == [np.inf]


def test_small_run(stored):
    kept = stored(d.evidence(Lab(), d.Sizes((0, 45), 3, 300, 40, 2, 2, 60)))
    ranks = kept["ranks"]
    assert len(ranks) == 2 * 2 * 3
    assert ranks["rank"].between(-1, 1).all()
    assert (kept["growth"].groupby(["network", "seed"]).root.diff().dropna() >= 0).all()
    assert set(kept["quadratics"].arm) == set(d.GRIDS)


def planted(rank=0.8, aligned=50.0, turned=2.0, power=0.5, lost=False):
    seeds = np.arange(10)
    ranks = [
        pd.DataFrame({"network": n, "seed": seeds, "matrix": m, "rank": rank + 0.001 * seeds})
        for n in ("softmax regression", "tanh network")
        for m in d.MATRICES
    ]
    quadratics = []
    for angle in d.ANGLES:
        gain = turned if angle == 45 else aligned
        for arm, steps in (
            ("gradient descent", 4000.0),
            ("AdaGrad", 4000.0 / gain),
            ("diagonal Newton", 4.0),
        ):
            rows = pd.DataFrame({"start": seeds, "steps": steps, "arm": arm, "angle": angle, "lr": 0.1})
            quadratics.append(rows.assign(at_edge=False, limit=10_000))
            if lost and angle == 45 and arm == "AdaGrad":
                quadratics[-1]["steps"] = np.inf
    growth = [
        pd.DataFrame({"network": "n", "seed": seed, "step": t, "root": t**power}, index=[0])
        for seed in seeds
        for t in (10, 100, 1000)
    ]
    tables = {"ranks": ranks, "quadratics": quadratics, "growth": growth}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


@pytest.mark.parametrize(
    ("change", "headline", "overall"),
    [
        ({}, HOLDS, HOLDS),
        ({"rank": 0.1}, FAILS, "mixed"),
        ({"rank": 0.3}, "mixed", "mixed"),
        ({"rank": 0.1, "aligned": 2.0}, FAILS, FAILS),
        ({"lost": True}, HOLDS, HOLDS),
    ],
)
def test_judge(verdicts, change, headline, overall):
    found = verdicts(d.C21, planted(**change))
    assert (found[d.RANKS], found["all"]) == (headline, overall)


def test_controls(verdicts):
    assert verdicts(d.C21, planted(turned=48.0))[d.TURNED] == FAILS
    assert verdicts(d.C21, planted())[d.TURNED] == HOLDS
    assert verdicts(d.C21, planted())[d.ROOT] == HOLDS
    assert verdicts(d.C21, planted(power=0.1))[d.ROOT] == FAILS
