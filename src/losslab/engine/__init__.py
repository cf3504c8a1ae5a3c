"""The engine: a stack of points evaluated on a stream of data.

Everything losslab does to many networks at once goes through here: `Points` holds their weights, `Execution`
runs their code (hand-batched operations, vmap, or a loop, equal to rounding), `Batches` and `randomness`
make every draw a pure function of a member's seed, `train` trains a `Population`, `checkpoints` keep it.
"""

from __future__ import annotations

from losslab.engine.batches import Batches
from losslab.engine.execution import Execution, ExecutionNotice, choose
from losslab.engine.objective import Objective
from losslab.engine.plan import EarlyStopping, Plan, cross
from losslab.engine.points import Points
from losslab.engine.population import Branch, Population
from losslab.engine.training import train
from losslab.engine.updating import TorchRule

__all__ = [
    "Batches",
    "Branch",
    "EarlyStopping",
    "Execution",
    "ExecutionNotice",
    "Objective",
    "Plan",
    "Points",
    "Population",
    "TorchRule",
    "choose",
    "cross",
    "train",
]
