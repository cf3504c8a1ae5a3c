"""The level at which SGD with a constant rate stalls, on a noisy quadratic that is solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from losslab.lecture.section_6_2.motion import walk
from losslab.rules import SGD
from losslab.tasks import Quadratic, quadratic

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

DIMENSION, CONDITION = 20, 100.0
RATES = tuple(0.2 * 2 ** (-k / 2) for k in range(7))
"""Learning rates times L: above them the floor bends away from a straight line by more than 1 %."""


def problem() -> Quadratic:
    """A quadratic in 20 dimensions, eigenvalues from 1/100 to 1, with its axes as eigenvectors."""
    return quadratic(list(np.geomspace(1 / CONDITION, 1.0, DIMENSION)), rotate=False)


def expected_excess(
    eigenvalues: NDArray[np.float64], rate: float, start: NDArray[np.float64], steps: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The mean of f after t steps of SGD with gradient noise N(0, I), without any approximation.

    The i-th component has ``E e_t^2 = r^{2t} e_0^2 + eta^2 (1 - r^{2t}) / (1 - r^2)`` with ``r = 1 - eta
    lambda_i``, which solves ``v_{t+1} = r^2 v_t + eta^2``; and f is ``sum_i lambda_i e_i^2 / 2``.

    Args:
        eigenvalues: ``[d]``, positive.
        rate: eta, below 2 / max lambda.
        start: e_0 in the eigenvectors, ``[d]``.
        steps: t, ``[T]``.

    Example:
        >>> expected_excess(np.array([1.0]), 0.5, np.array([4.0]), np.array([0, 1])).tolist()
        [8.0, 2.125]
    """
    squared = (1 - rate * eigenvalues) ** 2
    faded = squared ** steps[:, None]
    second = faded * start**2 + rate**2 * (1 - faded) / (1 - squared)
    return (eigenvalues * second / 2).sum(axis=1)


def excess_under_noise(
    rates: Sequence[float], runs: int, settle: int, steps: int, every: int = 10, seed: int = 11
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """SGD with noise N(0, I) in each gradient, at several rates.

    Args:
        rates: Learning rates times L, where L = 1.
        runs: Independent runs of each.
        settle: Updates before the floor is measured.
        steps: Updates in all.
        every: Updates between two looks.
        seed: Of the noise.

    Returns:
        ``floor``, one row a (rate, run): the mean of f from ``settle`` on, and the exact expectation of that;
        and ``course``, one row a (rate, step): the mean of f over the runs, and its exact expectation.
    """
    import pandas as pd

    bowl = problem()
    values = torch.diagonal(bowl.A).numpy()
    start = np.full(DIMENSION, 3.0)
    rate = torch.tensor(rates, dtype=torch.float64).repeat_interleave(runs)
    points = walk(
        SGD(lr=rate),
        lambda x: x * torch.from_numpy(values),
        torch.from_numpy(start).expand(len(rate), DIMENSION),
        steps,
        noise=1.0,
        seed=seed,
    )
    looks, heights = [], []
    for step, x in enumerate(points):
        if step % every == 0:
            looks.append(step)
            heights.append(bowl.f(x))
    seen = np.array(looks)
    height = torch.stack(heights).view(len(looks), len(rates), runs).numpy()
    exact = np.stack([expected_excess(values, eta, start, seen) for eta in rates], axis=1)
    late = seen >= settle
    floor = pd.DataFrame(
        {
            "rate": np.repeat(rates, runs),
            "run": np.tile(np.arange(runs), len(rates)),
            "excess": height[late].mean(axis=0).ravel(),
            "exact": np.repeat(exact[late].mean(axis=0), runs),
        }
    )
    shown = np.unique(np.geomspace(1, len(seen) - 1, 120).astype(int))
    course = pd.DataFrame(
        {
            "rate": np.tile(rates, len(shown)),
            "step": np.repeat(seen[shown], len(rates)),
            "excess": height[shown].mean(axis=2).ravel(),
            "exact": exact[shown].ravel(),
        }
    )
    return floor, course
