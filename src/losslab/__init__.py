"""losslab: a laboratory for the optimization of neural networks.

Train many networks as one tensor program, measure the loss as a function of the weights, and turn the
statements of a lecture into experiments with verdicts.

Example:
    >>> import losslab
    >>> task = losslab.tasks.digits_task()
    >>> population = losslab.train(task, losslab.rules.Adam(lr=[1e-3, 1e-2]), epochs=1)
    >>> len(population)
    2
"""

from __future__ import annotations

from losslab import engine, rules, signals, tasks, tickets
from losslab.engine import EarlyStopping, Objective, Points, Population, TorchRule, cross, train
from losslab.errors import LosslabError
from losslab.tasks import Data, Task, supervised

__version__ = "0.1.0"

__all__ = [
    "Data",
    "EarlyStopping",
    "LosslabError",
    "Objective",
    "Points",
    "Population",
    "Task",
    "TorchRule",
    "__version__",
    "cross",
    "engine",
    "rules",
    "signals",
    "supervised",
    "tasks",
    "tickets",
    "train",
]
