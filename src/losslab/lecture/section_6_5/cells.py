"""Judging one law in many places at once: every layer, every size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Finding, Verdict
from losslab.lecture.verdicts import bound, law

if TYPE_CHECKING:
    import pandas as pd

_ORDER = (Verdict.FAILS, Verdict.MIXED, Verdict.UNDECIDED, Verdict.HOLDS)


def everywhere(
    name: str,
    table: pd.DataFrame,
    by: Sequence[str],
    value: str,
    theory: float = 1.0,
    tolerance: float = 0.05,
    wide: bool = False,
    note: str = "",
) -> Finding:
    """V4 in each group of rows; the finding is that of the group that does worst.

    The rows of a group are independent replicates, its interval is Student's. A law would be refuted by one
    interval that misses it, so the intervals cover in all groups together with 95 % (Bonferroni). To lie
    within the tolerance everywhere takes every interval, so there each covers with 95 %.

    Args:
        name: The finding's name.
        table: One row a (group, replicate).
        by: Columns that name the group.
        value: The column that is estimated, by its mean.
        theory: What the mean should be.
        tolerance: Relative, or absolute where the theory is 0.
        wide: The theory is that of infinite width, from which a finite network differs by a term that many
            replicates would resolve. Then the whole interval must lie within the tolerance, in place of V4.
        note: What else a reader must know.
    """
    groups = list(table.groupby(list(by), sort=False)[value])
    level = 0.95 if wide else 1 - 0.05 / len(groups)
    slack = tolerance * (abs(theory) or 1.0)
    found = []
    for key, values in groups:
        mean, ends = student_interval(values.to_numpy(), level)
        where = ", ".join(f"{column} {part}" for column, part in zip(by, key, strict=True))
        chosen = f"worst of {len(groups)}: {where}" if len(groups) > 1 else ""
        told = "; ".join(part for part in (chosen, note) if part)
        if wide:
            finding = bound(
                name, mean, ends, len(values), "mean with its 95 % interval",
                at_least=theory - slack, at_most=theory + slack, note=told,
            )  # fmt: skip
        else:
            finding = law(name, mean, ends, theory, tolerance, len(values), told)
            finding = dataclasses.replace(finding, test="mean with its 95 % interval")
        if len(values) < 2:
            told = "; ".join(part for part in (told, "one replicate has no interval") if part)
            finding = dataclasses.replace(finding, verdict=Verdict.UNDECIDED, note=told)
        found.append(finding)
    return min(found, key=lambda f: (_ORDER.index(f.verdict), -abs(f.estimate - theory)))


def student_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """The mean of independent replicates and Student's interval for it; infinite for a single one.

    Example:
        >>> mean, (low, high) = student_interval(np.array([1.0, 2.0, 3.0]))
        >>> mean, round(high - mean, 3)
        (2.0, 2.484)
    """
    from scipy.special import stdtrit

    mean, n = float(values.mean()), values.size
    if n < 2:
        return mean, (-np.inf, np.inf)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * float(values.std(ddof=1)) / n**0.5
    return mean, (mean - half, mean + half)
