from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losslab.errors import LosslabError
from losslab.tasks import Function, build, double_well, function_task, octopus, quadratic, rosenbrock, saddle

FUNCTIONS = [
    saddle,
    rosenbrock,
    double_well,
    octopus(1),
    octopus(4),
    octopus(3, L=2.0, gamma=0.5, tau=1.5),
    quadratic([1.0, -2.0, 3.0]),
]


def points(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def gradient(function: Function, x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda v: function.f(v).sum())(x)


def hessian(function: Function, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.hessian(function.f, x)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_minima_and_saddles_are_what_they_say(function: Function) -> None:
    assert len(function.start) == len(function.domain) == function.dimension
    values = [function.f(points(x)).item() for x in function.minima]
    for x in map(points, function.minima):
        assert gradient(function, x).abs().max() < 1e-9
        assert torch.linalg.eigvalsh(hessian(function, x)).min() > 0.1
    for x in map(points, function.saddles):
        assert gradient(function, x).abs().max() < 1e-9
        spectrum = torch.linalg.eigvalsh(hessian(function, x))
        # The octopus in one dimension starts at a maximum, its only strict saddle.
        assert spectrum.min() < -0.1
        assert function.dimension == 1 or spectrum.max() > 0.1
    if values:
        box = points(function.domain)
        generator = torch.Generator().manual_seed(0)
        draws = torch.rand(20_000, function.dimension, generator=generator, dtype=torch.float64)
        assert function.f(box[:, 0] + draws * (box[:, 1] - box[:, 0])).min() >= max(values) - 1e-9
        assert max(values) - min(values) < 1e-9


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_functions_are_vectorised_in_the_dtype_of_their_argument(function: Function) -> None:
    x = torch.randn(2, 5, function.dimension)
    batched = function.f(x)
    assert batched.shape == (2, 5)
    assert batched.dtype == torch.float32
    one_by_one = torch.stack([function.f(row) for row in x.view(10, -1)]).view(2, 5)
    torch.testing.assert_close(batched, one_by_one)
    torch.testing.assert_close(torch.func.vmap(function.f)(x.view(10, -1)).view(2, 5), batched)


def test_known_values() -> None:
    assert saddle.f(points([1.0, 2.0])).item() == pytest.approx(0.5 - 2 + 4)
    assert rosenbrock.f(points([-1.2, 1.0])).item() == pytest.approx(24.2)
    assert double_well.f(points([0.0, 2.0])).item() == pytest.approx(5)
    spectrum = torch.linalg.eigvalsh(hessian(rosenbrock, points([1.0, 1.0])))
    assert (spectrum[1] / spectrum[0]).item() == pytest.approx(2508, abs=1)


def tube_oracle(x: list[float], L: float, gamma: float, tau: float) -> float:
    """f of Du et al. on the tubes, case by case as they write it."""
    a = [abs(v) for v in x]
    d = len(a)
    g1 = lambda v: (
        -gamma * v**2
        + (-14 * L + 10 * gamma) / (3 * tau) * (v - tau) ** 3
        + (5 * L - 3 * gamma) / (2 * tau**2) * (v - tau) ** 4
    )
    g2 = lambda v: (
        -gamma
        - 10 * (L + gamma) * (v - 2 * tau) ** 3 / tau**3
        - 15 * (L + gamma) * (v - 2 * tau) ** 4 / tau**4
        - 6 * (L + gamma) * (v - 2 * tau) ** 5 / tau**5
    )
    nu = -g1(2 * tau) + 4 * L * tau**2
    i = next((k for k in range(d) if a[k] < 2 * tau), d)  # how many have arrived; also the one on its way
    value = sum(L * (v - 4 * tau) ** 2 for v in a[:i]) - i * nu
    if i == d:
        return value
    rest = sum(L * v**2 for v in a[i + 2 :])
    following = a[i + 1] if i + 1 < d else 0.0
    if a[i] <= tau:
        return value - gamma * a[i] ** 2 + L * following**2 + rest
    return value + g1(a[i]) + g2(a[i]) * following**2 + rest


@settings(deadline=None)
@given(
    st.integers(1, 5).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d))),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.lists(st.sampled_from([-1.0, 1.0]), min_size=5, max_size=5),
    st.floats(0.2, 2),
    st.floats(1, 3),
    st.floats(0.5, 3),
)
def test_octopus_is_the_papers_on_its_tubes(
    place: tuple[int, int], u: list[float], signs: list[float], gamma: float, ratio: float, tau: float
) -> None:
    dimension, arrived = place
    spans = [(2 * tau, 6 * tau)] * arrived + [(0, 2 * tau)] + [(0, tau)] * dimension
    x = [s * (low + (high - low) * v) for s, v, (low, high) in zip(signs, u, spans, strict=False)][:dimension]
    got = octopus(dimension, L=gamma * ratio, gamma=gamma, tau=tau).f(points(x)).item()
    assert got == pytest.approx(tube_oracle(x, gamma * ratio, gamma, tau), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("coordinate", [0, 1, 2])
@pytest.mark.parametrize("edge", [0.0, math.e, 2 * math.e, -math.e, -2 * math.e])
def test_octopus_is_smooth_across_its_boundaries(edge: float, coordinate: int) -> None:
    """Value, gradient and Hessian on the two sides of |x_i| = 0, tau, 2 tau, on and off the tubes."""
    function = octopus(3)
    generator = torch.Generator().manual_seed(1)
    tubes = points([[4.0 * math.e, 0.3, 0.2], [0.4, 0.1, 0.2], [11.0, 10.0, 1.0]])
    anywhere = (torch.rand(20, 3, generator=generator, dtype=torch.float64) - 0.5) * 14 * math.e
    step = 1e-7
    for x in torch.cat([tubes, anywhere]):
        low, high = x.clone(), x.clone()
        low[coordinate], high[coordinate] = edge - step, edge + step
        # A smooth function changes by two steps times its next derivative, which is of order 1e4 here.
        assert abs(function.f(low) - function.f(high)) < 1e5 * step
        assert (gradient(function, low) - gradient(function, high)).abs().max() < 1e5 * step
        assert (hessian(function, low) - hessian(function, high)).abs().max() < 1e5 * step


def test_octopus_has_the_papers_curvatures() -> None:
    function = octopus(3, L=2.0, gamma=0.5, tau=1.0)
    at_minimum = torch.linalg.eigvalsh(hessian(function, points(function.minima[0])))
    torch.testing.assert_close(at_minimum, points([4.0, 4.0, 4.0]))
    for x in function.saddles:
        spectrum = torch.linalg.eigvalsh(hessian(function, points(x)))
        torch.testing.assert_close(spectrum, points([-1.0, 4.0, 4.0]))


def test_gradient_descent_passes_the_saddles_of_the_octopus_in_order_and_ever_slower() -> None:
    function = octopus(3)
    x = points([1.0, 1.0, 1.0])
    left: list[int] = []
    for step in range(2000):
        x = x - gradient(function, x) / (4 * math.e)
        if len(left) < 3 and x[len(left)] > 2 * math.e:
            left.append(step)
    assert len(left) == 3
    first, second, third = left[0], left[1] - left[0], left[2] - left[1]
    assert first < second < third
    torch.testing.assert_close(x, points(function.minima[0]), rtol=0, atol=1e-6)


def test_function_task() -> None:
    task = function_task(saddle)
    model = build(task)
    assert [(name, p.tolist()) for name, p in model.named_parameters()] == [("x", pytest.approx([1.0, 1e-3]))]
    assert task.train is None
    assert torch.equal(task.loss(model, None), saddle.f(model.x))
    start = torch.tensor([0.0, 2.0], dtype=torch.float64)
    moved = build(function_task(saddle, start=start))
    with torch.no_grad():
        moved.x += 1
    assert moved.x.dtype == torch.float64
    assert start.tolist() == [0.0, 2.0]
    assert build(function_task(saddle, start=[1, 2])).x.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: function_task(saddle, start=[1.0]), r"the start has shape \(1,\), saddle has 2 variables"),
        (lambda: octopus(0), "octopus got dimension=0"),
        (lambda: octopus(2, L=1.0, gamma=2.0), "L >= gamma > 0"),
        (lambda: octopus(2, tau=0.0), "tau=0.0"),
        (lambda: octopus(2, L=float("nan")), "L=nan"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(LosslabError, match=message):
        make()  # type: ignore[operator]
