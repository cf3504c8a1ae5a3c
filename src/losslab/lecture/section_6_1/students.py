"""ReLU students of a ReLU teacher on normal inputs, whose expected loss has a closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from losslab.curvature.finding import dense
from losslab.engine import Objective, Points
from losslab.lecture.section_6_1.certified import certified_minima
from losslab.lecture.training import trained
from losslab.rules import GD
from losslab.tasks import Batch, Task

if TYPE_CHECKING:
    import pandas as pd

BAD = 1e-3
"""Expected loss above which a minimum is not global; the global one is 0, the bad ones are near 0.02."""


class Students(nn.Module):
    """``sum_i relu(w_i x)`` beside the teacher ``sum_i relu(x_i)``.

    Args:
        students: Rows of the weights.
        teachers: Units of the teacher, whose weights are the unit vectors; also the inputs.
    """

    def __init__(self, students: int, teachers: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (students + teachers))  # Xavier's uniform
        weight = torch.empty(students, teachers, dtype=torch.float64).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """The expected loss ``E (student(x) - teacher(x))^2 / 2`` over standard normal x."""
        w = self.weight
        k = w.shape[1]
        square = w.square().sum(1)
        own = _moment(square[:, None] * square[None, :], w @ w.mT)
        across = _moment(square[:, None].expand(w.shape), w)
        pairs = k / 2 + k * (k - 1) / (2 * math.pi)  # of the teacher with itself
        return (own.sum() + pairs) / 2 - across.sum()


def _moment(squares: Tensor, inner: Tensor) -> Tensor:
    """``E relu(w x) relu(v x)`` from ``|w|^2 |v|^2`` and ``w v``.

    ``|w| |v| (sin t + (pi - t) cos t) / (2 pi)``, t the angle between w and v (Cho and Saul 2009; Safran and
    Shamir 2018). The sine is taken from the area, so that parallel vectors have derivatives too.
    """
    area = (squares - inner.square()).clamp(min=1e-30).sqrt()
    return (area + (math.pi - torch.atan2(area, inner)) * inner) / (2 * math.pi)


def expected(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of `Students`."""
    value: Tensor = model()
    return value


def student_task(students: int, teachers: int) -> Task:
    """Learn the teacher of orthogonal units."""
    return Task(lambda: Students(students, teachers), expected, None, name="students of a ReLU teacher")


def runs(students: int, teachers: int, seeds: int, steps: int) -> tuple[Points, pd.DataFrame]:
    """Gradient descent at rate 5/teachers from Xavier's weights, its ends polished and certified.

    Returns:
        The ends, and one row a run: the columns of `certified.certified_minima`, and ``bad`` for a certified
        minimum above the global one.
    """
    task = student_task(students, teachers)
    run = trained(task, GD(lr=5 / teachers), seeds=seeds, steps=steps, dtype="float64")
    objective = Objective(task, execution="stacked")
    ends, rows = certified_minima(objective, run.points, steps=500)
    return ends, rows.assign(students=students, k=teachers, bad=rows.certified & (rows.value > BAD))


def spectra(students: int, teachers: int, points: Points, bad: Tensor, most: int = 20) -> pd.DataFrame:
    """Eigenvalues of the Hessian at some good and some bad ends: one row a (minimum, eigenvalue)."""
    import pandas as pd

    objective = Objective(student_task(students, teachers), execution="stacked")
    tables = []
    for name, mask in (("bad", bad), ("global", ~bad)):
        some = mask.nonzero().flatten()[:most]
        if len(some):
            values = torch.linalg.eigvalsh(dense(objective, points.select(some)))
            minimum = torch.arange(len(some)).repeat_interleave(values.shape[1])
            tables.append(
                pd.DataFrame({"minimum": minimum.numpy(), "eigenvalue": values.flatten().numpy()}).assign(
                    kind=name
                )
            )
    return pd.concat(tables, ignore_index=True)
