"""Synthetic problems of known curvature or solution: quadratics, regression, teachers, sparse features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.errors import LosslabError
from losslab.tasks.data import Data
from losslab.tasks.functions import Function
from losslab.tasks.models import Factory, linear_net, logistic_regression, mlp
from losslab.tasks.task import Task, supervised


@dataclass(frozen=True, kw_only=True)
class Quadratic(Function):
    """``f(x) = x^T A x / 2``, with gradient ``(A + A^T) x / 2``, which is ``A x`` for a symmetric A.

    Attributes:
        A: float64 ``[d, d]``, symmetric or not.
        L: The largest eigenvalue of the Hessian ``(A + A^T) / 2``.
        mu: The smallest one; negative at a saddle.

    Example:
        >>> q = quadratic([1.0, 10.0], rotate=False)
        >>> q.f(torch.tensor([1.0, 1.0])).item(), q.mu, q.L
        (5.5, 1.0, 10.0)
    """

    A: Tensor = field(compare=False)
    L: float
    mu: float

    @staticmethod
    def of(matrix: Sequence[Sequence[float]] | Tensor, start: Sequence[float] | None = None) -> Quadratic:
        """The quadratic of any square matrix.

        Args:
            matrix: A.
            start: Where a run starts; all ones if None.

        Raises:
            LosslabError: If the matrix is not square.
        """
        a = torch.as_tensor(matrix).detach().to(torch.float64)
        if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
            raise LosslabError(f"the matrix has shape {tuple(a.shape)}, a square one was wanted: pass [d, d]")
        spectrum = torch.linalg.eigvalsh((a + a.T) / 2)
        mu, top = spectrum[0].item(), spectrum[-1].item()
        origin = ((0.0,) * len(a),)
        return Quadratic(
            name="quadratic",
            f=lambda x: ((x @ a.to(x)) * x).sum(-1) / 2,
            dimension=len(a),
            start=(1.0,) * len(a) if start is None else tuple(start),
            domain=((-2.0, 2.0),) * len(a),
            minima=origin if mu > 0 else (),
            saddles=origin if mu < 0 < top and spectrum.abs().min() > 0 else (),
            source="x^T A x / 2",
            A=a,
            L=top,
            mu=mu,
        )


def quadratic(
    eigenvalues: Sequence[float] | None = None,
    *,
    dimension: int | None = None,
    condition: float | None = None,
    seed: int = 0,
    rotate: bool = True,
) -> Quadratic:
    """A symmetric quadratic with a given spectrum, started at equal weight on every eigenvector.

    Args:
        eigenvalues: The spectrum; or give ``dimension`` and ``condition`` for eigenvalues spaced evenly in
            the logarithm from 1 to ``condition``.
        dimension: d.
        condition: The condition number, at least 1.
        seed: Draws the eigenvectors.
        rotate: Whether the eigenvectors are a random rotation (Haar) or the axes.

    Raises:
        LosslabError: If neither or both of the spectrum and (dimension, condition) are given, or are out of
            range.

    Example:
        >>> q = quadratic(dimension=3, condition=100)
        >>> torch.linalg.eigvalsh(q.A).round(decimals=9).tolist()
        [1.0, 10.0, 100.0]
    """
    spaced = dimension is not None and condition is not None
    if (eigenvalues is None) != spaced or (dimension is None) != (condition is None):
        raise LosslabError(
            "quadratic wants either eigenvalues, or both dimension and condition: pass one of the two"
        )
    if dimension is not None and condition is not None:
        spectrum = _spectrum(dimension, condition)
    else:
        spectrum = np.asarray(eigenvalues, dtype=np.float64)
    if spectrum.ndim != 1 or not len(spectrum):
        raise LosslabError(
            f"eigenvalues have shape {spectrum.shape}, a list of numbers was wanted: pass at least one"
        )
    basis = _rotation(np.random.default_rng(seed), len(spectrum)) if rotate else np.eye(len(spectrum))
    return Quadratic.of(torch.from_numpy((basis * spectrum) @ basis.T), start=basis.sum(axis=1).tolist())


def half_mse(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared distance, the mean over examples: ``sum_i |output_i - target_i|^2 / (2 n)``.

    torch's ``mse_loss`` also averages over the components and has no half; with this one the Hessian of a
    linear model is the second moment of its inputs.
    """
    return (output - target).square().sum(-1).mean() / 2


