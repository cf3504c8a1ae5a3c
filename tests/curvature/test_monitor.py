"""The monitor: every column against its definition, limits by simulation, its cost, its discretion."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import losslab
from losslab.curvature import Hessian
from losslab.curvature.monitor import CurvatureMonitor
from losslab.curvature.stability import limit_of, limit_of_torch
from losslab.engine import Objective, Points
from losslab.rules import (
    GD,
    AdaGrad,
    Adam,
    AdaMax,
    Momentum,
    Nesterov,
    RMSProp,
    Rule,
    make,
)
from losslab.tasks import function_task, half_mse, linear_regression, mlp, quadratic, supervised

EIGENVALUES = [1.0, 4.0, 10.0]


def amplitude(rule: Rule, curvature: float, steps: int = 400) -> float:
    x = {"x": torch.ones(1, 1, dtype=torch.float64)}
    state = rule.init(x)
    seen = []
    for step in range(steps):
        x, state = rule.update({"x": curvature * x["x"]}, state, x, step)
        seen.append(float(x["x"].abs()))
    return max(seen[-20:])


@pytest.mark.parametrize(
    "rule",
    [
        GD(lr=0.1),
        Momentum(lr=0.1, beta=0.8),
        Momentum(lr=0.1, beta=0.8, dampening=0.5),
        Momentum(lr=0.1, beta=0.8, variant="sutskever"),
        Nesterov(lr=0.1, beta=0.8),
    ],
    ids=lambda rule: f"{rule.name} {getattr(rule, 'variant', '')}",
)
def test_a_rule_is_stable_up_to_its_limit_and_no_further(rule: Rule) -> None:
    points = Points({"x": torch.ones(1, 1)}, {})
    limit = limit_of(rule, rule.init(points.weights), points, 0)
    assert limit is not None
    assert limit.metric is None
    assert amplitude(rule, 0.97 * limit.most.item()) < 1e-2
    assert amplitude(rule, 1.03 * limit.most.item()) > 10


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adams_limit_at_a_frozen_metric(beta1: float) -> None:
    rule = Adam(lr=0.1, beta1=beta1, beta2=0.999, eps=0.0)
    points = Points({"x": torch.ones(1, 1, dtype=torch.float64)}, {})
    state = rule.init(points.weights)
    state["v"]["x"] += 4.0
    limit = limit_of(rule, state, points, 100_000)
    assert limit is not None
    assert limit.metric is not None
    assert limit.metric.item() == pytest.approx(2.0)
    assert limit.most.item() == pytest.approx(2 * (1 + beta1) / (1 - beta1) / 0.1)
    # With the metric frozen Adam is averaged momentum: m = b m + (1-b) g, x -= lr m / D.
    for share, stable in ((0.97, True), (1.03, False)):
        x, m = 1.0, 0.0
        for _ in range(2000):
            m = beta1 * m + (1 - beta1) * share * limit.most.item() * 2.0 * x
            x -= 0.1 * m / 2.0
        assert (abs(x) < 1e-2) == stable


def test_which_limits_are_not_known() -> None:
    points = Points({"x": torch.ones(1, 2)}, {})
    for rule in (AdaMax(), AdaGrad(variant="dual"), make("newton"), losslab.rules.RMSProp(centred=True)):
        assert limit_of(rule, rule.init(points.weights), points, 1) is None
    assert limit_of("torch", {}, points, 1) is None
    for rule in (AdaGrad(), RMSProp(variant="inside"), RMSProp(), Adam(variant="lecture")):
        state = rule.init(points.weights)
        _, state = rule.update({"x": points["x"]}, state, points.weights, 0)
        assert limit_of(rule, state, points, 1) is not None


def bowl() -> Any:
    return function_task(quadratic(EIGENVALUES))


def test_columns_on_a_quadratic() -> None:
    monitor = CurvatureMonitor(every=1)
    losslab.train(
        bowl(),
        GD(lr=[0.05, 0.15]),
        seeds=2,
        steps=5,
        dtype="float64",
        watch=monitor,
        record=monitor.when,
        progress=False,
    )
    table = monitor.table
    assert table.step.tolist() == [k for k in range(1, 6) for _ in range(2)]
    np.testing.assert_allclose(table.sharpness, 10, rtol=1e-3)
    np.testing.assert_allclose(table.preconditioned, table.sharpness)
    np.testing.assert_allclose(table.limit, [40, 2 / 0.15] * 5)
    np.testing.assert_allclose(table.ratio, table.sharpness / table.limit)
    assert table.noise.isna().all()  # no data, no noise
    q = quadratic(EIGENVALUES)
    x = torch.tensor([q.start], dtype=torch.float64)
    for k in range(5):
        x = x - 0.05 * x @ q.A
        g = x @ q.A
        rayleigh = float(((g @ q.A) * g).sum() / (g * g).sum())
        row = table[(table.step == k + 1) & (table.member == 0)]
        assert row.critical.item() == pytest.approx(rayleigh, rel=0.02)
        assert row.alpha.item() == pytest.approx(0.05 * rayleigh - 1, rel=1e-6)


@pytest.mark.parametrize(
    "rule", [Adam(lr=0.01), RMSProp(lr=0.01), AdaGrad(lr=0.05)], ids=lambda rule: rule.name
)
def test_preconditioned_sharpness_equals_the_dense_one(rule: Rule) -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = supervised(mlp(3, 4, 1, activation="tanh"), (x, x[:, :1] * x[:, 1:2]), criterion=half_mse)
    monitor = CurvatureMonitor(every=1, tol=1e-6)
    run = losslab.train(
        task,
        rule,
        seeds=3,
        steps=7,
        batch_size=60,
        dtype="float64",
        watch=monitor,
        record=monitor.when,
        progress=False,
    )
    limit = limit_of(run.rule, run.state, run.points, 7)
    assert limit is not None
    assert limit.metric is not None
    root = limit.metric.rsqrt()
    dense = Hessian(Objective(task), run.points).dense()
    scaled = root[:, :, None] * dense * root[:, None, :]
    last = monitor.table[monitor.table.step == 7]
    np.testing.assert_allclose(last.preconditioned, torch.linalg.eigvalsh(scaled)[:, -1], rtol=1e-5)
    np.testing.assert_allclose(last.sharpness, torch.linalg.eigvalsh(dense)[:, -1], rtol=1e-5)
    assert (last.critical <= last.preconditioned * 1.3).all()


def test_the_noise_scale_of_linear_regression() -> None:
    task = linear_regression(4096, 2, noise=1.0, dtype=torch.float64)
    points = Points.from_modules([task.model()]).map(lambda w: w + 2.0)
    objective = Objective(task)
    x, y = task.train.all()  # type: ignore[union-attr]
    each = (x @ points["0.weight"][0].T - y) * x
    exact = float(each.var(0).sum() / each.mean(0).square().sum())
    monitor = CurvatureMonitor()
    monitor.objective = objective
    slope = objective.gradient(points)[1].matrix()
    found = [float(monitor._noise(points, slope))]
    for k in range(10):
        order = torch.randperm(4096, generator=torch.Generator().manual_seed(k))
        monitor.objective = objective.on((x[order], y[order]))
        found.append(float(monitor._noise(points, slope)))
    assert np.mean(found) == pytest.approx(exact, rel=0.4)


def loop(optimizer_of: Any, monitor: bool) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(32, 3, dtype=torch.float64)

    def loss(m: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (m(batch) - batch[:, :1]).square().mean()

    watch = CurvatureMonitor.attached(model, loss, x, every=2) if monitor else None
    optimizer = optimizer_of(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
        if watch is not None:
            before = (
                copy.deepcopy(model.state_dict()),
                torch.get_rng_state(),
                [p.grad for p in model.parameters()],
            )
            watch.after_step(optimizer)
            assert all(
                torch.equal(a, b)
                for a, b in zip(before[0].values(), model.state_dict().values(), strict=True)
            )
            assert torch.equal(before[1], torch.get_rng_state())
            assert all(p.grad is g for p, g in zip(model.parameters(), before[2], strict=True))
            assert model.training
    return model, watch


@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 20),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), 30),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True), 15),
        (lambda p: torch.optim.Adam(p, lr=0.1), 380),
        (lambda p: torch.optim.AdamW(p, lr=0.1), 380),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), 20),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), 20),
        (lambda p: torch.optim.Adamax(p, lr=0.1), np.nan),
    ],
)
def test_a_loop_of_ones_own_is_watched_and_left_alone(optimizer: Any, limit: float) -> None:
    watched, monitor = loop(optimizer, True)
    plain, _ = loop(optimizer, False)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))
    assert monitor.steps == [1, 3, 5]
    np.testing.assert_allclose(monitor.table.limit, limit)
    assert (monitor.table.sharpness > 0).all()


def test_torch_and_losslab_agree_on_the_metric() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.Adam([p], lr=0.1)
    weights, rule = {"x": p.detach()[None].clone()}, Adam(lr=0.1)
    state = rule.init(weights)
    for step in range(4):
        g = p.detach() ** 3 + step
        p.grad = g.clone()
        optimizer.step()
        weights, state = rule.update({"x": g[None]}, state, weights, step)
    ours, theirs = limit_of(rule, state, Points(weights, {}), 4), limit_of_torch(optimizer, [p])
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours.metric, theirs.metric)
    assert (
        limit_of_torch(torch.optim.Adam([{"params": [p]}, {"params": [nn.Parameter(p.detach())]}]), [p])
        is None
    )


def test_training_is_the_same_with_a_monitor_and_members_may_diverge() -> None:
    task = linear_regression(64, 3, dtype=torch.float64)
    told: dict[str, Any] = {"seeds": 2, "steps": 400, "batch_size": 64, "dtype": "float64", "progress": False}
    monitor = CurvatureMonitor(every=50)
    rule = GD(lr=[0.1, 1e9])
    watched = losslab.train(task, rule, watch=monitor, record=monitor.when, **told)
    plain = losslab.train(task, rule, **told)
    assert torch.equal(watched.points["0.weight"][0], plain.points["0.weight"][0])
    assert plain.diverged[1] > 0
    late = monitor.table[monitor.table.step > int(plain.diverged[1])]
    assert late.member.unique().tolist() == [0]
    np.testing.assert_allclose(late.sharpness, 1.0, rtol=0.02)


def test_the_budget_is_kept_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from losslab.curvature import monitor as module

    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monitor = CurvatureMonitor(budget=0.1)
    looks = []
    for step in range(1000):
        if monitor.when(step):
            looks.append(step)
            start = clock[0]
            clock[0] += 5.0  # a look takes as long as five steps
            monitor.rows.append({"step": step})
            monitor._pay(start)
        clock[0] += 1.0
        if len(looks) > 1:
            assert monitor.overhead <= 0.1 + 1e-9
    assert looks[0] == 0
    assert 15 <= len(looks) <= 20


def test_a_later_look_starts_from_the_last_eigenvector() -> None:
    torch.manual_seed(1)
    model = nn.Linear(40, 1, bias=False).double()
    x = torch.randn(100, 40, dtype=torch.float64)
    monitor = CurvatureMonitor.attached(model, lambda m, b: m(b).square().mean(), x, every=1)
    counts = []
    for _ in range(3):
        monitor.after_step(torch.optim.SGD(model.parameters(), lr=0.1))
        counts.append(monitor.operator.products)
    assert counts[1] < counts[0]


def test_bad_settings() -> None:
    with pytest.raises(losslab.LosslabError, match="budget is 0 and every is None: pass positive numbers"):
        CurvatureMonitor(budget=0)
    with pytest.raises(losslab.LosslabError, match=r"make it by CurvatureMonitor\.attached"):
        CurvatureMonitor().after_step()
