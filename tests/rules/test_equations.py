"""Each rule is its equation, and torch's optimizer where the two coincide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import rules as oracle
from tests.rules.cases import CASES, SHAPES, TORCH, Bowl, Case, draw, flat, run

from losslab.rules import RULES, AdaGrad, Adam, AMSGrad, FullAdaGrad, Momentum, Nesterov, Newton, RMSProp

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_rule_and_variant_is_in_the_table() -> None:
    wanted = {(name, v) for name, rule in RULES.items() for v in (rule.variants or [None])}
    assert {(case.rule, getattr(case.make(), "variant", None)) for case in CASES} == wanted


def follow(
    case: Case, seed: int, zeros: bool, wrap: str = "", **extra: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ours and the oracle's weights [steps, N, P], the latter one member at a time."""
    weights, gradients = draw(seed), draw(seed + 1, steps=20)
    if case.origin:
        weights = {n: torch.zeros_like(w) for n, w in weights.items()}
    if zeros:
        for g in gradients:
            g["weight"][:, 0] = 0.0
    reference = []
    for member in range(4):
        step, x = case.reference(), flat(weights)[member].numpy()
        lr = case.numbers()["lr"]
        if wrap:
            told = {"lr": lr, **extra} if wrap == "decoupled" else extra
            step = getattr(oracle, wrap)(step, **told)
        xs = []
        for t, g in enumerate(gradients, case.first + 1):
            x = step(x, flat(g)[member].numpy(), t)
            xs.append(x)
        reference.append(xs)
    changes = {"decay": "decoupled"} if wrap == "decoupled" else {}
    rule = case.make(**extra, **changes)
    state, ours = rule.init(weights), []
    for step, g in enumerate(gradients, case.first):
        weights, state = rule.update(g, state, weights, step, Bowl(4))
        ours.append(flat(weights).numpy())
    return np.array(ours), np.array(reference).swapaxes(0, 1)


@every_case
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_equals_its_oracle(case: Case, seed: int) -> None:
    ours, reference = follow(case, seed, zeros=case.zeros)
    assert np.isfinite(reference).all()
    np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wrap", ["l2", "clipped"])
@every_case
def test_l2_decay_and_clipping(case: Case, wrap: str) -> None:
    extra = {"weight_decay": 0.3} if wrap == "l2" else {"clip": 1.5}
    ours, reference = follow(case, 5, zeros=False, wrap=wrap, **extra)
    np.testing.assert_allclose(ours, reference, rtol=1e-11, atol=1e-12)
    plain, _ = follow(case, 5, zeros=False)
    only_signs = case.oracle is oracle.adagrad_literal and wrap == "clipped"
    assert np.allclose(ours, plain, rtol=1e-6) == only_signs


@pytest.mark.parametrize("case", [c for c in CASES if not (c.own or c.origin)], ids=str)
def test_decoupled_decay(case: Case) -> None:
    ours, reference = follow(case, 5, zeros=False, wrap="decoupled", weight_decay=0.3)
    np.testing.assert_allclose(ours, reference, rtol=1e-11, atol=1e-12)
    plain, _ = follow(case, 5, zeros=False)
    assert not np.allclose(ours, plain, rtol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if not c.own], ids=str)
def test_box(case: Case) -> None:
    ours, reference = follow(case, 6, zeros=False, wrap="boxed", box=0.5)
    np.testing.assert_allclose(ours, reference, rtol=1e-11, atol=1e-12)
    assert (np.abs(ours) == 0.5).any()
    assert np.abs(ours).max() == 0.5


@pytest.mark.parametrize("case", TORCH, ids=str)
def test_equals_torch_for_200_steps(case: Case) -> None:
    assert case.torch is not None
    weights, gradients = draw(7, members=1), draw(8, steps=200, members=1)
    params = {n: torch.nn.Parameter(w[0].clone()) for n, w in weights.items()}
    optimizer = case.torch(list(params.values()))
    for g in gradients:
        for n, p in params.items():
            p.grad = g[n][0].clone()
        optimizer.step()
    ours, _ = run(case.make(), weights, gradients)
    for n in SHAPES:
        torch.testing.assert_close(ours[n][0], params[n].data, rtol=1e-12, atol=1e-12)


