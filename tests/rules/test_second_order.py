"""What each second-order rule is for: saddles, singular matrices, wrong models, members beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from losslab import LosslabError, Task, train
from losslab.rules import (
    AutoRate,
    CubicNewton,
    DiagonalLM,
    GaussNewton,
    Newton,
    NewtonCG,
    PerturbedGD,
    Rule,
    SaddleFree,
)
from losslab.rules.cubic import cubic_step
from losslab.rules.curvature import backtracked


class Quadratic:
    """``x^T H x / 2`` of each member, as a curvature."""

    def __init__(self, *matrices: Any) -> None:
        self.matrix = torch.stack([torch.as_tensor(m, dtype=torch.float64) for m in matrices])

    def hessian(self) -> Tensor:
        return self.matrix

    gauss_newton = hessian

    def products(self, v: Tensor) -> Tensor:
        return (self.matrix @ v[:, :, None]).squeeze(2)

    gradient = products

    def value(self, x: Tensor) -> Tensor:
        return (x * self.products(x)).sum(1) / 2


class Quartic(Quadratic):
    """``x^2/2 - y^2/2 + y^4/4``, whose saddle is at 0 and whose minima are at y = +-1."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        diagonal = torch.stack([torch.ones_like(x[:, 0]), 3 * x[:, 1] ** 2 - 1], 1)
        self.matrix = torch.diag_embed(diagonal)

    def gradient(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], x[:, 1] ** 3 - x[:, 1]], 1)

    def value(self, x: Tensor) -> Tensor:
        return x[:, 0] ** 2 / 2 - x[:, 1] ** 2 / 2 + x[:, 1] ** 4 / 4


def follow(rule: Rule, start: list[list[float]], steps: int) -> Tensor:
    x = torch.tensor(start, dtype=torch.float64)
    state = rule.init({"x": x})
    for step in range(steps):
        here = Quartic(x)
        new, state = rule.update({"x": here.gradient(x)}, state, {"x": x}, step, here)
        x = new["x"]
    return x


STARTS = [[1.0, 0.1], [-0.5, 0.2], [0.3, -0.01]]


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (SaddleFree(damping=1e-3), 40),
        (CubicNewton(penalty=6.0), 40),
        (NewtonCG(), 40),
        (Newton(variant="searched"), 40),
        (PerturbedGD(lr=0.1, radius=0.1), 300),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_saddle_is_left(rule: Rule, steps: int) -> None:
    end = follow(rule, STARTS, steps)
    if rule.name == "newton":  # downhill, but not away from the saddle: the search only guards descent
        assert (
            Quartic(end).value(end) <= Quartic(end).value(torch.tensor(STARTS, dtype=torch.float64))
        ).all()
        return
    torch.testing.assert_close(end[:, 0], torch.zeros(3, dtype=torch.float64), atol=1e-2, rtol=0)
    torch.testing.assert_close(end[:, 1].abs(), torch.ones(3, dtype=torch.float64), atol=1e-2, rtol=0)


def test_newton_itself_goes_to_the_saddle() -> None:
    assert follow(Newton(), STARTS, 10).abs().max() < 1e-12


