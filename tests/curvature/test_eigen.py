"""Eigenpairs against dense spectra: what is called converged is, copies are found, the rest says so."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.curvature.spectra import SPECTRA, rotated
from tests.engine.cases import NAMED
from tests.engine.test_objective import modules_of, task_of

from losslab.curvature import GaussNewton, Hessian, NotConverged, eigenpairs
from losslab.engine import Objective, Points
from losslab.errors import LosslabError
from losslab.tasks import mlp, supervised

ENDS = ("largest", "smallest", "magnitude", "both ends")


def wanted(values: torch.Tensor, k: int, which: str) -> torch.Tensor:
    values = values.double().sort().values
    if which == "magnitude":
        return values[values.abs().argsort(descending=True)][:k]
    ends = {"largest": values.flip(0)[:k], "smallest": values[:k]}
    return ends.get(which, torch.cat([values[:k], values[-k:]]))


def residuals(matrix, found):
    v = found.vectors.double()
    return (matrix.double() @ v - v * found.values[..., None, :]).norm(dim=-2)


def verify(matrix, values, k, which, found, slack=1e-3):
    """Everything that the result claims of itself, against the truth."""
    scale = float(values.abs().max())
    true = residuals(matrix, found)
    assert found.complete
    assert (true <= 1.02 * found.residuals).all()
    assert (true <= 1.02 * found.tol * scale).all()
    eye = torch.eye(found.vectors.shape[1], dtype=torch.float64)
    gram = found.vectors.double().T @ found.vectors.double()
    assert (gram - eye).abs().max() < (1e-10 if matrix.dtype == torch.float64 else 1e-4)
    exact = wanted(values, k, which)
    size = (lambda t: t.abs()) if which == "magnitude" else (lambda t: t)
    # What lies closer together than the tolerance cannot be told apart at it.
    assert (size(found.values) - size(exact)).abs().max() <= 4 * slack * scale
    nearest = (found.values[:, None] - values.double()[None]).abs().amin(1)
    assert (nearest <= 1.02 * found.residuals).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", SPECTRA)
def test_dense_spectra(name, which, dtype):
    values = SPECTRA[name]
    matrix = rotated(values, dtype=dtype)
    for k in (1, 3, 8):
        count = 2 * k if which == "both ends" else k
        if count > len(values) or (name == "negative" and which == "largest" and k > 1):
            continue
        found = eigenpairs(matrix, k, which, max_products=2000)
        verify(matrix, values.to(dtype), k, which, found)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["outliers", "spread", "negative"])
def test_scale_changes_nothing(name, scale):
    matrix = rotated(SPECTRA[name])
    plain, scaled = eigenpairs(matrix, 2, "both ends"), eigenpairs(scale * matrix, 2, "both ends")
    assert abs(scaled.products - plain.products) <= 0.1 * plain.products  # rounding is another
    top = float(plain.scale)
    torch.testing.assert_close(scaled.values / scale, plain.values, rtol=0, atol=1e-6 * top)
    assert scaled.complete
    assert (scaled.residuals <= 1e-3 * scale * top).all()


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
def test_a_tolerance_is_met_and_no_more_is_spent_than_it_takes(tol):
    matrix = rotated(SPECTRA["outliers"])
    found = eigenpairs(matrix, 3, tol=tol)
    verify(matrix, SPECTRA["outliers"], 3, "largest", found, slack=tol)
    spent = [eigenpairs(matrix, 3, tol=t, second_look=False).products for t in (tol, 1e-11)]
    assert spent[0] < spent[1]


@given(st.integers(2, 40), st.integers(0, 10**6), st.sampled_from(ENDS), st.integers(1, 3))
def test_any_small_matrix(size, seed, which, k):
    g = torch.Generator().manual_seed(seed)
    distinct = torch.randn(1 + seed % size, dtype=torch.float64, generator=g)
    values = distinct[torch.randint(len(distinct), (size,), generator=g)]  # with copies
    matrix = rotated(values, seed)
    k = min(k, size // 2)
    verify(matrix, values, k, which, eigenpairs(matrix, k, which, generator=g))


@pytest.mark.parametrize("block", [1, 2, 5])
def test_blocks(block):
    for name in ("outliers", "nine-fold"):
        matrix = rotated(SPECTRA[name])
        verify(matrix, SPECTRA[name], 5, "largest", eigenpairs(matrix, 5, block=block))


def test_a_single_krylov_space_misses_copies_and_the_second_look_finds_them():
    values = torch.cat([torch.zeros(100), torch.tensor([1.0, 2.0, 2.0, 2.0])])
    matrix = rotated(values)
    without = eigenpairs(matrix, 3, second_look=False)
    assert (without.values - 2.0).abs().max() > 0.5
    found = eigenpairs(matrix, 3)
    torch.testing.assert_close(found.values, torch.full((3,), 2.0, dtype=torch.float64))


def test_restarts_with_a_small_basis():
    values = SPECTRA["spread"]
    matrix = rotated(values)
    found = eigenpairs(matrix, 2, basis=10, max_products=3000)
    assert found.products > 20
    verify(matrix, values, 2, "largest", found)


def test_the_budget_is_kept_and_its_end_is_told():
    matrix = rotated(SPECTRA["spread"])
    with pytest.warns(NotConverged, match=r"0 of 3 eigenpairs converged .* before the budget of 12 products"):
        found = eigenpairs(matrix, 3, max_products=12)
    assert found.products == 12
    assert not found.complete
    true = residuals(matrix, found)
    torch.testing.assert_close(true, found.residuals, rtol=1e-6, atol=1e-9)
    assert (true > 1e-3).all()
    with pytest.raises(LosslabError, match="less than the 3 eigenpairs"):
        eigenpairs(matrix, 3, max_products=2)


def test_single_precision_does_not_claim_double():
    matrix = rotated(SPECTRA["outliers"], dtype=torch.float32)
    with pytest.warns(NotConverged):
        assert not eigenpairs(matrix, 2, tol=1e-9, max_products=120).complete


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-2), (torch.float32, 1e-2), (torch.float32, 1e-4)]
)
def test_bounds_hold_and_are_better_than_the_residual(dtype, tol):
    values = SPECTRA["outliers"]
    matrix = rotated(values, dtype=dtype)
    found = eigenpairs(matrix, 3, tol=tol)
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:3]
    assert (found.bounds <= found.residuals).all()
    assert ((found.values - exact).abs() <= found.bounds).all()
    assert (found.bounds < found.residuals).any()


def test_points_in_a_stack_are_the_points_alone():
    names = ("outliers", "spread")
    rows = [rotated(SPECTRA[n][-200:]) for n in names]
    together = eigenpairs(torch.stack(rows), 2, tol=1e-8, max_products=2000)
    for i, row in enumerate(rows):
        alone = eigenpairs(row, 2, tol=1e-8, max_products=2000)
        torch.testing.assert_close(together.values[i], alone.values, rtol=1e-9, atol=1e-9)
        cosines = (together.vectors[i] * alone.vectors).sum(0).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-6, atol=1e-6)


def test_a_point_without_finite_products_is_nan_and_disturbs_no_other():
    matrix = rotated(SPECTRA["outliers"])
    bad = torch.full_like(matrix, torch.nan)
    found = eigenpairs(torch.stack([matrix, bad, matrix]), 2, "both ends")
    assert found.values[1].isnan().all()
    assert not found.converged[1].any()
    for i in (0, 2):
        verify_row = eigenpairs(matrix, 2, "both ends")
        torch.testing.assert_close(found.values[i], verify_row.values, rtol=1e-3, atol=1e-3)


def test_a_warm_start_costs_less_and_follows_a_crossing():
    values = SPECTRA["outliers"].clone()
    cold = eigenpairs(rotated(values), 1)
    warm = eigenpairs(rotated(values * 1.01), 1, start=cold.vectors)
    assert warm.products < cold.products
    two = eigenpairs(rotated(values), 2)
    crossed = values.clone()
    crossed[-2], crossed[-3] = 9.0, 9.5  # the eigenvector of the second becomes the first's
    found = eigenpairs(rotated(crossed), 1, start=two.vectors)
    torch.testing.assert_close(found.values, torch.tensor([9.5], dtype=torch.float64), rtol=1e-3, atol=0)


def test_the_generator_decides():
    matrix = rotated(SPECTRA["spread"])
    seeded = [eigenpairs(matrix, 1, generator=torch.Generator().manual_seed(s)).vectors for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


# -- of networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-relu", "bn1d", "conv", "tied", "unused", "lstm"])
@pytest.mark.parametrize("which", ["largest", "both ends"])
def test_networks(name, which):
    case = NAMED[name]
    points = Points.from_modules(modules_of(case, 1))
    hessian = Hessian(Objective(task_of(case), chunk=5), points)
    dense = hessian.dense()
    found = eigenpairs(hessian, 3, which)
    verify(dense, torch.linalg.eigvalsh(dense), 3, which, found)


def test_a_multi_output_regression_has_every_eigenvalue_once_an_output():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g).double(), torch.randn(40, 4, generator=g).double()
    module = torch.nn.Linear(6, 4, bias=False).double()
    task = supervised(lambda: copy.deepcopy(module), (x, y), criterion=torch.nn.MSELoss())
    points = Points.from_modules([module])
    exact = torch.linalg.eigvalsh(2 / 4 * x.T @ x / 40).flip(0).repeat_interleave(4)[:8]
    for kind in (Hessian, GaussNewton):
        found = eigenpairs(kind(Objective(task, chunk=16), points), 8)
        torch.testing.assert_close(found.values, exact, rtol=3e-3, atol=0)


def test_members_of_a_population_at_once():
    g = torch.Generator().manual_seed(0)
    task = supervised(
        mlp(4, 6, 3, activation="tanh"),
        (torch.randn(50, 4, generator=g), torch.randint(3, (50,), generator=g)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points = Points.from_modules([task.model() for _ in range(4)])
    together = eigenpairs(Hessian(Objective(task), points), 2, tol=1e-4)
    for i in range(4):
        alone = eigenpairs(Hessian(Objective(task), points.select([i])), 2, tol=1e-4)
        torch.testing.assert_close(together.values[i], alone.values, rtol=1e-3, atol=0)


def test_half_precision_keeps_its_scalars_in_double():
    g = torch.Generator().manual_seed(0)
    task = supervised(mlp(4, 6, 3), (torch.randn(50, 4, generator=g), torch.randint(3, (50,), generator=g)))
    points = Points.from_modules([task.model()])
    exact = eigenpairs(Hessian(Objective(task), points), 1)
    found = eigenpairs(Hessian(Objective(task), points.to(dtype=torch.bfloat16)), 1, tol=0.05)
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, exact.values, rtol=0.05, atol=0)


BAD = [
    ({"k": 4}, "4 eigenpairs of a matrix of size 3: ask for 1 to 3"),
    ({"k": 0}, "ask for 1 to 3"),
    ({"k": 2, "which": "both ends"}, "4 eigenpairs of a matrix of size 3"),
    ({"which": "top"}, "no end of the spectrum is named 'top'"),
    ({"tol": 0.0}, "between 0 and 1"),
    ({"block": 9}, "pass 1 to 3 vectors"),
    ({"start": torch.ones(2)}, r"start has shape \(2,\), wanted \[3\]"),
]


@pytest.mark.parametrize(("options", "told"), BAD)
def test_mistakes_are_told(options, told):
    with pytest.raises(LosslabError, match=told):
        eigenpairs(torch.eye(3), **options)
    with pytest.raises(LosslabError, match="the basis holds 4 vectors"):
        eigenpairs(torch.eye(30), 3, basis=4)


@pytest.mark.parametrize("which", ["smallest", "both ends"])
@pytest.mark.parametrize("seed", range(5))
def test_a_small_residual_inside_the_spectrum_is_not_taken_for_its_end(which: str, seed: int) -> None:
    """One large eigenvalue, a few small ones and many zeros: constant features make such Hessians."""
    draw = torch.Generator().manual_seed(seed)
    spectrum = torch.tensor([1.8, 0.005, *[0.0] * 61, -0.005], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=draw, dtype=torch.float64)).Q
    matrix = (rotation * spectrum) @ rotation.T
    found = eigenpairs(matrix, 1, which, generator=draw)
    assert found.complete
    assert abs(float(found.values.min()) + 0.005) < 1e-3 * 1.8
