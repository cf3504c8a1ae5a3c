"""What kind of point this is: minimum, saddle, flat, or none of them, with the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from losslab.curvature.eigen import eigenpairs
from losslab.curvature.finding import dense, placed
from losslab.curvature.products import Hessian
from losslab.engine import Objective, Points
from losslab.engine.randomness import generator
from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd

DENSE = 1500
"""Most weights for which the whole spectrum is computed."""

KINKED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
    nn.Threshold, nn.Softshrink, nn.Hardshrink, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.L1Loss,
)  # fmt: skip
"""Layers whose derivative jumps."""


class Kind(StrEnum):
    """What a point is, as far as numbers can tell."""

    MINIMUM = "minimum"
    SADDLE = "strict saddle"
    MAXIMUM = "maximum"
    FLAT = "flat"
    NOT_CRITICAL = "not critical"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Critical:
    """N points examined.

    Attributes:
        kinds: One verdict a point.
            ``minimum``: within the tolerances, no gradient and no negative curvature; eigenvalues of zero are
            allowed, so a degenerate saddle whose fall begins at third order is told as a minimum too.
            ``strict saddle``: no gradient and negative curvature. ``maximum``: no gradient, all curvature
            negative. ``flat``: neither gradient nor curvature. ``not critical``: a gradient. ``undecided``:
            an eigenvalue's bounds lie on both sides of the tolerance.
        values: The loss, ``[N]``.
        gradient_norms: Length of the gradient, ``[N]``.
        relative: The gradient in units of the largest |eigenvalue| and the weights' size, ``[N]``: about how
            far the critical point is, as a share of the weights.
        smallest: The lowest eigenvalue, ``[N]``.
        largest: The highest, ``[N]``.
        bounds: How far those two may be from an eigenvalue, ``[N]``.
        index: Eigenvalues below zero by more than the tolerance, ``[N]``; a lower bound if not ``exact``.
        zeros: Eigenvalues within the tolerance of zero, ``[N]``; -1 if not ``exact``.
        exact: Whether the whole spectrum was computed.
        escape: The eigenvector of the lowest eigenvalue, ``[N, P]``.
        fall: By how much the loss was seen to fall along it, the best of a few lengths, as a share of what
            the curvature promises, ``[N]``; NaN where there is no negative curvature.
        mismatch: How far the loss along it is from its own parabola, in units of the parabola, ``[N]``: of
            order 1 where a kink is crossed, so that second derivatives say little.
        kinks: Layers of the network whose derivative jumps, by class name.
    """

    kinds: list[Kind]
    values: Tensor
    gradient_norms: Tensor
    relative: Tensor
    smallest: Tensor
    largest: Tensor
    bounds: Tensor
    index: Tensor
    zeros: Tensor
    exact: bool
    escape: Tensor
    fall: Tensor
    mismatch: Tensor
    kinks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    def __str__(self) -> str:
        counts = {kind: self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)}
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        if not self.kinks:
            return told
        return f"{told}; {', '.join(self.kinks)} have kinks, across which second derivatives say nothing"

    def table(self) -> pd.DataFrame:
        """One row a point; all but the escape directions."""
        import pandas as pd

        names = ("values", "gradient_norms", "relative", "smallest", "largest", "bounds", "index", "zeros")
        columns = {name: getattr(self, name).cpu().numpy() for name in (*names, "fall", "mismatch")}
        return pd.DataFrame({"kind": [str(kind) for kind in self.kinds], **columns})


def examine(
    objective: Objective,
    points: Points,
    gradient_tolerance: float | None = None,
    curvature_tolerance: float | None = None,
    dense_up_to: int = DENSE,
    seed: int = 0,
) -> Critical:
    """Says of each point whether it is critical, and of which kind.

    With ``rho = max(|theta|, 1)``, ``top`` the largest |eigenvalue| and ``L`` the loss:

    - critical: ``|g| <= gradient_tolerance * top * rho``;
    - negative curvature: an eigenvalue below ``-curvature_tolerance * top``, its bound included;
    - flat: ``top rho^2 <= curvature_tolerance |L|`` and ``|g| rho <= gradient_tolerance |L|``.

    Multiplying the loss by any number changes nothing. Up to ``dense_up_to`` weights the whole spectrum is
    computed, beyond that its two ends by Lanczos, with bounds from the residuals.

    Args:
        objective: The loss on fixed examples.
        points: N of them.
        gradient_tolerance: 1e-6 in float64, 1e-3 in float32 unless given.
        curvature_tolerance: 1e-8 of the largest eigenvalue in float64 (the rounding of a Hessian), 1e-4 in
            float32 unless given; by Lanczos at least 1e-3.
        dense_up_to: Weights up to which the Hessian is made.
        seed: Of Lanczos' start.

    Raises:
        LosslabError: Weights that are not finite.

    Example:
        >>> from losslab.tasks import function_task, saddle
        >>> objective = Objective(function_task(saddle))
        >>> at = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
        >>> found = examine(objective, Points({"x": at}, {}))
        >>> print(found)
        1 strict saddle, 1 minimum, 1 not critical
        >>> found.smallest
        tensor([-1.0000,  1.0000, -0.2500], dtype=torch.float64)
    """
    theta = points.matrix().detach()
    double = theta.dtype == torch.float64
    near = (1e-6 if double else 1e-3) if gradient_tolerance is None else gradient_tolerance
    level = (1e-8 if double else 1e-4) if curvature_tolerance is None else curvature_tolerance
    values, gradients = objective.gradient(points)
    slopes = gradients.matrix()
    norms = slopes.norm(dim=1)
    exact = points.parameters <= dense_up_to
    spectrum = _whole(objective, points) if exact else _ends(objective, points, seed)
    if not exact and curvature_tolerance is None:
        level = max(level, 1e-3)
    smallest, largest, bounds = spectrum.values[:, 0], spectrum.values[:, -1], spectrum.bounds
    top = torch.maximum(smallest.abs(), largest.abs())
    rho = theta.norm(dim=1).clamp(min=1.0)
    height = values.abs().to(top)
    flat = (top * rho.square() <= level * height) & (norms * rho <= near * height)
    critical = flat | (norms <= near * top * rho)
    floor = level * top
    negative = smallest + bounds < -floor
    settled = negative | (smallest - bounds >= -floor)
    fall, mismatch = _along(objective, points, spectrum.escape, smallest, slopes, rho)
    index = (spectrum.values < -floor[:, None]).sum(1)
    zeros = (spectrum.values.abs() <= floor[:, None]).sum(1) if exact else torch.full_like(index, -1)
    kinds = [
        _kind(*row)
        for row in zip(
            flat.tolist(),
            critical.tolist(),
            negative.tolist(),
            (largest + bounds < -floor).tolist(),
            settled.tolist(),
            strict=True,
        )
    ]
    relative = norms / (top * rho).clamp(min=torch.finfo(top.dtype).tiny)
    fall = torch.where(negative & critical, fall, torch.nan)
    told = (values, norms, relative, smallest, largest, bounds, index, zeros, exact, spectrum.escape)
    return Critical(kinds, *told, fall, mismatch, kinked(objective))


def _kind(flat: bool, critical: bool, negative: bool, downward: bool, settled: bool) -> Kind:
    if flat:
        return Kind.FLAT
    if not critical:
        return Kind.NOT_CRITICAL
    if not settled:
        return Kind.UNDECIDED
    if downward:
        return Kind.MAXIMUM
    return Kind.SADDLE if negative else Kind.MINIMUM


def kinked(objective: Objective) -> tuple[str, ...]:
    """Classes of the network's layers whose derivative jumps; those called as functions are not seen.

    Example:
        >>> from losslab.tasks import digits_task
        >>> kinked(Objective(digits_task()))
        ('ReLU',)
    """
    layers = objective.module.modules()
    return tuple(dict.fromkeys(type(layer).__name__ for layer in layers if isinstance(layer, KINKED)))


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues in ascending order ``[N, k]``, bounds ``[N]``, the lowest's vector ``[N, P]``."""

    values: Tensor
    bounds: Tensor
    escape: Tensor


