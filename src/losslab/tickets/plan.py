"""The plan of a lottery: what is pruned, where training starts again, and against which controls."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from losslab.engine import ExecutionNotice, randomness, train
from losslab.engine.updating import TorchRule, as_rule
from losslab.errors import LosslabError, first_line, unknown
from losslab.layers import Initialisation
from losslab.rules import Adam, Rule
from losslab.tasks import Data, Task
from losslab.tasks.nest import map_nest
from losslab.tickets.controls import check_controls
from losslab.tickets.criteria import criterion
from losslab.tickets.scopes import Scope

REWINDS = ("init", "learning-rate", "fine-tune", "continue")

VALIDATION = 1 / 12
"""Share of the training examples that is held out where a task has no validation data: 5,000 of 60,000."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How tickets are drawn; by default as Frankle & Carbin (2019) did for LeNet on MNIST, but for less long.

    Args:
        criterion: Which weights go: a name of `losslab.tickets.CRITERIA`.
        scope: Among which weights they are sought, and how many go a level.
        levels: Rounds of pruning; level 0 is the dense network.
        one_shot: Prune each level's share at once, by the dense network's scores, instead of step by step.
        rounds: How often the scores are computed anew within a level; for criteria that need no training.
        rewind: Where a pruned network starts: ``"init"`` (its first weights); a number k (weights and rule
            state after k steps, batches and schedule from there); ``"learning-rate"`` (the trained weights,
            the schedule from its beginning); ``"fine-tune"`` (the trained weights, a fresh state, the
            schedule at its end); ``"continue"`` (the trained weights and the state as they are).
        controls: Of ``"reinit"``, ``"random"``, ``"shuffled"``, ``"signs"``, ``"dense"``.
        control_levels: Levels with controls, by default all but 0.
        replicates: Independent networks, seeds 0, 1, ...
        first_seed: The first seed.
        init: How the networks start, by default as the task's model does.
        rule: Update rule, the same for all.
        steps: Updates of each training.
        batch_size: Examples a batch.
        evaluate: Steps between two looks at the validation loss, whose least decides the early-stop step.
        tolerance: How much accuracy a ticket may lose against the dense network, as a share.

    Raises:
        LosslabError: Settings that contradict each other or lie outside of their range.

    Example:
        >>> Plan(levels=3, controls=("reinit",)).at(2)
        ('ticket', 'reinit')
    """

    criterion: str = "magnitude"
    scope: Scope = field(default_factory=Scope)
    levels: int = 5
    one_shot: bool = False
    rounds: int = 1
    rewind: str | int = "init"
    controls: Sequence[str] = ("reinit", "random")
    control_levels: Sequence[int] | None = None
    replicates: int = 5
    first_seed: int = 0
    init: Initialisation | None = None
    rule: Rule = field(default_factory=lambda: Adam(lr=1.2e-3))
    steps: int = 1000
    batch_size: int = 60
    evaluate: int = 100
    tolerance: float = 0.002

    def __post_init__(self) -> None:
        chosen = criterion(self.criterion)
        check_controls(self.controls)
        made = as_rule(self.rule)
        if isinstance(made, TorchRule) or made.members() is not None:
            raise LosslabError(
                "every network of a lottery trains by one losslab rule: give one, with a single value of each"
            )
        object.__setattr__(self, "rule", made)
        for name in ("levels", "replicates", "steps", "batch_size", "evaluate", "rounds"):
            if getattr(self, name) < 1:
                raise LosslabError(f"{name} is {getattr(self, name)}: pass at least 1")
        if isinstance(self.rewind, str) and self.rewind not in REWINDS:
            raise unknown("rewind point", self.rewind, (*REWINDS, "a number of steps"))
        if not isinstance(self.rewind, str) and not 0 <= self.rewind < self.steps:
            raise LosslabError(
                f"the rewind step is {self.rewind} and training has {self.steps}: pass one from 0 to "
                f"{self.steps - 1}"
            )
        if self.rounds > 1 and chosen.trained:
            raise LosslabError(
                f"{self.criterion} looks at trained weights, which rounds do not change: pass rounds=1"
            )
        wrong = set(self.control_levels or ()) - set(range(1, self.levels + 1))
        if wrong:
            raise LosslabError(f"control_levels names {min(wrong)}: levels are 1 to {self.levels}")

    @property
    def seeds(self) -> list[int]:
        """One a replicate."""
        return list(range(self.first_seed, self.first_seed + self.replicates))

    def at(self, level: int) -> tuple[str, ...]:
        """The arms that train as one population at a level."""
        if level == 0:
            return ("dense",)
        there = self.control_levels is None or level in self.control_levels
        return ("ticket", *(c for c in self.controls if c != "dense" and there))

    def small_at(self, level: int) -> bool:
        """Whether a small dense network trains beside them."""
        there = self.control_levels is None or level in self.control_levels
        return level > 0 and "dense" in self.controls and there

    def steps_at(self, level: int) -> tuple[int, int]:
        """The steps at which training begins and ends."""
        if level == 0 or self.rewind in ("init", "learning-rate"):
            return 0, self.steps
        if self.rewind == "fine-tune":
            return self.steps, 2 * self.steps
        if self.rewind == "continue":
            return level * self.steps, (level + 1) * self.steps
        return int(self.rewind), self.steps

    def describe(self) -> dict[str, Any]:
        """Every setting but the number of levels, as JSON values."""
        told = {n: getattr(self, n) for n in self.__dataclass_fields__ if n != "levels"}
        told |= {"rule": self.rule.describe(), "scope": self.scope.describe()}
        told |= {"init": None if self.init is None else repr(self.init), "controls": list(self.controls)}
        return json.loads(json.dumps(told, default=repr))

    def task(self, task: Task) -> Task:
        """The task as the lottery runs it: started by ``init``, validation data held out if it has none."""
        if task.train is None:
            raise LosslabError("the task has no data: a lottery needs training examples")
        if self.init is not None:
            task = task.replace(model=self.init.on(task.model))
        if task.validation is not None:
            return task
        return held_out(task)


def held_out(task: Task, share: float = VALIDATION, seed: int = 0) -> Task:
    """The task with a share of its training examples, drawn at random, as validation data."""
    import torch

    assert task.train is not None
    n = len(task.train)
    count = round(share * n)
    if not 0 < count < n:
        raise LosslabError(f"{share:g} of {n} examples is {count}: pass a share that leaves some of both")
    order = torch.randperm(n, generator=randomness.generator(seed, "held out"))
    parts = [order[count:].sort().values, order[:count].sort().values]
    examples = task.train.all()
    train, validation = (Data(map_nest(lambda t, i=i: t[i], examples)) for i in parts)
    return task.replace(train=train, validation=validation)


def way(task: Task, plan: Plan) -> str:
    """``"stacked"``, or ``"loop"`` for a network that cannot be batched, which is said.

    No clock has a say, so that a lottery which is resumed goes on in the same way.
    """
    seeds = [plan.first_seed, plan.first_seed + 1]
    settings: dict[str, Any] = {"batch_size": plan.batch_size, "evaluate": None, "progress": False}
    try:
        train(task, plan.rule, seeds=seeds, steps=1, execution="stacked", **settings)
    except LosslabError as error:
        train(task, plan.rule, seeds=seeds, steps=1, execution="loop", **settings)  # other mistakes are told
        warnings.warn(f"{first_line(error)}: they are trained one by one", ExecutionNotice, stacklevel=3)
        return "loop"
    return "stacked"
