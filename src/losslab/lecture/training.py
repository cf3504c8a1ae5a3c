"""The engine's training, in the one way in which claims use it, and when a run got where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from losslab.engine import Population, train
from losslab.rules import Rule
from losslab.tasks import Task

if TYPE_CHECKING:
    import pandas as pd


def trained(task: Task, rule: Rule, **settings: Any) -> Population:
    """`losslab.train`, always as one program, and measuring nothing that is not asked for.

    With ``execution="auto"`` a stop-watch chooses between the loop and one program, which agree only to
    rounding; evidence must not depend on how busy the machine is.
    """
    quiet: dict[str, Any] = {"execution": "stacked", "progress": False, "evaluate": None, "record": [0]}
    return train(task, rule, **(quiet | settings))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, for a ``with`` block.

    For long chains of operations on small stacks, each too short to share: waiting for a second thread costs
    more than it does, and beside another program many times more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def arrival(rows: pd.DataFrame, column: str, target: float) -> pd.Series:
    """The first evaluated step of each member at which a column is at most ``target``; infinite for never.

    Args:
        rows: One row a (member, step), members 0, 1, ...; NaN is above every target.
        column: What is compared.
        target: With what.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"member": [0, 1, 0, 1], "step": [0, 0, 5, 5], "loss": [2.0, 2.0, 0.1, 1.0]})
        >>> arrival(rows, "loss", 0.5).tolist()
        [5.0, inf]
    """
    first = rows[rows[column] <= target].groupby("member").step.min()
    return first.reindex(range(int(rows.member.max()) + 1)).astype(float).fillna(math.inf)
