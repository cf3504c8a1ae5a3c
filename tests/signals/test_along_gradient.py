"""Smoothness along the gradient: closed forms, invariances, and nothing left behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losslab.engine import Objective, Points, train
from losslab.errors import LosslabError
from losslab.signals.along_gradient import EXAMPLES, RAW, RELATIVE, SmoothnessRecorder, smoothness
from losslab.tasks import Task, function_task, mlp, quadratic, supervised


def classified(examples=40, inputs=5, classes=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(examples, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (examples,), generator=generator)


def networks(make, members):
    made = []
    for seed in range(members):
        torch.manual_seed(seed)
        made.append(make().double())
    return made


def of(make, members=3, **options):
    task = supervised(make, classified())
    return Objective(task, **options), Points.from_modules(networks(make, members))


@pytest.mark.parametrize("seed", range(5))
def test_closed_forms_on_quadratics(seed):
    rng = np.random.default_rng(seed)
    spectrum = np.sort(rng.uniform(-2, 5, size=4))
    problem = quadratic(spectrum.tolist(), seed=seed)
    task = function_task(problem)
    starts = torch.from_numpy(rng.standard_normal((6, 4)))
    base = Points.from_modules([task.model().double()])
    points = base.at(starts)
    found = smoothness(Objective(task), points)
    a = (problem.A + problem.A.T) / 2
    g = starts @ a
    rayleigh = ((g @ a) * g).sum(1) / g.square().sum(1)
    for walk in found.walks:
        torch.testing.assert_close(walk.curvature, rayleigh)
        torch.testing.assert_close(walk.beta, (g @ a).norm(dim=1) / g.norm(dim=1))
        rates = walk.length / g.norm(dim=1, keepdim=True)
        torch.testing.assert_close(walk.error, rates * rayleigh.abs()[:, None] / 2)
        torch.testing.assert_close(walk.change, rates * (g @ a).norm(dim=1, keepdim=True))
        there = starts[:, None] - rates[:, :, None] * g[:, None]
        torch.testing.assert_close(walk.losses, ((there @ a) * there).sum(-1) / 2)
    raw, relative = found.walks
    torch.testing.assert_close(raw.length, torch.tensor(RAW).double() * g.norm(dim=1, keepdim=True))
    torch.testing.assert_close(
        relative.length, torch.tensor(RELATIVE).double() * starts.norm(dim=1, keepdim=True)
    )


def test_variation_counts_the_start_and_what_overflows():
    task = Task(nn_scalar, lambda m, _: m.weight.sum().pow(2) / 2, None)
    points = Points({"weight": torch.tensor([[[1.0]], [[2.0]]], dtype=torch.float64)}, {})
    found = smoothness(Objective(task), points, raw=[0.5, 1.0, 2.5], relative=[])
    # From w the losses are w^2/2 at 0, a quarter of it, zero, and (1.5 w)^2 / 2.
    assert found.summary.variation.tolist() == pytest.approx([1.125, 4.5])
    far = smoothness(Objective(task), points, raw=[1e200], relative=[])
    assert far.summary.variation.tolist() == [math.inf, math.inf]


def nn_scalar():
    return nn.Linear(1, 1, bias=False)


class Invariant(nn.Module):
    """Every weight is followed by batch norm without affine: the loss does not see the weights' scale."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8, affine=False, eps=1e-30), nn.Tanh(),
            nn.Linear(8, 3, bias=False), nn.BatchNorm1d(3, affine=False, eps=1e-30),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("scale", [0.1, 7.0])
def test_relative_steps_do_not_see_the_scale_of_the_weights(scale):
    objective, points = of(Invariant)
    scaled = Points({n: scale * w for n, w in points.weights.items()}, points.buffers)
    a, b = (smoothness(objective, p, modes=["batch"]).walks for p in (points, scaled))
    torch.testing.assert_close(a[1].losses, b[1].losses)
    torch.testing.assert_close(a[1].variation, b[1].variation)
    torch.testing.assert_close(a[1].error, b[1].error)
    torch.testing.assert_close(a[0].gradient_norm, scale * b[0].gradient_norm)
    assert (a[0].losses - b[0].losses).abs().max() > 1e-4
    torch.testing.assert_close(a[1].beta, scale**2 * b[1].beta)


@pytest.mark.parametrize("make", [mlp(5, 8, 3, batch_norm=True), mlp(5, 8, 8, 3)], ids=["bn", "plain"])
def test_a_member_in_a_population_is_the_member_alone(make):
    objective, points = of(make, 4, execution="stacked")
    together = smoothness(objective, points).table.set_index("member")
    for i in range(4):
        alone = smoothness(Objective(objective.task, execution="loop"), points.select([i])).table
        mine = together.loc[i].reset_index(drop=True)
        for column in ("length", "loss", "gradient_change", "first_order_error"):
            np.testing.assert_allclose(alone[column], mine[column], rtol=1e-8, atol=1e-12)


