"""Searches for critical points: known ones are found, members stand alone, and failure is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losslab import LosslabError
from losslab.curvature.critical import examine
from losslab.curvature.finding import dense, flatten, follow, minimise, placed, refine
from losslab.engine import Objective, Points
from losslab.tasks import (
    Function,
    double_well,
    function_task,
    half_mse,
    linear_regression,
    mlp,
    quadratic,
    rosenbrock,
    saddle,
    supervised,
    teacher_student,
)


def at(objective: Objective, rows: object) -> Points:
    return Points({"x": torch.as_tensor(rows, dtype=torch.float64)}, {})


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_lbfgs_solves_a_quadratic_at_any_scale(scale: float, condition: float) -> None:
    bowl = quadratic(dimension=12, condition=condition, seed=3)
    scaled = Function("bowl", lambda x: scale * bowl.f(x), 12, bowl.start, bowl.domain, (), (), "")
    starts = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = minimise(Objective(function_task(scaled)), at(None, starts), tolerance=1e-9 * scale)
    assert found.converged.all()
    assert found.points["x"].abs().max() < 1e-8
    assert str(found).startswith("5 of 5 searches converged")


def test_lbfgs_on_rosenbrock_takes_few_steps_and_equals_scipys_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    starts = 4 * torch.rand(20, 2, generator=generator, dtype=torch.float64) - 2
    found = minimise(Objective(function_task(rosenbrock)), at(None, starts), tolerance=1e-10)
    assert found.converged.all()
    assert (found.points["x"] - 1).abs().max() < 1e-9
    assert found.steps.max() < 120


def test_a_network_is_brought_to_a_gradient_of_1e_minus_9() -> None:
    task = teacher_student(2, 2, 2, n=60, dtype=torch.float64)
    points = Points.from_modules([task.model() for _ in range(6)])
    found = minimise(Objective(task), points, tolerance=1e-9, steps=4000)
    assert found.converged.sum() >= 5
    assert (found.value <= Objective(task).value(points)).all()


@pytest.mark.parametrize("search", [minimise, flatten, refine, follow])
def test_members_stand_alone(search: object) -> None:
    generator = torch.Generator().manual_seed(2)
    task = supervised(
        mlp(2, 3, 1, activation="tanh"),
        (torch.randn(20, 2, generator=generator, dtype=torch.float64), torch.ones(20, 1).double()),
        criterion=half_mse,
    )
    like = Points.from_modules([task.model().double()] * 4)
    points = like.map(lambda w: torch.randn(w.shape, generator=generator, dtype=w.dtype))
    objective = Objective(task, execution="loop")
    together = search(objective, points, steps=6)  # type: ignore[operator]
    for i in range(4):
        alone = search(objective, points.select([i]), steps=6)  # type: ignore[operator]
        torch.testing.assert_close(
            alone.points.matrix()[0], together.points.matrix()[i], rtol=1e-6, atol=1e-6
        )
        assert alone.steps[0] == together.steps[i]


def test_the_points_given_are_left_alone() -> None:
    objective = Objective(function_task(saddle))
    start = at(objective, [[0.3, 0.2]])
    for search in (minimise, flatten, refine, follow):
        search(objective, start)  # type: ignore[operator]
        assert start["x"].tolist() == [[0.3, 0.2]]


def test_a_vanishing_gradient_is_found_at_minima_and_saddles() -> None:
    objective = Objective(function_task(double_well))
    generator = torch.Generator().manual_seed(3)
    starts = 2.4 * torch.rand(40, 2, generator=generator, dtype=torch.float64) - 1.2
    near = flatten(objective, at(objective, starts), tolerance=1e-6)
    found = refine(objective, near.points, tolerance=1e-12)
    ends = found.points["x"][found.converged]
    assert len(ends) >= 30
    assert ends[:, 1].abs().max() < 1e-9
    assert (ends[:, 0].abs().minimum((ends[:, 0].abs() - 1).abs()) < 1e-9).all()
    kinds = set(examine(objective, found.points.select(found.converged.nonzero().flatten())).kinds)
    assert kinds == {"minimum", "strict saddle"}


def test_newton_converges_quadratically_and_ignores_flat_directions() -> None:
    task = supervised(
        mlp(1, 1, 1, activation="identity", bias=False),
        (torch.ones(1, 1).double(), torch.ones(1, 1).double()),
        criterion=half_mse,
    )  # (ab - 1)^2 / 2, whose minima form a hyperbola
    start = Points(
        {"0.weight": torch.tensor([[[1.3]]]).double(), "2.weight": torch.tensor([[[0.9]]]).double()}, {}
    )
    found = refine(Objective(task), start, tolerance=1e-13)
    assert found.converged.all()
    assert found.steps.max() <= 6
    a, b = found.points.matrix()[0].tolist()
    assert a * b == pytest.approx(1.0, abs=1e-12)
    assert np.hypot(a - 1.3, b - 0.9) < 0.2


def test_following_an_eigenvector_climbs_to_the_pass() -> None:
    objective = Objective(function_task(double_well))
    found = follow(objective, at(objective, [[0.6, 0.2], [-0.3, -0.4]]), index=1)
    assert found.converged.all()
    assert found.points["x"].abs().max() < 1e-9
    down = follow(objective, at(objective, [[0.6, 0.2]]), index=0)
    torch.testing.assert_close(down.points["x"], torch.tensor([[1.0, 0.0]]).double(), atol=1e-8, rtol=0)


def test_a_search_that_did_not_arrive_says_so() -> None:
    objective = Objective(function_task(rosenbrock))
    found = minimise(objective, at(objective, [[-1.2, 1.0]]), steps=3)
    assert not found.converged.any()
    assert str(found).startswith("0 of 1 searches converged in at most 3 steps")


def test_a_member_that_is_not_finite_holds_nobody_up() -> None:
    objective = Objective(function_task(rosenbrock))
    found = minimise(objective, at(objective, [[float("nan"), 1.0], [-1.2, 1.0]]))
    assert found.converged.tolist() == [False, True]


def test_large_networks_are_refused_where_a_hessian_is_decomposed() -> None:
    task = supervised(mlp(64, 60, 10), (torch.ones(4, 64), torch.zeros(4, dtype=torch.int64)))
    points = Points.from_modules([task.model()])
    for search in (refine, follow):
        with pytest.raises(LosslabError, match=r"4510 weights and its Hessian .* use minimise or flatten"):
            search(Objective(task), points)


def test_dense_hessians_of_many_points_and_their_buffers() -> None:
    task = linear_regression(30, 4, condition=10, dtype=torch.float64)
    points = Points.from_modules([task.model() for _ in range(3)])
    x = task.train.all()[0]  # type: ignore[union-attr]
    wanted = (x.T @ x / 30).expand(3, 4, 4)
    torch.testing.assert_close(dense(Objective(task), points), wanted, rtol=1e-10, atol=1e-12)
    held = Points(points.weights, {"b": torch.arange(3.0)})
    assert placed(held, points.matrix()[1:], torch.tensor([1, 2])).buffers["b"].tolist() == [1, 2]
