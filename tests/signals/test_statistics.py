"""Moments, percentiles, histograms, saturated and dead units: against numpy, planted, and in bad cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from losslab.errors import LosslabError
from losslab.signals import (
    dead,
    describe,
    flow,
    histogram,
    moments,
    percentiles,
    saturated,
    update_ratio,
)
from losslab.signals.activations import of_module
from losslab.signals.statistics import CACHED, by_unit, unit_moments
from losslab.tasks.models import ACTIVATIONS

SHAPES = st.sampled_from(
    [((3, 7), -1), ((3, 7, 5), -1), ((2, 4, 6, 5), -1), ((2, 4, 3, 5, 5), 2), ((1, 9, 3, 4), 2)]
)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3


@given(SHAPES, st.integers(0, 99))
def test_moments_are_numpys(case: tuple[tuple[int, ...], int], seed: int) -> None:
    shape, axis = case
    x = values(shape, seed)
    told = moments(x, axis)
    units = by_unit(x, axis).numpy()
    flat = x.flatten(1).numpy()
    np.testing.assert_allclose(told["mean"], flat.mean(1), rtol=1e-12)
    np.testing.assert_allclose(told["std"], flat.std(1), rtol=1e-12)
    np.testing.assert_allclose(told["unit_std"], np.sqrt(units.var(2).mean(1)), rtol=1e-12)
    mean, variance = unit_moments(x, axis)
    np.testing.assert_allclose(mean, units.mean(2), rtol=1e-12)
    np.testing.assert_allclose(variance, units.var(2), rtol=1e-12)
    assert units.shape[1] == (1 if len(shape) == 2 else shape[axis])


def test_constant_units_are_found_at_any_scale_and_offset() -> None:
    x = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    x[0, :, 1] = 0.7
    x[0, :, 3] = 0.0
    for scale in (1e-6, 1.0, 1e6):
        assert moments(scale * x)["constant"].tolist() == [0.5, 0.0]
    single = moments(torch.ones(1, 1, 4))
    assert bool(single["constant"].isnan())
    assert bool(single["unit_std"].isnan())
    x[1, 0, 0] = torch.nan
    assert bool(moments(x)["constant"][1].isnan())


@given(SHAPES, st.integers(0, 99))
def test_percentiles_are_numpys(case: tuple[tuple[int, ...], int], seed: int) -> None:
    x = values(case[0], seed)
    which = (0, 2, 15, 50, 85, 100)
    wanted = np.percentile(x.flatten(1).numpy(), which, axis=1).T
    np.testing.assert_allclose(percentiles(x, which), wanted, rtol=1e-12)


def test_percentiles_of_a_sample_repeat_and_keep_nan() -> None:
    x = torch.rand(3, 100, 100, generator=torch.Generator().manual_seed(0))
    some = percentiles(x, sample=2000)
    assert torch.equal(some, percentiles(x.transpose(1, 2).contiguous().transpose(1, 2), sample=2000))
    assert not torch.equal(some, percentiles(x, sample=2000, seed=1))
    error = some - torch.tensor([0.02, 0.15, 0.5, 0.85, 0.98])
    assert float(error.abs().max()) < 4 * 0.5 / 2000**0.5
    assert torch.equal(some[1], percentiles(x[1:2], sample=2000)[0])  # a member alone
    x[2] = torch.nan
    assert percentiles(x, sample=50).isnan().all(1).tolist() == [False, False, True]
    assert percentiles(torch.tensor([[4.0]]), (15, 50)).tolist() == [[4.0, 4.0]]
    with pytest.raises(LosslabError, match="from 0 to 100"):
        percentiles(x, (101,))


def test_histograms_count_everything_finite() -> None:
    x = values((3, 40, 6), 0)
    x[1, 0, 0], x[2] = torch.inf, torch.nan
    told = histogram(x, 20)
    assert told.counts.sum(1).tolist() == [240.0, 239.0, 0.0]
    wanted, _ = np.histogram(x[0].numpy(), told.edges.numpy())
    np.testing.assert_array_equal(told.counts[0], wanted)
    assert (told.density[0] * told.edges.diff()).sum().item() == pytest.approx(1.0)
    clipped = histogram(x[:1], 4, (2.9, 3.1))
    assert clipped.counts.sum() == 240
    assert histogram(torch.ones(1, 5), 3).counts.tolist() == [[0.0, 5.0, 0.0]]
    with pytest.raises(LosslabError, match="low < high"):
        histogram(x, 4, (1.0, 1.0))


def test_layers_together_are_layers_alone() -> None:
    """Of several shapes, one of them larger than what is passed over at once; and of a single example."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 900)).double()
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    seen = flow(net, lambda m, b: m(b).square().mean(), x)
    assert seen.outputs["4"].numel() > CACHED
    told = describe(seen, (2, 50, 50), sample=100, seed=3)
    for name in seen.layers:
        forward, backward = told[name, "forward"], told[name, "backward"]
        wanted = moments(seen.outputs[name]) | {"saturated": saturated(seen, name), "dead": dead(seen, name)}
        for k, values in wanted.items():
            torch.testing.assert_close(forward[k], values, equal_nan=True)
        torch.testing.assert_close(
            torch.stack([forward["p2"], forward["p50"]], 1), percentiles(seen.outputs[name], (2, 50), 100, 3)
        )
        flat = seen.gradients[name].flatten(1)
        torch.testing.assert_close(backward["std"], flat.std(1, correction=0))
    assert percentiles(x[None], (50, 50)).shape == (1, 2)
    one = describe(flow(net, lambda m, b: m(b).square().mean(), x[:1]))
    assert bool(one["0", "forward"]["unit_std"].isnan())
    assert bool(one["0", "forward"]["std"] > 0)