def _whole(objective: Objective, points: Points) -> _Spectrum:
    values, vectors = torch.linalg.eigh(_finite(dense(objective, points)))
    rounding = torch.finfo(values.dtype).eps * values.abs().amax(1) * values.shape[1] ** 0.5
    return _Spectrum(values, rounding, vectors[:, :, 0])


def _finite(matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise LosslabError(
            "the Hessian is not finite: the weights are not, or the loss has no second derivative there"
        )
    return matrix


def _ends(objective: Objective, points: Points, seed: int) -> _Spectrum:
    found = eigenpairs(
        Hessian(objective, points), 1, which="both ends", tol=1e-4, generator=generator(seed, "critical")
    )
    values = found.values.reshape(points.members, 2)
    bounds = found.residuals.reshape(points.members, 2).amax(1)
    vectors = found.vectors.reshape(points.members, -1, 2)
    return _Spectrum(values, bounds, vectors[:, :, 0])


def _along(
    objective: Objective, points: Points, escape: Tensor, curvature: Tensor, slopes: Tensor, rho: Tensor
) -> tuple[Tensor, Tensor]:
    """The fall along ``escape`` as a share of what its curvature promises, and the parabola's mismatch."""
    theta, start = points.matrix().detach(), objective.value(points)
    across = (slopes * escape).sum(1)
    half = curvature / 2
    best, worst = torch.zeros_like(curvature), torch.full_like(curvature, torch.inf)
    noise = 16 * torch.finfo(theta.dtype).eps * start.abs().to(curvature)
    for share in (1e-1, 1e-2, 1e-3, 1e-4):
        length = share * rho
        rises = []
        for sign in (1.0, -1.0):
            there = placed(points, theta + (sign * length)[:, None] * escape)
            rises.append((objective.value(there) - start).to(curvature) - sign * length * across)
        promised = half * length.square()
        best = torch.maximum(best, torch.minimum(*rises) / promised)
        apart = torch.maximum(*((r - promised).abs() for r in rises)) / promised.abs()
        # Where the parabola is no larger than rounding, nothing can be seen.
        seen = promised.abs() > 1e3 * noise
        worst = torch.where(seen, torch.minimum(worst, apart), worst)
    return best, torch.where(torch.isinf(worst), torch.nan, worst)
