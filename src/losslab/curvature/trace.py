"""Trace and diagonal of a matrix known by its products, with intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from losslab.curvature.lanczos import Symmetric
from losslab.curvature.probes import Estimate, around, check, estimate, multiply, signs, size_of
from losslab.engine.randomness import generator as seeded_generator
from losslab.errors import unknown

METHODS = ("hutchinson", "hutch++")


def trace(
    matrix: Symmetric,
    products: int = 30,
    method: str = "hutch++",
    *,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The trace, from random z with ``E z z^T = 1``, so that ``E z^T H z = tr H``.

    - ``"hutchinson"``: the mean of ``z^T H z``; its error falls as ``1 / sqrt(products)`` (Hutchinson, 1990).
    - ``"hutch++"``: a third of the products finds a basis Q that holds the large eigenvalues, a third takes
      their trace ``tr Q^T H Q`` exactly, and a third estimates the rest; its error falls as ``1 / products``
      where a few eigenvalues make up the trace (Meyer, Musco, Musco and Woodruff, Hutch++, 2021, Alg. 1),
      here with probes uniform on the sphere of what Q leaves.

    The interval is Student's over the probes of the part that is random: exact in the limit of many probes,
    near its level from about ten.

    Args:
        matrix: An `Operator`, or a dense symmetric tensor.
        products: Budget; six at least for ``"hutch++"``.
        method: One of the above.
        level: Of the interval.
        generator: For the probes; a fixed one by default.

    Returns:
        The estimate, a scalar (``[N]`` at N points). With a basis that spans everything it is exact, and the
        interval a point.

    Example:
        >>> import torch
        >>> print(trace(torch.diag(torch.tensor([4.0, 2.0, 1.0]))))
        7 [7, 7] at 95%, 3 products
    """
    if method not in METHODS:
        raise unknown("way to a trace", method, METHODS)
    draws = seeded_generator(0, "trace") if generator is None else generator
    members, size = size_of(matrix)
    if products >= size:
        return _exact(matrix, level)
    if method == "hutchinson":
        check(products, level)
        return _rest(matrix, products, None, torch.zeros(members, dtype=torch.float64), level, draws, 0)
    share = products // 3
    check(share, level)
    sketch = multiply(matrix, signs(matrix, share, draws))
    basis = torch.linalg.qr(sketch.reshape(members, size, share)).Q
    inside = multiply(matrix, basis if len(matrix.shape) == 3 else basis[0]).reshape(basis.shape)
    known = (basis * inside).sum((1, 2), dtype=torch.float64)
    return _rest(matrix, products - 2 * share, basis, known, level, draws, 2 * share)


def _exact(matrix: Symmetric, level: float) -> Estimate:
    members, size = size_of(matrix)
    value = _squeezed(matrix, _by_units(matrix, members, size).reshape(members, size).sum(1))
    return Estimate(value, value, value, level, 0, size)


def _rest(
    matrix: Symmetric,
    probes: int,
    basis: Tensor | None,
    known: Tensor,
    level: float,
    draws: torch.Generator,
    spent: int,
) -> Estimate:
    """The trace of ``(1 - Q Q^T) H (1 - Q Q^T)`` from probes, plus what is known of the rest."""
    members, size = size_of(matrix)
    columns = signs(matrix, probes, draws).expand(members, -1, -1)
    if basis is not None:
        # Uniform on the sphere of what Q leaves: of known length, as signs are in the whole space.
        drawn = torch.randn(probes, size, generator=draws, dtype=basis.dtype).mT.to(basis.device)
        for _ in range(2):
            drawn = drawn - basis @ (basis.mT @ drawn)
        columns = drawn * (
            (size - basis.shape[2]) ** 0.5 / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
        )
    products = multiply(matrix, columns if len(matrix.shape) == 3 else columns[0]).reshape(columns.shape)
    samples = (columns * products).sum(1, dtype=torch.float64).mT
    found = estimate(samples, level, spent + probes, known.to(samples.device))
    return found.map(lambda t: _squeezed(matrix, t))


def diagonal(
    matrix: Symmetric,
    probes: int = 30,
    *,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The diagonal, from random signs z: ``E z * (H z) = diag H`` (Bekas, Kokiopoulou and Saad, 2007).

    Args:
        matrix: An `Operator`, or a dense symmetric tensor.
        probes: Random vectors, one product each; from P on, unit vectors give the diagonal exactly.
        level: Of each coordinate's own interval.
        generator: For the probes; a fixed one by default.

    Returns:
        The estimate, ``[P]`` (``[N, P]`` at N points).

    Raises:
        LosslabError: Fewer than two probes.

    Example:
        >>> import torch
        >>> diagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).value
        tensor([2., 3.], dtype=torch.float64)
    """
    check(probes, level)
    members, size = size_of(matrix)
    if probes >= size:
        value = _by_units(matrix, members, size)
        return Estimate(value, value, value, level, 0, size)
    draws = seeded_generator(0, "diagonal") if generator is None else generator
    sums = torch.zeros(2, members, size, dtype=torch.float64, device=matrix.device)
    for _ in range(probes):
        z = signs(matrix, 1, draws)
        sample = (z * multiply(matrix, z)).reshape(members, size).double()
        sums += torch.stack([sample, sample.square()])
    mean = sums[0] / probes
    spread = ((sums[1] - probes * mean.square()).clamp_min(0) / (probes - 1)).sqrt()
    return around(mean, spread, level, probes, probes).map(lambda t: _squeezed(matrix, t))


def _by_units(matrix: Symmetric, members: int, size: int) -> Tensor:
    parts = []
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    for a in range(0, size, 64):
        count = min(64, size - a)
        units = torch.zeros(size, count, dtype=dtype, device=matrix.device)
        units[range(a, a + count), range(count)] = 1.0
        block = multiply(matrix, units).reshape(members, size, count)
        parts.append(block[:, a : a + count].diagonal(dim1=1, dim2=2).double())
    return _squeezed(matrix, torch.cat(parts, dim=1))


def _squeezed(matrix: Symmetric, t: Tensor) -> Tensor:
    return t[0] if len(matrix.shape) == 2 else t


__all__ = ["diagonal", "trace"]
