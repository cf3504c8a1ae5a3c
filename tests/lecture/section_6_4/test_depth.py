"""C35: moments of units, a small run, and the judge on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import depth as d
from losslab.tasks import digits, mlp

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


@pytest.mark.parametrize("seed", range(4))
def test_moments_are_those_of_numpy(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, 3 + seed)) @ rng.standard_normal((3 + seed, 3 + seed)) + 5
    found = d.moments(torch.from_numpy(x))
    cov = np.cov(x.T, bias=True)
    assert np.allclose(found.mean, x.mean(0))
    assert np.allclose(found.variance, cov.diagonal())
    assert found.kappa == pytest.approx(np.linalg.cond(cov), rel=1e-6)


def test_dead_and_dependent_units():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 3)))
    dead = torch.cat([x, torch.zeros(40, 1)], dim=1)
    assert d.moments(dead).kappa == pytest.approx(d.moments(x).kappa)
    assert d.moments(dead).variance[-1] == 0
    assert d.moments(torch.cat([x, x[:, :1] + x[:, 1:2]], dim=1)).kappa == np.inf
    assert np.isnan(d.moments(torch.ones(5, 2)).kappa)


def test_layers_are_what_the_next_layer_gets():
    network = mlp(3, 5, 4, 2, activation="tanh")()
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    kept = d.layers(network, x)
    seen = []
    hooks = [
        part.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
        for part in network
        if isinstance(part, nn.Linear)
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    assert len(kept) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, seen, strict=True))


def test_small_run(verdicts, stored):
    tables = d.evidence(Lab(), d.Sizes(12, 2, 2, 2, 300), digits(raw=True))
    table = stored(tables)["layers"]
    white = table[(table.scaling == "whitened") & (table.layer == 0)]
    assert np.allclose(white["high"], 1)
    assert set(table.layer) == {0, 1, 2}
    assert len(table) == 3 * 2 * 2 * 2 * 3
    found = verdicts(d.C35, tables)
    assert len(found) == 7


def planted(off=1.0, kappa=100.0, bad_seeds=0, seeds=10):
    rows = [
        {"state": state, "seed": seed, "layer": layer, "activation": activation, "scaling": scaling}
        | {
            "off": off * (layer > 0) * (seed >= bad_seeds),
            "kappa": kappa if layer else 1.0,
            "mean": 0.1,
            "low": 0.1,
        }
        | {"middle": 0.5, "high": 2.0, "constant": 0.0, "accuracy": 0.9}
        for state in d.STATES
        for seed in range(seeds)
        for layer in range(4)
        for activation in d.ACTIVATIONS
        for scaling in d.SCALINGS
    ]
    return {"layers": pd.DataFrame(rows)}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, HOLDS),
        ({"off": 0.4}, FAILS),
        ({"kappa": 5.0}, FAILS),
        ({"kappa": np.inf}, HOLDS),
        ({"bad_seeds": 1}, UNDECIDED),
        ({"bad_seeds": 9}, FAILS),
    ],
)
def test_judge(verdicts, change, verdict):
    assert set(verdicts(d.C35, planted(**change)).values()) == {verdict}


def test_one_layer_that_stays_white_is_enough_to_fail(verdicts):
    tables = planted()
    tables["layers"].loc[lambda t: (t.layer == 2) & (t.state == "trained"), "off"] = 0.1
    assert verdicts(d.C35, tables)["all"] == FAILS


def test_the_first_layer_does_not_count(verdicts):
    tables = planted()
    tables["layers"].loc[lambda t: t.layer < 2, "off"] = 0.0
    assert verdicts(d.C35, tables)["all"] == HOLDS