def test_adamw_is_adam_with_decoupled_decay() -> None:
    weights, gradients = draw(9, members=1), draw(10, steps=200, members=1)
    p = torch.nn.Parameter(weights["weight"][0].clone())
    optimizer = torch.optim.AdamW([p], lr=0.05, weight_decay=0.1)
    for g in gradients:
        p.grad = g["weight"][0]
        optimizer.step()
    ours, _ = run(Adam(lr=0.05, weight_decay=0.1, decay="decoupled"), weights, gradients)
    torch.testing.assert_close(ours["weight"][0], p.data, rtol=1e-12, atol=1e-12)


def moves(rule: object, gradients: list[float], first: int = 0) -> list[float]:
    """How far each update moves one weight, in units of the rate 1."""
    x = {"x": torch.zeros(1, 1, dtype=torch.float64)}
    state, moved = rule.init(x), []  # type: ignore[attr-defined]
    for step, g in enumerate(gradients, first):
        new, state = rule.update({"x": torch.full_like(x["x"], g)}, state, x, step)  # type: ignore[attr-defined]
        moved.append((x["x"] - new["x"]).item())
        x = new
    return moved


def test_step_sizes_of_the_notes_adam() -> None:
    steps = moves(Adam(lr=1.0, variant="lecture"), [7.0] * 1000)
    t = np.arange(1, 1001)
    np.testing.assert_allclose(steps, (1 - 0.9**t) / np.sqrt(1 - 0.999**t), rtol=1e-10)
    assert [round(steps[t - 1], 2) for t in (1, 12, 100, 1000)] == [3.16, 6.57, 3.24, 1.26]
    assert int(np.argmax(steps)) == 11
    np.testing.assert_allclose(moves(Adam(lr=1.0, eps=0.0), [7.0] * 50), 1.0, rtol=1e-12)


def test_denominators_of_the_three_amsgrads() -> None:
    gradients = [1.0, 0.5, 0.5, 0.5]

    def denominators(variant: str) -> list[float]:
        rule = AMSGrad(lr=1.0, beta1=0.0, eps=0.0, variant=variant)
        return [g / moved for g, moved in zip(gradients, moves(rule, gradients), strict=True)]

    assert [round(d, 3) for d in denominators("torch")] == [1.0, 0.79, 0.707, 0.661]
    assert np.all(np.diff(denominators("paper")) >= 0)
    np.testing.assert_allclose(denominators("optax"), 1.0)


def test_first_steps_of_rmsprop() -> None:
    assert moves(RMSProp(lr=1.0, beta=0.99, eps=0.0), [3.0])[0] == pytest.approx(10.0)
    assert moves(RMSProp(lr=1.0, variant="inside"), [3.0])[0] == pytest.approx(10**0.5, rel=1e-8)
    # eps inside of the root of a tiny gradient is another eps: optax's rsqrt(v + 1e-8)
    assert moves(RMSProp(lr=1.0, variant="inside"), [1e-4])[0] == pytest.approx(1e-4 / (1e-9 + 1e-8) ** 0.5)


def test_a_variance_below_zero_by_rounding_is_zero() -> None:
    p, g = torch.nn.Parameter(torch.zeros(200)), torch.linspace(0.05, 3.0, 200)
    optimizer = torch.optim.RMSprop([p], alpha=0.9, centered=True)
    x = {"x": torch.zeros(1, 200)}
    rule = RMSProp(centred=True)
    state = rule.init(x)
    for step in range(600):
        p.grad = g.clone()
        optimizer.step()
        x, state = rule.update({"x": g[None]}, state, x, step)
    assert p.isnan().any()
    assert x["x"].isfinite().all()


def test_adam_moves_half_a_rate_where_the_gradient_is_eps() -> None:
    assert moves(Adam(lr=1.0), [1e-8])[0] == pytest.approx(0.5)


def test_a_dampened_constant_gradient_gives_constant_steps() -> None:
    rule = Momentum(lr=1.0, beta=0.9, dampening=0.9)
    np.testing.assert_allclose(moves(rule, [1.0] * 5), 1.0)


@pytest.mark.parametrize("variant", ["lecture", "lecture-past"])
def test_the_notes_adagrad_divides_by_zero_at_the_first_step(variant: str) -> None:
    x = {"x": torch.zeros(1, 3)}
    rule = AdaGrad(lr=0.1, variant=variant)
    new, _ = rule.update({"x": torch.tensor([[2.0, -1.0, 0.0]])}, rule.init(x), x, step=0)
    assert new["x"][0, :2].tolist() == [-np.inf, np.inf]
    assert new["x"][0, 2].isnan()