@pytest.mark.parametrize("rule", [CubicNewton(penalty=6.0), PerturbedGD(lr=0.1, radius=0.01, seed=3)])
def test_the_saddle_itself_is_left(rule: Rule) -> None:
    end = follow(rule, [[0.0, 0.0]], 300)
    assert end[0, 1].abs() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_the_cubic_step_is_the_global_minimum_of_its_model(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(rng.standard_normal(3) * 10 ** rng.uniform(-2, 2))
    along, penalty = rng.standard_normal(3), 10 ** rng.uniform(-1, 1)
    if seed % 3 == 0:
        along[0] = 0.0  # the hard case, where the lowest eigenvalue is negative and the rest is short
        along *= 1e-3

    def model(d: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(d, axis=-1)
        return d @ along + (d**2) @ values / 2 + penalty / 6 * length**3

    told = (torch.from_numpy(a)[None] for a in (values, along))
    d = cubic_step(*told, torch.tensor([[penalty]], dtype=torch.float64))[0].numpy()
    spread = np.abs(d).max() * rng.uniform(0.1, 3, (20000, 1))
    others = rng.standard_normal((20000, 3)) * spread
    assert model(d) <= model(others).min() + 1e-9 * abs(model(d))
    slope = along + values * d + penalty / 2 * np.linalg.norm(d) * d
    assert np.abs(slope).max() <= 1e-7 * max(np.abs(along).max(), np.abs(values * d).max())


SINGULAR = [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    "rule",
    [
        Newton(damping=0.1),
        Newton(variant="searched", damping=0.1),
        SaddleFree(),
        CubicNewton(),
        GaussNewton(),
        GaussNewton(variant="adaptive"),
        DiagonalLM(),
        NewtonCG(),
        AutoRate(),
    ],
    ids=lambda rule: f"{rule.name} {getattr(rule, 'variant', '')}",
)
def test_only_the_member_whose_matrix_or_gradient_is_not_finite_is_lost(rule: Rule) -> None:
    nan = torch.full((2, 2), torch.nan).tolist()
    curvature = Quadratic(SINGULAR, nan, SINGULAR, SINGULAR)
    x = torch.ones(4, 2, dtype=torch.float64)
    g = torch.ones(4, 2, dtype=torch.float64)
    g[2] = torch.nan
    new, _ = rule.update({"x": g}, rule.init({"x": x}), {"x": x}, 0, curvature)
    assert new["x"].isfinite().all(1).tolist() == [True, False, False, True]
    assert torch.equal(new["x"][0], new["x"][3])


def test_levenberg_marquardt_refuses_a_step_up_and_trusts_a_good_model() -> None:
    class Wrong(Quadratic):
        def value(self, x: Tensor) -> Tensor:  # falls the other way
            return -super().value(x)

    x = {"x": torch.ones(1, 2, dtype=torch.float64)}
    g = {"x": torch.tensor([[2.0, 3.0]], dtype=torch.float64)}
    rule = GaussNewton(damping=1.0, variant="adaptive")
    for kind, moved, damping in ((Wrong, False, 4.0), (Quadratic, True, 0.25)):
        new, state = rule.update(g, rule.init(x), x, 0, kind([[2.0, 0.0], [0.0, 3.0]]))
        assert torch.equal(new["x"], x["x"]) != moved
        assert state["damping"][""].item() == damping


def test_the_running_diagonal_starts_at_the_first_batch_and_forgets() -> None:
    x, g = {"x": torch.zeros(1, 2, dtype=torch.float64)}, {"x": torch.ones(1, 2, dtype=torch.float64)}
    rule = DiagonalLM(lr=1.0, mu=0.0, gamma=0.25)
    state = rule.init(x)
    for step, (diagonal, wanted) in enumerate([(4.0, 4.0), (8.0, 5.0), (0.0, 3.75)]):
        _, state = rule.update(g, state, x, step, Quadratic(torch.diag(torch.tensor([diagonal, 1.0]))))
        assert state["d"][""][0].tolist() == [wanted, 1.0]


def test_the_rate_finds_the_largest_eigenvalue() -> None:
    spectra = [torch.tensor([1.0, 30.0, 100.0]), torch.tensor([0.1, 0.2, -2.0])]
    curvature = Quadratic(*(torch.diag(s) for s in spectra))
    rule, x = AutoRate(lr=0.0, gamma=0.5), {"x": torch.ones(2, 3, dtype=torch.float64)}
    state = rule.init(x)
    for step in range(60):
        _, state = rule.update(x, state, x, step, curvature)
    # An eigenvalue below zero turns psi round at every product: its average is short, but never nothing.
    assert state["psi"][""][0].norm().item() == pytest.approx(100.0, rel=1e-9)
    assert 0 < state["psi"][""][1].norm().item() <= 2.0 + 1e-9


def test_conjugate_gradients_stop_at_negative_curvature() -> None:
    rule = NewtonCG()
    curvature = Quadratic([[2.0, 0.0], [0.0, -1.0]], [[-1.0, 0.0], [0.0, -2.0]], [[2.0, 0.0], [0.0, 50.0]])
    g = torch.tensor([[1.0, 1e-3], [1.0, 0.5], [0.1, 0.2]], dtype=torch.float64)
    d = rule.direction(curvature, g, 0.0)
    assert torch.equal(d[1], -g[1])  # negative at once: the gradient
    assert d[0, 0].item() == pytest.approx(-0.5, rel=1e-5)  # one good step first
    left = curvature.products(d)[2] + g[2]
    assert left.norm() <= min(0.5, g[2].norm().sqrt()) * g[2].norm()


def test_perturbations_wait_and_belong_to_their_seed() -> None:
    x = {"x": torch.zeros(3, 4, dtype=torch.float64)}
    rule = PerturbedGD(radius=1.0, wait=2.0, seed=[0, 1, 0])
    state, moved = rule.init(x), []
    for step in range(6):
        new, state = rule.update(x, state, x, step)
        moved.append(bool(new["x"].any()))
        assert torch.equal(new["x"][0], new["x"][2])
        assert torch.equal(new["x"][0], new["x"][1]) != moved[-1]
    assert moved == [True, False, False, True, False, False]
    steep = {"x": torch.ones(3, 4, dtype=torch.float64)}
    new, _ = rule.update(steep, rule.init(x), x, 0)
    assert torch.equal(new["x"], -1e-2 * steep["x"])


def test_a_search_that_finds_nothing_stays() -> None:
    x = torch.zeros(2, 1, dtype=torch.float64)
    value = lambda x: torch.where(x[:, 0] == 0, 0.0, 1.0)
    step = backtracked(value, x, torch.ones(2, 1, dtype=torch.float64), torch.tensor([-1.0, -1.0]))
    assert step.flatten().tolist() == [0.0, 0.0]


def test_a_curvature_that_cannot_answer_is_named() -> None:
    class OnlyHessian:
        def hessian(self) -> Tensor:
            return torch.eye(1)[None]

    x = {"x": torch.zeros(1, 1)}
    with pytest.raises(
        LosslabError, match=r"newton-cg asks its curvature for products\(\), which a OnlyHess"
    ):
        NewtonCG().update(x, {}, x, 0, OnlyHessian())  # type: ignore[arg-type]
    with pytest.raises(LosslabError, match="needs the Gauss-Newton matrix and got none: pass curvature="):
        GaussNewton().update(x, {}, x, 0)


@pytest.mark.parametrize("rule", [Newton(lr=1.0), Newton(lr=[1.0, 0.5])], ids=["one rate", "two rates"])
def test_members_that_all_diverge_at_the_first_step_are_marked(rule: Rule) -> None:
    flat = Task(
        lambda: torch.nn.Linear(3, 2), lambda model, x: model(x)[:, 0].square().mean(), torch.ones(8, 3)
    )
    population = train(flat, rule, seeds=2, steps=3)
    assert population.diverged.tolist() == [1, 1]
    assert population.summary()["ended"].tolist() == ["diverged at step 1"] * 2