def test_everything_is_measured_by_hand_in_both_modes():
    make = mlp(5, 8, 3, batch_norm=True)
    objective, points = of(make, 1)
    x, y = classified()
    points.buffers["1.running_var"] += 0.7
    rates = [0.1, 0.3]
    found = smoothness(objective, points, raw=rates, relative=[0.01]).table
    for mode in ("batch", "running"):
        module = points.load_into(make().double(), 0).train(mode == "batch")
        weights = list(module.parameters())

        def at(module=module, weights=weights):
            loss = F.cross_entropy(module(x), y)
            return loss.item(), torch.autograd.grad(loss, weights)

        _, g = at()
        rows = found[(found["mode"] == mode) & (found.kind == "raw")].reset_index()
        for k, eta in enumerate(rates):
            with torch.no_grad():
                for w, d in zip(weights, g, strict=True):
                    w.sub_(eta * d)
            loss, after = at()
            with torch.no_grad():
                for w, d in zip(weights, g, strict=True):
                    w.add_(eta * d)
            change = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, g, strict=True)))
            assert rows.loss[k] == pytest.approx(loss, rel=1e-10)
            assert rows.gradient_change[k] == pytest.approx(change, rel=1e-8)


def test_running_statistics_and_weights_stay():
    task = supervised(mlp(5, 8, 3, batch_norm=True), classified())
    population = train(task, "sgd", seeds=2, steps=5, batch_size=10, progress=False, evaluate=None)
    before = {n: t.clone() for n, t in population.points.items()}
    state = torch.get_rng_state()
    smoothness(population)
    assert all(torch.equal(t, before[n]) for n, t in population.points.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_of_a_large_stack_change_nothing(monkeypatch):
    objective, points = of(mlp(5, 8, 3, batch_norm=True))
    whole = smoothness(objective, points).table
    monkeypatch.setattr("losslab.signals.along_gradient._ELEMENTS", 3 * points.members * points.parameters)
    parts = smoothness(objective, points).table
    np.testing.assert_allclose(parts.select_dtypes("number"), whole.select_dtypes("number"), rtol=1e-10)


def test_what_is_not_finite_is_kept_and_stays_with_its_member():
    objective, points = of(mlp(5, 8, 3))
    good = smoothness(objective, points).summary
    points.weights["0.weight"][1] = math.nan
    found = smoothness(objective, points).summary
    lost = found[found.member == 1]
    assert lost[["loss", "gradient_norm", "variation", "beta", "first_order_error"]].isna().all(axis=None)
    pair = [t[t.member != 1].select_dtypes("number") for t in (found, good)]
    np.testing.assert_allclose(*pair, rtol=1e-8)


def test_gradients_and_curvature_on_demand():
    objective, points = of(mlp(5, 8, 3))
    full = smoothness(objective, points).summary
    bare = smoothness(objective, points, gradients=False, curvature=False).summary
    assert bare[["beta", "gradient_change", "curvature"]].isna().all(axis=None)
    for column in ("loss", "variation", "first_order_error", "gradient_norm"):
        np.testing.assert_allclose(bare[column], full[column], rtol=1e-8)


def test_modes_follow_the_network():
    for make, modes in ((mlp(5, 8, 3), ["batch"]), (mlp(5, 8, 3, batch_norm=True), ["batch", "running"])):
        objective, points = of(make)
        found = smoothness(objective, points, raw=[0.1], relative=[])
        assert found.table["mode"].unique().tolist() == modes


def test_recorder_is_the_instrument_at_each_moment():
    task = supervised(mlp(5, 8, 3), classified(200))
    seen = SmoothnessRecorder(settings={"raw": [0.1], "relative": []})
    population = train(
        task, "sgd", seeds=2, steps=7, record=3, batch_size=10, watch=seen, evaluate=None, progress=False
    )
    assert seen.summary.updates.unique().tolist() == [1, 4, 7]
    now = smoothness(population, raw=[0.1], relative=[]).table
    last = seen.table[seen.table.updates == 7].drop(columns="updates").reset_index(drop=True)
    np.testing.assert_allclose(last.select_dtypes("number"), now.select_dtypes("number"), rtol=1e-10)
    assert len(seen.objective.data) == EXAMPLES


BAD = [
    ({"points": None}, "no points"),
    ({"raw": [], "relative": []}, "no steps"),
    ({"raw": [0.1, -0.1]}, "raw steps are"),
    ({"relative": [math.inf]}, "relative steps are"),
    ({"modes": ["train"]}, "no batch-norm policy is named 'train'"),
]


@pytest.mark.parametrize(("change", "told"), BAD)
def test_mistakes_are_told(change, told):
    objective, points = of(mlp(5, 8, 3))
    with pytest.raises(LosslabError, match=told):
        smoothness(objective, **({"points": points} | change))
