"""Scaling of inputs: standardisation and whitening, fitted on some data and applied to any."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from losslab.errors import LosslabError, unknown

KINDS = ("pca", "zca")


@dataclass(frozen=True, eq=False)
class Affine:
    """The map ``x -> (x - mean) matrix``, or ``(x - mean) * scale`` where the matrix is diagonal.

    Attributes:
        mean: ``[d]``, float64.
        scale: ``[d]``, float64; or None.
        matrix: ``[d, k]``, float64; or None.
        constant: Which features were constant in the data it was fitted to, ``[d]``, bool.
        shape: Of one example, with d numbers.
    """

    mean: Tensor
    scale: Tensor | None
    matrix: Tensor | None
    constant: Tensor
    shape: torch.Size = field(default_factory=torch.Size)

    def __call__(self, x: Tensor) -> Tensor:
        """Map examples ``[n, *shape]`` in their own precision; whole numbers become float32.

        Returns:
            ``[n, *shape]``; ``[n, k]`` where the map leaves k < d coordinates.

        Raises:
            LosslabError: The examples have another shape than those it was fitted to.
        """
        if x.ndim < 1 or x.shape[1:] != self.shape:
            raise LosslabError(
                f"the scaling was fitted to examples of shape {list(self.shape)} and got {list(x.shape)}: "
                "pass [examples, *shape]"
            )
        flat = _floating(x).flatten(1)
        # A mean that is large beside its feature's spread has too few digits in single precision.
        centred = (flat.double() - self.mean.to(flat.device)).to(flat)
        if self.matrix is None:
            assert self.scale is not None
            return (centred * self.scale.to(flat)).reshape(x.shape)
        y = centred @ self.matrix.to(flat)
        return y.reshape(x.shape) if y.shape[1] == flat.shape[1] else y


def standardise(x: Tensor) -> Affine:
    """``x_j -> (x_j - mean_j) / std_j`` for each feature j, with the mean and biased deviation of the data.

    A feature that is constant in the data but for rounding is centred and not divided: it becomes 0 there.

    Args:
        x: ``[n, *shape]``, at least two examples; fitted in float64.

    Raises:
        LosslabError: Fewer than two examples, numbers that are not finite, or only constant features.

    Example:
        >>> scale = standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> scale(torch.tensor([[1.0, 5.0], [4.0, 5.0]]))
        tensor([[-1.,  0.],
                [ 2.,  0.]])
    """
    _, mean, spread, constant = _moments(x)
    scale = torch.where(constant, 1.0, spread).reciprocal()
    return Affine(mean, scale, None, constant, x.shape[1:])


def whiten(x: Tensor, kind: str = "pca", eps: float = 0.0) -> Affine:
    """The linear map after which the data have mean 0 and the identity as their covariance.

    With the biased covariance ``V diag(l) V^T`` the map is ``V diag(l + eps l_mean)^(-1/2)`` (``"pca"``: the
    coordinates are those along the principal axes, the largest first), followed by ``V^T`` for ``"zca"``
    (the whitened data closest to the centred ones).

    Directions in which the data do not vary, constant features among them, cannot be whitened: pca leaves
    them out, zca maps them to 0.

    Args:
        x: ``[n, *shape]``, at least two examples; fitted in float64.
        kind: ``"pca"`` or ``"zca"``.
        eps: Added to every eigenvalue, in units of their mean: it keeps directions of tiny variance, mostly
            noise, from being blown up. The variance along eigenvector i becomes ``l_i / (l_i + eps l_mean)``.

    Raises:
        LosslabError: As for `standardise`; an unknown kind, or a negative eps.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
        >>> whiten(x)(x).T.cov(correction=0).round(decimals=4).abs()
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    if kind not in KINDS:
        raise unknown("whitening", kind, KINDS)
    if not 0 <= eps < float("inf"):
        raise LosslabError(f"eps is {eps}: pass a finite number of at least 0")
    flat, mean, _, constant = _moments(x)
    centred = torch.where(constant, 0.0, flat - mean)
    # The singular values of the data, not the eigenvalues of their covariance: twice the digits.
    _, singular, axes = torch.linalg.svd(centred / len(flat) ** 0.5, full_matrices=False)
    varies = singular > singular[0] * max(flat.shape) * torch.finfo(torch.float64).eps
    values, axes = singular[varies].square(), axes[varies].T
    matrix = axes * (values + eps * values.sum() / flat.shape[1]).rsqrt()
    return Affine(mean, None, matrix if kind == "pca" else matrix @ axes.T, constant, x.shape[1:])


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The data ``[n, d]`` in float64, their means and deviations ``[d]``, and which are constant."""
    if x.ndim < 2 or len(x) < 2 or not x[0].numel():
        raise LosslabError(
            f"the data have shape {list(x.shape)}: pass [examples, features] with at least two examples"
        )
    flat = _floating(x).detach().flatten(1).double()
    lost = ~torch.isfinite(flat)
    if bool(lost.any()):
        row, column = torch.nonzero(lost)[0].tolist()
        raise LosslabError(
            f"{int(lost.sum())} numbers of the data are not finite, the first in example {row}, "
            f"feature {column}: remove or replace them"
        )
    mean, spread = flat.mean(0), flat.std(0, correction=0)
    # In the data's own precision a constant may carry rounding, relative to its size.
    rounding = 4 * torch.finfo(_floating(x).dtype).eps
    constant = spread <= rounding * flat.abs().amax(0)
    if bool(constant.all()):
        raise LosslabError(
            f"all {constant.numel()} features are constant, so there is no spread to scale: check the data"
        )
    return flat, mean, spread, constant


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()
