"""Rules driven by hand, and the objectives in closed form that they are driven on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losslab.engine import train
from losslab.lecture.driving import drive, drive_torch, member_errors, path_of, pulled
from losslab.lecture.section_6_3.convergence import METHODS, iterations, power_of_kappa, theory
from losslab.lecture.section_6_3.landscapes import Bowls, Softmax, Surface
from losslab.rules import GD, AdaGrad, Newton
from losslab.tasks import digits, function_task, logistic_regression, rosenbrock, supervised


def test_a_drive_is_what_the_engine_does_on_the_same_function() -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    run = train(
        function_task(rosenbrock, start), AdaGrad(lr=0.1), steps=7, dtype="float64", record=[], progress=False
    )
    surface = Surface(rosenbrock.f)
    path = path_of(drive(AdaGrad(lr=0.1), surface.gradient, start[None], 7))
    assert path.shape == (8, 1, 2)
    assert torch.allclose(path[-1, 0], run.points["x"][0], rtol=1e-12, atol=0)


def test_a_drive_may_begin_later() -> None:
    steps = [move.step for move in drive(GD(lr=0.1), lambda x, t: x * t, torch.ones(1, 1), 2, first=3)]
    assert steps == [3, 4]


def test_members_of_a_torch_optimizer_keep_their_own_rates() -> None:
    lr = torch.tensor([0.1, 0.2, 0.1])
    path = drive_torch(torch.optim.SGD, {"lr": lr}, lambda x, t: torch.ones_like(x), torch.zeros(3, 2), 2)
    assert path[-1, :, 0].tolist() == pytest.approx([-0.2, -0.4, -0.2])


def test_an_error_is_seen_in_the_member_that_has_it() -> None:
    a = torch.ones(3, 2, 2, dtype=torch.float64)
    b = a.clone()
    b[1, 1, 0] += 0.5
    assert member_errors(a, b) == [0.0, pytest.approx(1 / 3)]


def test_gradients_of_a_random_problem_depend_on_the_point_and_the_step() -> None:
    gradient, start = pulled(2, 3, 5, seed=0)
    assert not torch.equal(gradient(start, 0), gradient(start, 1))
    assert not torch.equal(gradient(start, 0), gradient(2 * start, 0))
    assert torch.equal(pulled(2, 3, 5, seed=0)[1], start)


def test_bowls_have_the_spectrum_and_derivatives_they_say() -> None:
    bowls = Bowls.of([10.0, 1000.0], [0, 1], dimension=6, spread=1.0)
    values = torch.linalg.eigvalsh(bowls.A)
    assert values[:, 0].numpy() == pytest.approx([1, 1])
    assert values[:, -1].numpy() == pytest.approx([10, 1000])
    assert torch.allclose((bowls.A @ bowls.stiff[:, :, None])[:, :, 0], bowls.L[:, None] * bowls.stiff)
    x = bowls.start.clone().requires_grad_()
    (g,) = torch.autograd.grad(bowls.value(x).sum(), x)
    assert torch.allclose(g, bowls.gradient(bowls.start))
    assert bool((bowls.value(bowls.centre) == 0).all())


def test_crossings_count_updates_and_tell_of_levels_never_reached() -> None:
    bowls = Bowls.of([5.0], [3], dimension=2)
    found = bowls.crossings(GD(lr=2 / (bowls.mu + bowls.L)), [1.0 + 1e-9, 1e-3, 1e-300], limit=50)
    assert found[0, 0] == 0
    # In two dimensions both components shrink by exactly (kappa - 1)/(kappa + 1).
    assert found[1, 0] == np.ceil(np.log(1e-3) / (2 * np.log(4 / 6)))
    assert found[2, 0] == np.inf
    assert bowls.crossings(Newton(), [1e-12], limit=1)[0, 0] == 1


def test_softmax_regression_has_the_derivatives_of_autograd_and_of_the_engine() -> None:
    x, y = digits().train.all()
    x, y = x[:60, 20:26], y[:60] % 3
    problem = Softmax.of(x, y, ridge=0.1)
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(2, problem.parameters, generator=generator, dtype=torch.float64)
    surface = Surface(problem.value)
    assert torch.allclose(problem.gradient(point), surface.gradient(point), rtol=1e-12, atol=1e-14)
    assert torch.allclose(problem.hessian(point), surface.hessian(point), rtol=1e-12, atol=1e-14)
    plain = Softmax.of(x, y, ridge=0.0)
    task = supervised(logistic_regression(6, 3), (x, y))
    run = train(task, GD(lr=0.0), steps=1, dtype="float64", record=1, progress=False)
    weight, bias = run.points["weight"], run.points["bias"]
    flat = torch.cat([weight, bias[:, :, None]], dim=2).flatten(1)
    assert float(plain.value(flat)) == pytest.approx(run.history["loss"].iloc[0], rel=1e-12)


def test_iterations_lie_below_theory_s_worst_case_and_close_to_it() -> None:
    runs = iterations(["gradient descent", "Newton"], [10.0, 100.0], [0, 1], levels=(1e-4, 1e-12))
    assert len(runs) == 2 * 2 * 2 * 2
    descent = runs[(runs.method == "gradient descent") & (runs.level == 1e-12)]
    assert (descent.iterations <= np.ceil(descent.theory)).all()
    assert (descent.iterations >= 0.7 * descent.theory).all()
    assert (runs[runs.method == "Newton"].iterations == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_theory_counts_the_contraction(method: str) -> None:
    shrink = METHODS[method].contraction(100.0)
    steps = theory(method, 100.0, 1e-6)
    assert steps == 1 if shrink == 0 else shrink ** (2 * steps) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("power", "noise", "verdict"),
    [(0.5, 0.02, "holds"), (0.53, 0.01, "does not hold"), (0.515, 0.01, "mixed")],
)
def test_a_power_of_kappa_is_fitted_to_all_runs(power: float, noise: float, verdict: str) -> None:
    kappa = np.repeat([1e2, 1e3, 1e4, 1e5], 30)
    counts = 1000 * kappa**power * np.exp(noise * np.tile([-1.0, 0.0, 1.0], 40))
    finding = power_of_kappa("power", kappa, counts, theory=0.5)
    assert str(finding.verdict) == verdict
    assert finding.interval[0] <= finding.estimate <= finding.interval[1]
    assert finding.n == 120
