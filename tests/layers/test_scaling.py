"""Standardisation and whitening: exact moments, constant features, new data, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losslab.errors import LosslabError
from losslab.layers import standardise, whiten
from losslab.tasks import digits


def data(n: int, d: int, seed: int, constant: int = 0) -> Tensor:
    """Correlated columns on scales 1e-3 to 1e3 with large means; the first ones constant."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g).double()
    x = (x + 3) * 10 ** torch.empty(d, dtype=torch.float64).uniform_(-3, 3, generator=g)
    x[:, :constant] = torch.tensor(0.1)
    return x


@given(st.integers(2, 30), st.integers(2, 8), st.integers(0, 1), st.integers(0, 99))
def test_standardise(n: int, d: int, constant: int, seed: int) -> None:
    x = data(n, d, seed, constant)
    scaled = standardise(x)
    y = scaled(x)
    assert scaled.constant.tolist() == [True] * constant + [False] * (d - constant)
    assert torch.allclose(y.mean(0), torch.zeros(d).double(), atol=1e-9)
    assert torch.allclose(y[:, constant:].var(0, correction=0), torch.ones(d - constant).double())
    assert (y[:, :constant].abs() < 1e-15).all()
    new = data(5, d, seed + 100)
    by_hand = (new - x.mean(0))[:, constant:] / x.std(0, correction=0)[constant:]
    assert torch.allclose(scaled(new)[:, constant:], by_hand)


@given(st.integers(12, 40), st.integers(2, 6), st.integers(0, 1), st.integers(0, 99))
def test_whitened_covariance_is_the_identity(n: int, d: int, constant: int, seed: int) -> None:
    x = standardise(data(n, d, seed, constant))(data(n, d, seed, constant))
    pca, zca = whiten(x, "pca"), whiten(x, "zca")
    eye = torch.eye(d - constant).double()
    assert pca(x).shape == (n, d - constant)
    assert torch.allclose(pca(x).T.cov(correction=0).reshape(eye.shape), eye, atol=1e-8)
    assert torch.allclose(zca(x).T.cov(correction=0)[constant:, constant:], eye, atol=1e-8)
    assert (zca(x)[:, :constant].abs() < 1e-12).all()
    assert torch.allclose(zca.matrix, zca.matrix.T)
    assert torch.allclose(pca(x).mean(0), torch.zeros(d - constant).double(), atol=1e-9)


def test_eps_damps_each_eigenvalue() -> None:
    x = data(50, 4, 0)
    spectrum = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
    damped = whiten(1e5 * x, eps=0.1)(1e5 * x).T.cov(correction=0)  # the scale of the data does not matter
    assert torch.allclose(damped.diag(), spectrum / (spectrum + 0.1 * spectrum.mean()), atol=1e-9)


def test_fewer_examples_than_features() -> None:
    x = data(4, 9, 0)
    y = whiten(x)(x)
    assert y.shape == (4, 3)
    assert torch.allclose(y.T.cov(correction=0), torch.eye(3).double(), atol=1e-8)


def test_digits_with_their_constant_pixels() -> None:
    (x, _), (test, _) = digits(raw=True).train.all(), digits(raw=True).test.all()
    scaled = standardise(x)
    constant = scaled.constant.nonzero().flatten().tolist()
    assert constant == (x.std(0) == 0).nonzero().flatten().tolist()
    assert constant
    assert torch.allclose(scaled(x), digits().train.all()[0], atol=1e-5)
    assert torch.allclose(scaled(test), digits().test.all()[0], atol=1e-5)
    white = whiten(x)(x)
    assert white.dtype == torch.float32
    kept = 64 - len(constant)
    assert torch.allclose(white.T.cov(correction=0), torch.eye(kept), atol=1e-4)
    assert whiten(x, "zca")(test).shape == test.shape


def test_constants_with_rounding_are_constant() -> None:
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1000.1
    x[::2, 0] = torch.nextafter(x[0, 0], torch.tensor(math.inf))
    assert standardise(x).constant.tolist() == [True, False]


@pytest.mark.parametrize("fit", [standardise, whiten, lambda x: whiten(x, "zca")])
def test_a_large_mean_is_removed_in_single_precision(fit) -> None:
    noise = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    x = 1e4 + 0.03 * noise
    assert x.dtype == torch.float32
    # Rounded to single precision the mean would be off by up to 0.016 of the spread.
    assert fit(x)(x).double().mean(0).abs().max() < 1e-6


def test_images_whole_numbers_and_precision() -> None:
    images = torch.randint(0, 256, (30, 2, 3, 3), generator=torch.Generator().manual_seed(0))
    for scaled in (standardise(images), whiten(images, "zca"), whiten(images)):
        assert scaled(images).shape == images.shape
        assert scaled(images).dtype == torch.float32
        assert scaled(images.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: standardise(torch.tensor([[1.0, 2.0], [3.0, math.nan]])), "example 1, feature 1"),
        (lambda: whiten(torch.tensor([[1.0, math.inf], [3.0, 2.0]])), "1 numbers of the data are not finite"),
        (lambda: standardise(torch.ones(4, 3)), "all 3 features are constant"),
        (lambda: standardise(torch.ones(1, 3)), "at least two examples"),
        (lambda: standardise(torch.ones(3)), "at least two examples"),
        (lambda: whiten(torch.rand(4, 3), "pcs"), "did you mean 'pca'"),
        (lambda: whiten(torch.rand(4, 3), eps=-1), "eps is -1"),
        (lambda: standardise(torch.rand(4, 3))(torch.rand(4, 2)), r"shape \[3\] and got \[4, 2\]"),
    ],
)
def test_errors(call, told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        call()