# -- saturated and dead --------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Gives an activation's input directly: ``f(x + shift)``."""

    def __init__(self, activation: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift.double())
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.shift)


def seen_through(activation: nn.Module, shift: list[float], spread: float = 0.1) -> Any:
    x = torch.linspace(-spread, spread, 21, dtype=torch.float64)[:, None].expand(21, len(shift))
    return flow(Shifted(activation, torch.tensor(shift)), lambda m, b: m(b).mean(), x)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in ("identity", "relu", "leaky_relu")])
def test_flat_where_the_slope_is_below_a_tenth_of_the_largest(name: str) -> None:
    activation = of_module(ACTIVATIONS[name]())
    assert activation is not None
    s = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    h = 1e-6
    slope = (activation.apply(s + h) - activation.apply(s - h)) / (2 * h)
    limit = s.abs() > 3 if name == "sigmoid" else slope.abs() < 0.1 * slope.abs().max()
    near = (slope.abs() - 0.1 * slope.abs().max()).abs() < 1e-3
    assert bool((activation.flat(s) == limit)[~near].all())
    wide = seen_through(ACTIVATIONS[name](), [0.0], spread=6.0)
    assert saturated(wide, "act").item() == pytest.approx(
        activation.flat(wide.inputs["act"]).double().mean().item()
    )


def test_planted_saturation_and_death() -> None:
    tanh = seen_through(nn.Tanh(), [0.0, 5.0, -5.0, 0.0])
    assert saturated(tanh, "act").tolist() == [0.5]
    assert dead(tanh, "act").tolist() == [0.5]
    edge = seen_through(nn.Tanh(), [1.818])  # 1 - tanh^2 = 0.1 at 1.8184
    assert 0.3 < saturated(edge, "act").item() < 0.7
    assert dead(edge, "act").item() == 0.0
    relu = seen_through(nn.ReLU(), [-1.0, 1.0, 0.0, -1.0, -2.0])
    assert dead(relu, "act").tolist() == [pytest.approx(0.6)]
    assert bool(saturated(relu, "act").isnan())
    leaky = seen_through(nn.LeakyReLU(), [-1.0, 1.0])
    assert dead(leaky, "act").item() == 0.0
    other = flow(nn.Linear(2, 2), lambda m, b: m(b).mean(), torch.ones(3, 2))
    assert bool(dead(other, "Linear").isnan())


def test_a_dead_channel_is_dead_at_every_place() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)).double()
    with torch.no_grad():
        net[0].bias[:] = torch.tensor([0.0, -100.0, 0.0, -100.0])
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    seen = flow(net, lambda m, b: m(b).square().mean(), x)
    assert dead(seen, "1").tolist() == [0.5]
    assert seen.layers["1"].unit_axis == 2
    assert seen.layers["3"].unit_axis == -1


# -- weights -------------------------------------------------------------------------------------------


def test_update_ratios() -> None:
    before = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "b": torch.tensor([[1.0], [2.0]])}
    after = {"w": torch.tensor([[3.0, 4.5], [1.0, 0.0]]), "b": torch.tensor([[1.0], [4.0]])}
    told = update_ratio(before, after, steps=2)
    assert told["w"].tolist() == [pytest.approx(0.05), torch.inf]
    assert told["b"].tolist() == [0.0, 0.5]


def test_description_has_every_layer_and_direction() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 3)).double()
    x = torch.randn(8, 4).double()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    seen = flow(net, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (x, y))
    told = describe(seen, (15, 50), sample=None)
    assert [place for place in told if place[1] == "weight"] == [
        ("0", "weight"),
        ("1", "weight"),
        ("3", "weight"),
    ]
    assert set(told["2", "forward"]) >= {"mean", "std", "unit_std", "p15", "p50", "saturated", "dead"}
    g = seen.weight_gradients["3.weight"]
    weight = told["3", "weight"]
    assert weight["norm"].item() == pytest.approx(g.norm().item())
    assert weight["gradient_ratio"].item() == pytest.approx((g.norm() / net[3].weight.norm()).item())
    assert weight["std"].item() == pytest.approx(g.std(correction=0).item())
    assert weight["mean"].item() == pytest.approx(g.mean().item(), abs=1e-12)
    assert told["3", "backward"]["std"].item() == pytest.approx(seen.gradients["3"].std(correction=0).item())
    silent = describe(flow(net, lambda m, b: m(b[0]).mean(), (x, y), gradients=False))
    assert {direction for _, direction in silent} == {"forward", "weight"}
