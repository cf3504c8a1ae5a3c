"""The engine's training, in the one way in which this section uses it."""

from __future__ import annotations

from typing import Any

from losslab.engine import Population, train
from losslab.rules import Rule
from losslab.tasks import Task


def trained(task: Task, rule: Rule, **settings: Any) -> Population:
    """`losslab.train`, always as one program, and measuring nothing that is not asked for.

    With ``execution="auto"`` a stop-watch chooses between the loop and one program, which agree only to
    rounding; evidence must not depend on how busy the machine is.
    """
    quiet: dict[str, Any] = {"execution": "stacked", "progress": False, "evaluate": None, "record": [0]}
    return train(task, rule, **(quiet | settings))
