"""How many iterations the first methods of the section need on ill-conditioned quadratics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from losslab.lecture.claim import Finding
from losslab.lecture.section_6_3.landscapes import Bowls
from losslab.lecture.statistics import fit_power_law
from losslab.lecture.verdicts import law
from losslab.rules import GD, Momentum, Newton, Rule

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

CONDITIONS = (10.0, 30.0, 100.0, 300.0, 1000.0)
TARGET = 1e-12
"""f / f(start) at which a run counts as done."""

DIMENSION = 20


class Method(NamedTuple):
    """A rule set for a quadratic with eigenvalues from mu to L.

    Attributes:
        rule: mu and L, one value a member -> the rule at its best fixed rate.
        contraction: The condition number -> the factor by which the distance to the minimum shrinks an
            iteration.
    """

    rule: Callable[[Tensor, Tensor], Rule]
    contraction: Callable[[float], float]


def heavy_ball(mu: Tensor, L: Tensor) -> Momentum:
    """Polyak's momentum at its best rate and decay."""
    shrink = (L.sqrt() - mu.sqrt()) / (L.sqrt() + mu.sqrt())
    return Momentum(lr=4 / (L.sqrt() + mu.sqrt()) ** 2, beta=shrink**2)


METHODS: dict[str, Method] = {
    "gradient descent": Method(lambda mu, L: GD(lr=2 / (mu + L)), lambda k: (k - 1) / (k + 1)),
    "momentum": Method(heavy_ball, lambda k: (k**0.5 - 1) / (k**0.5 + 1)),
    "Newton": Method(lambda mu, L: Newton(), lambda k: 0.0),
    "Newton, η = 1/2": Method(lambda mu, L: Newton(lr=0.5), lambda k: 0.5),
}


def theory(method: str, kappa: float, fall: float = TARGET) -> float:
    """Iterations until f, which shrinks by the square of the contraction, has fallen by a factor.

    Example:
        >>> round(theory("gradient descent", 100.0), 1), theory("Newton", 100.0)
        (690.8, 1.0)
    """
    shrink = METHODS[method].contraction(kappa)
    return 1.0 if shrink == 0 else float(np.log(fall) / (2 * np.log(shrink)))


def iterations(
    methods: Sequence[str],
    conditions: Sequence[float],
    seeds: Sequence[int],
    levels: Sequence[float] = (TARGET,),
    dimension: int = DIMENSION,
) -> pd.DataFrame:
    """Iterations of each method on random quadratics until f / f(start) is below each level.

    Returns:
        One row a (method, level, condition number, seed): ``method``, ``level``, ``kappa``, ``seed``,
        ``iterations`` (inf where the level was not reached), ``theory``.
    """
    import pandas as pd

    pairs = [(kappa, seed) for kappa in conditions for seed in seeds]
    bowls = Bowls.of([kappa for kappa, _ in pairs], [seed for _, seed in pairs], dimension)
    tables = []
    for method in methods:
        worst = max(theory(method, kappa, min(levels)) for kappa in conditions)
        rule = METHODS[method].rule(bowls.mu, bowls.L)
        found = bowls.crossings(rule, levels, limit=50 + 2 * int(worst))
        for level, counts in zip(levels, found.tolist(), strict=True):
            table = pd.DataFrame(pairs, columns=["kappa", "seed"]).assign(method=method, level=level)
            predicted = [theory(method, kappa, level) for kappa in table.kappa]
            tables.append(table.assign(iterations=counts, theory=predicted))
    return pd.concat(tables, ignore_index=True)


def power_of_kappa(name: str, kappa: ArrayLike, counts: ArrayLike, theory: float, note: str = "") -> Finding:
    """The power of the condition number with which iterations grow, against theory (V4): a fit to all runs.

    Args:
        name: The finding's name.
        kappa: Condition number of each run.
        counts: Iterations of each run.
        theory: The power.
        note: What else a reader must know.
    """
    fit = fit_power_law(kappa, counts)
    return law(name, fit.slope, fit.slope_interval, theory, n=fit.n, note=note)
