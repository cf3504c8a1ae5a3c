from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losslab.errors import LosslabError
from losslab.tasks import (
    Quadratic,
    build,
    check,
    function_task,
    linear_regression,
    quadratic,
    sparse_classification,
    teacher_student,
)

F64 = torch.float64


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 99))
def test_the_gradient_of_any_quadratic_is_the_symmetric_part_times_x(dimension: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(dimension, dimension, generator=generator, dtype=F64)
    x = torch.randn(dimension, generator=generator, dtype=F64)
    q = Quadratic.of(a)
    oracle = sum(a[i, j] * x[i] * x[j] for i in range(dimension) for j in range(dimension)) / 2
    torch.testing.assert_close(q.f(x), oracle)
    torch.testing.assert_close(torch.func.grad(q.f)(x), (a + a.T) @ x / 2)
    spectrum = np.linalg.eigvalsh((a + a.T).numpy() / 2)
    assert (q.mu, q.L) == pytest.approx((spectrum[0], spectrum[-1]))


@pytest.mark.parametrize("rotate", [True, False])
def test_quadratic_has_its_spectrum_and_an_even_start(rotate: bool) -> None:
    q = quadratic([4.0, 1.0, 9.0], seed=3, rotate=rotate)
    torch.testing.assert_close(q.A, q.A.T)
    values, vectors = torch.linalg.eigh(q.A)
    torch.testing.assert_close(values, torch.tensor([1.0, 4.0, 9.0], dtype=F64))
    torch.testing.assert_close((vectors.T @ torch.tensor(q.start, dtype=F64)).abs(), torch.ones(3, dtype=F64))
    assert torch.equal(q.A, q.A.diag().diag()) is not rotate
    assert (q.mu, q.L, q.minima, q.saddles) == (pytest.approx(1), pytest.approx(9), ((0.0,) * 3,), ())


def test_quadratics_by_condition_and_by_sign() -> None:
    q = quadratic(dimension=4, condition=1e6)
    assert q.L / q.mu == pytest.approx(1e6)
    assert not torch.equal(q.A, quadratic(dimension=4, condition=1e6, seed=1).A)
    assert quadratic(dimension=1, condition=7.0).A.tolist() == [[1.0]]
    assert quadratic([1.0, -1.0]).saddles == ((0.0, 0.0),)
    assert quadratic([1.0, 0.0]).minima == quadratic([-1.0, 0.0, 1.0], rotate=False).saddles == ()
    check(function_task(q), build(function_task(q)))


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_linear_regression_has_the_condition_number(condition: float) -> None:
    task = linear_regression(60, 5, condition=condition, noise=0.0, seed=2, dtype=F64)
    x, y = task.train.all()
    model = build(task)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(_Loss(task, model), {"model.0.weight": weight}, ())

    hessian = torch.autograd.functional.hessian(loss, model[0].weight.detach()).reshape(5, 5)
    torch.testing.assert_close(hessian, x.T @ x / 60)
    spectrum = torch.linalg.eigvalsh(hessian)
    assert (spectrum[-1] / spectrum[0]).item() == pytest.approx(condition)
    assert spectrum[-1].item() == pytest.approx(1)
    solved = torch.linalg.lstsq(x, y).solution
    assert (x @ solved - y).abs().max() < 1e-8
    assert task.loss(model, (x, y)).item() == pytest.approx(((model(x) - y) ** 2).mean().item() / 2)


class _Loss(torch.nn.Module):
    def __init__(self, task: object, model: torch.nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self) -> torch.Tensor:
        return self.task.loss(self.model, self.task.train.all())


def test_the_noise_of_linear_regression() -> None:
    x, y = linear_regression(4000, 3, noise=0.5, seed=1, dtype=F64).train.all()
    residual = y - x @ torch.linalg.lstsq(x, y).solution
    assert residual.std().item() == pytest.approx(0.5, rel=0.05)


def test_teacher_student_is_drawn_by_its_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = teacher_student(3, 4, 6, n=200, seed=1, dtype=F64)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (teacher_student(3, 4, 6, n=200, seed=seed, dtype=F64) for seed in (1, 2))
    assert all(map(torch.equal, one.train.all(), again.train.all()))
    assert not torch.equal(one.train.all()[1], other.train.all()[1])
    assert one.train.all()[1].std().item() == pytest.approx(1)
    assert not torch.equal(one.train.all()[0], one.test.all()[0])
    assert repr(one.model).startswith("mlp(3, 6, 1, activation='tanh'")
    check(one, build(one))


def test_a_linear_teacher_can_be_learnt_exactly() -> None:
    task = teacher_student(3, 4, 6, n=50, activation="identity", dtype=F64)
    x, y = task.train.all()
    with_one = torch.cat([x, torch.ones(50, 1, dtype=F64)], dim=1)
    solved = torch.linalg.lstsq(with_one, y).solution
    assert (with_one @ solved - y).abs().max() < 1e-10
    x, y = task.test.all()
    assert (torch.cat([x, torch.ones(50, 1, dtype=F64)], dim=1) @ solved - y).abs().max() < 1e-10


def test_sparse_features_follow_zipf_and_predict_the_label() -> None:
    n, exponent = 20_000, 1.2
    task = sparse_classification(n, 100, exponent=exponent, seed=3)
    x, y = task.train.all()
    assert set(x.unique().tolist()) == {0.0, 1.0}
    expected = torch.arange(1, 101, dtype=F64) ** -exponent / 2
    deviation = (x.double().mean(0) - expected) / (expected * (1 - expected) / n).sqrt()
    assert deviation.abs().max() < 5
    assert 0.3 < y.double().mean() < 0.7
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=10.0, max_iter=500).fit(x.numpy(), y.numpy())
    test_x, test_y = task.test.all()
    score = fitted.score(test_x.numpy(), test_y.numpy())
    assert score > max(test_y.double().mean().item(), 1 - test_y.double().mean().item()) + 0.15
    check(task, build(task))
    assert sparse_classification(50, 3000, exponent=3.0).train.all()[0].isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quadratic(), "quadratic wants either eigenvalues"),
        (lambda: quadratic([1.0], dimension=1, condition=1.0), "quadratic wants either eigenvalues"),
        (lambda: quadratic([1.0], dimension=1), "quadratic wants either eigenvalues"),
        (lambda: quadratic(dimension=3), "quadratic wants either eigenvalues"),
        (lambda: quadratic([]), r"eigenvalues have shape \(0,\)"),
        (lambda: quadratic(dimension=0, condition=1.0), "dimension=0 and condition=1.0"),
        (lambda: quadratic(dimension=2, condition=0.5), "dimension=2 and condition=0.5"),
        (lambda: Quadratic.of(torch.ones(2, 3)), r"the matrix has shape \(2, 3\)"),
        (lambda: linear_regression(3, 5), "linear_regression got n=3, dimension=5"),
        (lambda: linear_regression(5, 3, noise=-1.0), "noise=-1.0"),
        (lambda: linear_regression(5, 3, condition=0.0), "condition=0.0"),
        (lambda: teacher_student(2, 3, 3, n=1), "teacher_student got n=1"),
        (lambda: teacher_student(2, 0, 3, n=9), "mlp got the sizes"),
        (lambda: teacher_student(2, 3, 3, n=9, activation="tan"), "no activation is named 'tan'"),
        (lambda: sparse_classification(0, 3), "sparse_classification got n=0"),
        (lambda: sparse_classification(3, 3, exponent=-1.0), "exponent=-1.0"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(LosslabError, match=message):
        make()  # type: ignore[operator]
