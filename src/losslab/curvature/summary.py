"""Condition number, stability limit and the table of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losslab.curvature.eigen import Eigenpairs, eigenpairs
from losslab.curvature.lanczos import Symmetric
from losslab.curvature.operator import Operator
from losslab.curvature.trace import trace

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Condition:
    """A condition number ``lambda_max / lambda_min`` with what is certain of it; ``[N]`` at N points.

    Attributes:
        value: The quotient; infinite where the smallest eigenvalue is zero or negative.
        low: The least it can be, given the residuals.
        high: The most; infinite where zero lies within the smallest eigenvalue's error.
        pairs: The two eigenpairs.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    pairs: Eigenpairs


def condition(matrix: Symmetric, *, tol: float = 1e-6, **settings: Any) -> Condition:
    """The condition number of a positive definite matrix from both ends of its spectrum.

    A number near ``1 / tol`` or above it is not resolved; then ``high`` is infinite.

    Args:
        matrix: An `Operator`, or a dense symmetric tensor.
        tol: As for `eigenpairs`; single precision does not reach much below 1e-5.
        **settings: As for `eigenpairs`.

    Example:
        >>> import torch
        >>> round(float(condition(torch.diag(torch.tensor([1.0, 2.0, 50.0]).double())).value), 6)
        50.0
    """
    pairs = eigenpairs(matrix, 1, "both ends", tol=tol, **settings)
    (least, most), (under, over) = pairs.values.unbind(-1), pairs.bounds.unbind(-1)
    return Condition(
        _quotient(most, least),
        _quotient(most - over, least + under),
        _quotient(most + over, least - under),
        pairs,
    )


def _quotient(most: Tensor, least: Tensor) -> Tensor:
    return torch.where(least > 0, most / least.clamp_min(torch.finfo(torch.float64).tiny), math.inf)


def stability_sentence(lr: float, largest: float, error: float = 0.0) -> str:
    """What a learning rate of gradient descent means beside the largest eigenvalue.

    On a quadratic, gradient descent converges along an eigenvector if and only if ``lr < 2 / lambda``.

    Example:
        >>> stability_sentence(0.1, 64.0)
        'learning rate 0.1 is 3.2 times the stability limit 2/lambda_max = 0.03125'
    """
    if not largest > 0:
        return f"no direction curves upwards (lambda_max = {largest:.4g}): no learning rate is too large here"
    limit = 2 / largest
    told = f"learning rate {lr:g} is {lr / limit:.2g} times the stability limit 2/lambda_max = {limit:.4g}"
    if error > 0 and (lr * (largest - error) < 2) != (lr * (largest + error) < 2):
        told += ", too near to it for the error of lambda_max to tell on which side"
    return told


def by_layer(operator: Operator, *, tol: float = 1e-2, products: int = 30) -> pd.DataFrame:
    """One row a parameter: its own block of the matrix, as if the others were held.

    Args:
        operator: At one point.
        tol: As for `eigenpairs`.
        products: As for `trace`.

    Returns:
        Columns ``layer``, ``parameters``, ``largest`` and ``smallest`` eigenvalue with ``largest_error`` and
        ``smallest_error``, ``converged``, ``trace`` with ``trace_low`` and ``trace_high``, and
        ``mean_eigenvalue``.

    Example:
        >>> from losslab.curvature import Hessian
        >>> from losslab.engine import Objective, Points
        >>> from losslab.tasks import digits_task
        >>> task = digits_task()
        >>> hessian = Hessian(Objective(task), Points.from_modules([task.model()]))
        >>> by_layer(hessian).parameters.tolist()
        [2048, 32, 320, 10]
    """
    import pandas as pd

    rows = []
    for name in operator.names:
        block = operator.restrict(name)
        pairs = eigenpairs(block, 1, "both ends" if block.size > 1 else "largest", tol=tol)
        estimate = trace(block, products)
        rows.append(
            {
                "layer": name,
                "parameters": block.size,
                "largest": float(pairs.values[-1]),
                "largest_error": float(pairs.bounds[-1]),
                "smallest": float(pairs.values[0]),
                "smallest_error": float(pairs.bounds[0]),
                "converged": pairs.complete,
                "trace": float(estimate.value),
                "trace_low": float(estimate.low),
                "trace_high": float(estimate.high),
                "mean_eigenvalue": float(estimate.value) / block.size,
            }
        )
    return pd.DataFrame(rows)


__all__ = ["Condition", "by_layer", "condition", "stability_sentence"]
