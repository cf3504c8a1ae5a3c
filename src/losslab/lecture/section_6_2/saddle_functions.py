"""Gradient descent with and without noise at the saddles of functions of a few variables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.lecture.section_6_2.motion import first_passage, gradient_of, growth_time, mean_escape, walk
from losslab.rules import GD, SGD
from losslab.tasks import octopus, saddle

if TYPE_CHECKING:
    import pandas as pd

RATE = 0.1
RADIUS = 0.5
"""Where a run counts as escaped from the two-dimensional saddle: halfway to its minima at y = 1 and -1."""

NOISES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
OCTOPUS_NOISE = 0.1


def escapes(noises: Sequence[float], runs: int, resting_steps: int, seed: int = 14) -> pd.DataFrame:
    """Escape steps from the stable manifold y = 0 of ``x^2/2 - y^2/2 + y^4/4``, from random x.

    Gradient descent (noise 0) gets ``resting_steps``, SGD with normal gradient noise twice the mean escape
    time of the saddle's quadratic part.

    Returns:
        One row a (noise, run): ``steps``, infinite for never.
    """
    import pandas as pd

    gradient = gradient_of(saddle.f)
    rng = np.random.default_rng(seed)
    tables = []
    for k, noise in enumerate((0.0, *noises)):
        x = torch.from_numpy(rng.uniform(-1, 1, runs))
        start = torch.stack([x, torch.zeros(runs, dtype=torch.float64)], dim=1)
        limit = math.ceil(2 * mean_escape(RATE, 1.0, noise, RADIUS)) if noise else resting_steps
        points = walk((SGD if noise else GD)(lr=RATE), gradient, start, limit, noise, seed=seed + k)
        steps = first_passage(points, lambda p: p[:, 1].abs() >= RADIUS)
        tables.append(pd.DataFrame({"noise": noise, "run": range(runs), "limit": limit, "steps": steps}))
    return pd.concat(tables, ignore_index=True)


def paths(starts: Sequence[float], noise: float, runs: int, steps: int, seed: int = 140) -> pd.DataFrame:
    """Trajectories to draw: gradient descent from (1.3, y_0) for each y_0, and SGD runs from (-1.3, 0)."""
    import pandas as pd

    named = [(f"GD, y₀ = {y:g}", 1.3, y, 0.0) for y in starts]
    named += [(f"SGD, run {k + 1}", -1.3, 0.0, noise) for k in range(runs)]
    start = torch.tensor([[x, y] for _, x, y, _ in named], dtype=torch.float64)
    level = torch.tensor([[s] for *_, s in named], dtype=torch.float64)
    points = torch.stack(list(walk(SGD(lr=RATE), gradient_of(saddle.f), start, steps, level, seed)))
    return pd.DataFrame(
        {
            "path": np.tile([name for name, *_ in named], steps + 1),
            "step": np.repeat(np.arange(steps + 1), len(named)),
            "x": points[..., 0].ravel().numpy(),
            "y": points[..., 1].ravel().numpy(),
        }
    )


def horizon(dimension: int) -> int:
    """Twice the updates in which noisy gradient descent should pass all saddles of the octopus.

    Each of the d passages takes the growth of one step's noise to the length scale tau, at 1 + 2 eta gamma a
    step, and about 20 steps for the way from there to the minimum along that coordinate.
    """
    rate, tau = 1 / (4 * math.e), math.e
    return math.ceil(2 * dimension * (growth_time(tau / (rate * OCTOPUS_NOISE), 1 + 2 * rate) + 20))


def octopus_runs(dimensions: Mapping[int, int], runs: int, seed: int = 141) -> pd.DataFrame:
    """Gradient descent and SGD on the octopus, from the same uniform starts in [-1, 1]^d, at eta = 1/(4L).

    Args:
        dimensions: d -> the number of updates allowed.
        runs: Starts for each d.
        seed: Of starts and noise.

    Returns:
        One row a (dimension, rule, run): ``steps`` until every coordinate is within tau of its minimum, and
        ``passed``, the number of coordinates that are there at the end.
    """
    import pandas as pd

    tau = math.e
    tables = []
    for dimension, limit in dimensions.items():
        function = octopus(dimension)
        goal = torch.tensor(function.minima[0], dtype=torch.float64)
        starts = np.random.default_rng(seed + dimension).uniform(-1, 1, (runs, dimension))
        noise = torch.tensor([0.0, OCTOPUS_NOISE], dtype=torch.float64).repeat_interleave(runs)[:, None]

        def near(x: Tensor, goal: Tensor = goal) -> Tensor:
            return (x.abs() - goal).abs() <= tau

        # One stack holds both: without noise SGD's update is that of gradient descent.
        start = torch.from_numpy(np.tile(starts, (2, 1)))
        rule = SGD(lr=1 / (4 * math.e))
        points = list(walk(rule, gradient_of(function.f), start, limit, noise, seed))
        tables.append(
            pd.DataFrame(
                {
                    "dimension": dimension,
                    "rule": np.repeat(["GD", "SGD"], runs),
                    "run": np.tile(np.arange(runs), 2),
                    "limit": limit,
                    "steps": first_passage(points, lambda x: near(x).all(dim=1)),
                    "passed": near(points[-1]).sum(dim=1).numpy(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
