"""What was measured during training, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd

When = int | str | Sequence[int] | Callable[[int], bool] | None
"""How often: every k steps, ``"epoch"``, a list of steps, a function of the step, or None for never."""


def schedule(when: When, name: str, per_epoch: int, total: int) -> Callable[[int], bool]:
    """Turns a `When` into a function of the step (0 is before the first update, ``total`` after the last)."""
    if when is None:
        return lambda step: False
    if callable(when):
        return when
    if when == "epoch":
        return lambda step: step % per_epoch == 0 or step == total
    if isinstance(when, str):
        raise LosslabError(f'{name} is {when!r}: pass a number of steps, "epoch", a list of steps, or None')
    if isinstance(when, int):
        if when < 1:
            raise LosslabError(f"{name} is {when}: pass at least 1 step, or None for never")
        return lambda step: step % when == 0 or step == total
    if isinstance(when, Iterable):
        steps = {int(s) for s in when}
        return lambda step: step in steps
    raise LosslabError(f'{name} is {when!r}: pass a number of steps, "epoch", a list of steps, or None')


class History:
    """Rows of measurements, a value a member; kept as tensors, shown as a table.

    A row at step k speaks of the weights after k updates. Columns that a row did not measure are NaN, and so
    are members that have stopped.
    """

    def __init__(self, members: int) -> None:
        self.members = members
        self.rows: dict[int, dict[str, Tensor]] = {}

    def add(self, step: int, values: dict[str, Tensor], active: Tensor) -> None:
        """Adds measurements of the active members (indices ``[n]``) at a step; values are ``[n]``."""
        row = self.rows.setdefault(step, {})
        for name, value in values.items():
            full = row.get(name)
            if full is None:
                full = row[name] = torch.full((self.members,), math.nan, dtype=torch.float64)
            full[active] = value.detach().to("cpu", torch.float64)

    @property
    def columns(self) -> list[str]:
        """Names of everything measured, in the order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def tensors(self) -> dict[str, Tensor]:
        """The history as tensors, for a checkpoint: ``steps`` ``[R]`` and each column ``[R, N]``."""
        steps = sorted(self.rows)
        blank = torch.full((self.members,), math.nan, dtype=torch.float64)
        columns = {
            c: torch.stack([self.rows[s].get(c, blank) for s in steps])
            if steps
            else torch.empty(0, self.members)
            for c in self.columns
        }
        return {"steps": torch.tensor(steps, dtype=torch.int64), **columns}

    @classmethod
    def from_tensors(cls, members: int, tensors: dict[str, Tensor]) -> History:
        """Reads back what `tensors` gave."""
        history = cls(members)
        for r, step in enumerate(tensors["steps"].tolist()):
            history.rows[step] = {c: t[r].clone() for c, t in tensors.items() if c != "steps"}
        return history

    def table(self, per_epoch: int, members: dict[str, list[object]]) -> pd.DataFrame:
        """One row a (step, member): step, epoch, member, the members' own columns, the measurements."""
        import pandas as pd

        steps = sorted(self.rows)
        n = self.members
        frame: dict[str, object] = {
            "step": [s for s in steps for _ in range(n)],
            "epoch": [s / per_epoch for s in steps for _ in range(n)],
            "member": list(range(n)) * len(steps),
        }
        for name, values in members.items():
            frame[name] = list(values) * len(steps)
        tensors = self.tensors()
        for column in self.columns:
            frame[column] = tensors[column].reshape(-1).numpy()
        return pd.DataFrame(frame)