def test_lecture_adagrad_moves_by_the_sign_over_root_t() -> None:
    rule = AdaGrad(lr=1.0, variant="lecture")
    np.testing.assert_allclose(moves(rule, [5.0, -0.1, 3.0], first=1), [1, -(2**-0.5), 3**-0.5])


@pytest.mark.parametrize("case", ["rmsprop", "adam"])
def test_without_eps_a_dead_coordinate_is_nan(case: str) -> None:
    assert np.isnan(moves(RULES[case](variant="lecture"), [0.0])[0])  # type: ignore[call-arg]


def test_both_parametrisations_of_momentum_part_when_the_rate_changes() -> None:
    def halved(step: int) -> float:
        return 1.0 if step == 0 else 0.5

    assert moves(Momentum(lr=halved, beta=0.5), [1.0, 1.0]) == [1.0, 0.75]
    assert moves(Momentum(lr=halved, beta=0.5, variant="sutskever"), [1.0, 1.0]) == [1.0, 1.0]
    assert moves(Nesterov(lr=halved, beta=0.5), [1.0, 1.0]) == [1.5, 0.875]
    assert moves(Nesterov(lr=halved, beta=0.5, variant="lookahead"), [1.0, 1.0]) == [1.5, 1.0]


def quadratic(rule: object, eigenvalues: np.ndarray, steps: int) -> float:
    x = {"x": torch.ones(1, len(eigenvalues), dtype=torch.float64)}
    state, curve = rule.init(x), torch.as_tensor(eigenvalues)  # type: ignore[attr-defined]
    for step in range(steps):
        x, state = rule.update({"x": curve * x["x"]}, state, x, step)  # type: ignore[attr-defined]
    return x["x"].norm().item()


def test_heavy_ball_rate_on_a_quadratic() -> None:
    k = 100.0
    beta = ((k**0.5 - 1) / (k**0.5 + 1)) ** 2
    rule = Momentum(lr=4 / (k**0.5 + 1) ** 2, beta=beta)
    first, second = (quadratic(rule, np.array([1.0, k]), steps) for steps in (300, 400))
    assert (second / first) ** (1 / 100) == pytest.approx(beta**0.5, abs=0.005)


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_newton_on_a_quadratic_does_not_see_the_conditioning(damping: float) -> None:
    for k in (10.0, 1e6):
        hessian = torch.diag(torch.tensor([1.0, k], dtype=torch.float64))[None]
        curvature = type("Fixed", (), {"hessian": lambda self, h=hessian: h})()
        x = {"x": torch.ones(1, 2, dtype=torch.float64)}
        rule = Newton(lr=damping)
        for step in range(3):
            g = {"x": (hessian[0] @ x["x"][0])[None]}
            x, _ = rule.update(g, {}, x, step, curvature)
        torch.testing.assert_close(x["x"], torch.full_like(x["x"], (1 - damping) ** 3))


def test_newton_spoils_only_the_member_whose_hessian_is_singular() -> None:
    hessians = torch.eye(2, dtype=torch.float64).repeat(4, 1, 1)
    hessians[1] = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    hessians[2, 0, 0] = torch.nan
    curvature = type("Fixed", (), {"hessian": lambda self: hessians})()
    x = {"x": torch.ones(4, 2, dtype=torch.float64)}
    g = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(4, 1)
    new, _ = Newton().update({"x": g}, {}, x, 0, curvature)
    assert torch.isnan(new["x"][1:3]).all()
    assert (new["x"][[0, 3]] == 1 - g[0]).all()


def test_full_adagrad_is_diagonal_on_one_weight_and_spoils_no_neighbour() -> None:
    gradients = [1.0, -2.0, 0.5]
    rule = FullAdaGrad(lr=1.0, eps=0.1)
    np.testing.assert_allclose(moves(rule, gradients), moves(AdaGrad(lr=1.0, eps=0.1), gradients), rtol=1e-12)
    x = {"x": torch.zeros(4, 2)}
    g = torch.tensor([[1.0, 2], [torch.nan, 1], [2, 1], [1e30, 1]])  # the last one's square overflows
    new, _ = rule.update({"x": g}, rule.init(x), x, 0)
    assert new["x"].isnan().all(1).tolist() == [False, True, False, True]
