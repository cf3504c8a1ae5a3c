"""A slice of the landscape measured on a grid, piece by piece, so that a killed run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losslab.engine import checkpoints
from losslab.errors import LosslabError
from losslab.paths.combinations import combine
from losslab.paths.landscape import Landscape, Measurements, require
from losslab.paths.slices import Slice
from losslab.paths.work import Out, Work

if TYPE_CHECKING:
    import pandas as pd

PIECE = 128
"""Points measured between two looks at the clock."""


@dataclass(frozen=True)
class Grid:
    """Measurements on a slice.

    Attributes:
        slice: Where.
        axes: One axis a coordinate, ``[m_1], ..., [m_K]``.
        values: Name -> ``[m_1, ..., m_K]``, float64; NaN and infinite values are what was measured.
        at_marks: The same at the slice's marks, name -> ``[M]``.
    """

    slice: Slice
    axes: tuple[Tensor, ...]
    values: Measurements
    at_marks: Measurements

    def __getitem__(self, name: str) -> Tensor:
        return require(name, self.values)

    @property
    def table(self) -> pd.DataFrame:
        """One row a grid point: its coordinates and what was measured there."""
        import pandas as pd

        coordinates = _points(self.axes)
        columns: dict[str, Any] = {n: coordinates[:, k].numpy() for k, n in enumerate(self.slice.names)}
        return pd.DataFrame(columns | {n: v.flatten().numpy() for n, v in self.values.items()})

    @property
    def marked(self) -> pd.DataFrame:
        """One row a mark: its label, its coordinates and what was measured there."""
        import pandas as pd

        marks, labels = self.slice.marks, self.slice.labels
        columns: dict[str, Any] = {"label": list(labels) or [str(i) for i in range(len(marks))]}
        columns |= {n: marks[:, k].numpy() for k, n in enumerate(self.slice.names)}
        return pd.DataFrame(columns | {n: v.numpy() for n, v in self.at_marks.items()})


def measure_slice(
    landscape: Landscape, where: Slice, *axes: Tensor, out: Out = None, piece: int = PIECE
) -> Grid:
    """Losses and errors on a grid of a slice.

    Args:
        landscape: What is measured.
        where: The slice.
        *axes: The values of each coordinate; by default `Slice.axes`.
        out: Where to keep what has been measured, see `Work`.
        piece: Points measured between two looks at the clock.

    Raises:
        LosslabError: Another number of axes than dimensions, or a file of another grid.

    Example:
        >>> from losslab.paths.slices import along
        >>> from losslab.tasks import double_well, function_task
        >>> from losslab.engine import Points
        >>> line = along(Points({"x": torch.zeros(1, 2)}, {}), torch.tensor([[1.0, 0.0]]))
        >>> measure_slice(Landscape(function_task(double_well)), line, torch.tensor([-1.0, 0.0, 1.0]))["loss"]
        tensor([0., 1., 0.], dtype=torch.float64)
    """
    axes = tuple(a.detach().double().cpu().flatten() for a in axes) or where.axes()
    if len(axes) != where.dimensions:
        raise LosslabError(
            f"{len(axes)} axes were given for a slice of {where.dimensions} dimensions: pass one a direction"
        )
    coordinates = _points(axes)
    asked = {"axes": [a.tolist() for a in axes], "batch_norm": landscape.batch_norm}
    asked |= {"sets": list(landscape.sets), "frame": checkpoints.digest(where.frame, "")}
    total = len(coordinates)
    with Work.of(out).begin(asked, "measuring points", total) as kept:
        found = {name: kept.tensors[name] for name in kept.meta.get("names", ())}
        for a in range(kept.meta.get("step", 0), total, piece):
            part = landscape.along(where.frame, where.coefficients(coordinates[a : a + piece]))
            found = {n: torch.cat([found[n], v]) if n in found else v for n, v in part.items()}
            kept.tell(min(a + piece, total), next(iter(part.values())))
            if kept.due() or a + piece >= total:
                kept.write(found, names=list(found), step=min(a + piece, total))
    shape = [len(a) for a in axes]
    values = {n: v.reshape(shape) for n, v in found.items()}
    marks = landscape(combine(where.frame, where.coefficients(where.marks)))
    return Grid(where, axes, values, marks)


def _points(axes: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