def linear_regression(
    n: int,
    dimension: int,
    condition: float = 1.0,
    noise: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Task:
    """Least squares whose Hessian ``X^T X / n`` has exactly the given condition number.

    ``y = X w + noise e`` with w and e standard normal; the eigenvalues of ``X^T X / n`` are spaced evenly in
    the logarithm from ``1 / condition`` to 1, the eigenvectors are random. The model is linear without a
    bias, the loss :func:`half_mse`.

    Args:
        n: Examples, at least ``dimension``.
        dimension: Inputs.
        condition: The condition number, at least 1.
        noise: Standard deviation of the noise on the targets.
        seed: Draws everything.
        dtype: Of the data and the model.

    Raises:
        LosslabError: If a number is out of range.

    Example:
        >>> task = linear_regression(50, 3, condition=100, dtype=torch.float64)
        >>> x, _ = task.train.all()
        >>> torch.linalg.eigvalsh(x.T @ x / 50).round(decimals=9).tolist()
        [0.01, 0.1, 1.0]
    """
    if n < dimension or noise < 0:
        raise LosslabError(
            f"linear_regression got n={n}, dimension={dimension}, noise={noise}: "
            "pass n >= dimension and noise >= 0"
        )
    rng = np.random.default_rng(seed)
    scales = np.sqrt(_spectrum(dimension, condition) / condition)
    left = np.linalg.qr(rng.standard_normal((n, dimension)))[0]
    x = np.sqrt(n) * (left * scales) @ _rotation(rng, dimension).T
    y = x @ rng.standard_normal((dimension, 1)) + noise * rng.standard_normal((n, 1))
    train = _data(x, y, dtype)
    return supervised(linear_net(dimension, 1).to(dtype), train, criterion=half_mse, name="linear_regression")


def teacher_student(
    inputs: int,
    teacher: int,
    student: int,
    n: int,
    seed: int = 0,
    activation: str = "tanh",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """A network learns a network: ``y = teacher(x)`` for standard normal x, one hidden layer each.

    The teacher's weights and biases are normal with variance 1 / fan-in, its last layer is scaled so that y
    has variance 1 on the training data. With ``student >= teacher`` the least loss is 0. The loss is
    :func:`half_mse`; n further examples are the test data.

    Args:
        inputs: Dimension of x.
        teacher: Hidden units of the teacher.
        student: Hidden units of the student.
        n: Training examples.
        seed: Draws the data and the teacher.
        activation: A name of :data:`losslab.tasks.models.ACTIVATIONS`, for both.
        dtype: Of the data and the model.

    Raises:
        LosslabError: If a size is not positive, n is below two, or the activation is unknown.

    Example:
        >>> teacher_student(2, 3, 4, n=10).model
        mlp(2, 4, 1, activation='tanh', bias=True, batch_norm=False, dropout=0.0)
    """
    if n < 2:
        raise LosslabError(f"teacher_student got n={n}: pass at least two examples")
    model = mlp(inputs, student, 1, activation=activation)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, inputs, generator=generator, dtype=torch.float64)
    y = _drawn(mlp(inputs, teacher, 1, activation=activation), generator)(x).detach()
    y = y / y[:n].std()
    train, test = (Data((x[part].to(dtype), y[part].to(dtype))) for part in (slice(n), slice(n, None)))
    return supervised(model.to(dtype), train, test, criterion=half_mse, name="teacher_student")


def _drawn(factory: Factory, generator: torch.Generator) -> nn.Module:
    """A float64 network with every weight and bias normal with variance 1 / fan-in."""
    with torch.random.fork_rng(devices=[]):  # the layers' own draws, thrown away
        module = factory().double()
    with torch.no_grad():
        for layer in module:  # type: ignore[attr-defined]
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise / layer.in_features**0.5)
    return module


def sparse_classification(
    n: int, features: int, exponent: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Task:
    """Logistic regression on binary features of which few are frequent and most are rare, after Zipf.

    Feature j (from 1) is 1 with probability ``p_j = j^-exponent / 2``, independently. The label is Bernoulli
    with the logit ``sum_j w_j (x_j - p_j)``, where w_j is normal with the variance ``9 / (features p_j (1 -
    p_j))``: every feature, rare or frequent, has the same share in the logit's variance of 9. This is the
    setting where adaptive rates are to help (Duchi, Hazan, Singer, Adaptive Subgradient Methods, 2011,
    section 1.3). n further examples are the test data.

    Args:
        n: Training examples.
        features: Features.
        exponent: Of Zipf's law; 0 makes all equally frequent.
        seed: Draws everything.
        dtype: Of the data and the model.

    Raises:
        LosslabError: If a number is out of range.

    Example:
        >>> x, y = sparse_classification(1000, 50).train.all()
        >>> bool(x[:, 0].mean() > 10 * x[:, -1].mean()), sorted(set(y.tolist()))
        (True, [0, 1])
    """
    if n < 1 or features < 1 or exponent < 0:
        raise LosslabError(
            f"sparse_classification got n={n}, features={features}, exponent={exponent}: "
            "pass n and features >= 1, exponent >= 0"
        )
    rng = np.random.default_rng(seed)
    p = np.arange(1, features + 1) ** -float(exponent) / 2
    weights = 3 * rng.standard_normal(features) / np.sqrt(features * p * (1 - p))
    x = (rng.random((2 * n, features)) < p).astype(np.float64)
    y = (rng.random(2 * n) < (1 + np.tanh((x - p) @ weights / 2)) / 2).astype(np.int64)
    train, test = _data(x[:n], y[:n], dtype), _data(x[n:], y[n:], dtype)
    model = logistic_regression(features, 2).to(dtype)
    return supervised(model, train, test, criterion=F.cross_entropy, name="sparse_classification")


def _spectrum(dimension: int, condition: float) -> np.ndarray:
    if dimension < 1 or not condition >= 1:
        raise LosslabError(
            f"the spectrum has dimension={dimension} and condition={condition}: pass both at least 1"
        )
    return np.geomspace(1.0, condition, dimension) if dimension > 1 else np.ones(1)


def _rotation(rng: np.random.Generator, dimension: int) -> np.ndarray:
    """A matrix uniform over the orthogonal group: QR, with the signs of R's diagonal put back."""
    q, r = np.linalg.qr(rng.standard_normal((dimension, dimension)))
    return q * np.sign(np.diag(r))


def _data(x: np.ndarray, y: np.ndarray, dtype: torch.dtype) -> Data:
    return Data(
        (torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype if y.dtype.kind == "f" else None))
    )
