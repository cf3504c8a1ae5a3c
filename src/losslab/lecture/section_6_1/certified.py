"""Searches for critical points whose ends are certified by the Hessian, as the tables of the section."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from losslab.curvature.critical import Critical, examine
from losslab.curvature.finding import flatten, minimise, refine
from losslab.engine import Objective, Points

if TYPE_CHECKING:
    import pandas as pd

ROUGH, FINE = 1e-6, 1e-9
"""Length of the gradient at which Newton's method takes over, and at which it has arrived."""


def certified_minima(
    objective: Objective, starts: Points, steps: int, rough: float = ROUGH, fine: float = FINE
) -> tuple[Points, pd.DataFrame]:
    """Where L-BFGS and Newton's method after it end, and what the Hessian says of the place.

    Args:
        objective: The loss.
        starts: Where the searches begin.
        steps: Steps of L-BFGS at most; Newton's method takes 20 at most.
        rough: Length of the gradient at which Newton's method takes over.
        fine: Length at which a search has arrived.

    Returns:
        The ends, and one row a start: ``value``, ``gradient``, ``smallest``, ``largest``, ``index``,
        ``kind``, ``fall``, ``certified`` (a minimum with a gradient of at most ``fine``).
    """
    down = minimise(objective, starts, tolerance=rough, steps=steps)
    exact = refine(objective, down.points, tolerance=fine, steps=20)
    return exact.points, _table(examine(objective, exact.points), fine)


def certified_saddles(
    objective: Objective, starts: Points, steps: int, newton: int = 8
) -> tuple[Points, pd.DataFrame]:
    """Where minimising the gradient's length ends; the table is that of `certified_minima`."""
    level = flatten(objective, starts, tolerance=1e-3, steps=steps)
    exact = refine(objective, level.points, tolerance=FINE, steps=newton)
    return exact.points, _table(examine(objective, exact.points), FINE)


def _table(found: Critical, fine: float) -> pd.DataFrame:
    import pandas as pd

    kinds = np.array([str(kind) for kind in found.kinds])
    gradient = found.gradient_norms.numpy()
    return pd.DataFrame(
        {
            "value": found.values.numpy(),
            "gradient": gradient,
            "smallest": found.smallest.numpy(),
            "largest": found.largest.numpy(),
            "index": found.index.numpy(),
            "kind": kinds,
            "fall": found.fall.numpy(),
            "certified": (kinds == "minimum") & (gradient <= fine),
        }
    )


def normal_starts(
    like: Points, scales: np.ndarray | torch.Tensor, generator: torch.Generator, fan_in: bool = True
) -> Points:
    """One start for each scale: weights ``scale N(0, 1 / fan-in)``, biases ``scale N(0, 1)``."""
    scale = torch.as_tensor(scales, dtype=torch.float64)
    weights = {}
    for name, w in like.weights.items():
        shape = w.shape[1:]
        z = torch.randn(len(scale), *shape, generator=generator, dtype=torch.float64)
        spread = shape[-1] ** -0.5 if fan_in and len(shape) > 1 else 1.0
        weights[name] = spread * scale.view(-1, *[1] * len(shape)) * z
    return Points(weights, {})
