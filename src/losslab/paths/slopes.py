"""Losses and gradients on mini-batches, at all the points that move together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from losslab.engine import Batches, Objective, Points, TorchRule
from losslab.engine.updating import TorchUpdater, Updater, as_rule, updater
from losslab.errors import LosslabError
from losslab.rules import make
from losslab.tasks import Task


class Slopes:
    """The loss and its gradient at N points on the mini-batch of a step, the same batch for all points.

    Batch norm normalises by the batch, and no running statistics move: they are no coordinates.

    Args:
        task: What is minimised.
        batch_size: Examples a batch; None for all of them.
        seed: Of their order.
        weight_decay: Adds ``weight_decay / 2 ||theta||^2`` to what is minimised; the losses told are without.
        execution: As for `losslab.train`.
        memory: Bytes to stay within.
        module: A network of the task, for its code.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
        execution: str = "auto",
        memory: float | None = None,
        module: nn.Module | None = None,
    ) -> None:
        if not weight_decay >= 0:
            raise LosslabError(f"weight_decay is {weight_decay}: pass 0 or more")
        self.objective = Objective(task, execution=execution, memory=memory, module=module)
        self.weight_decay = weight_decay
        data = self.objective.data
        self.batches = None if data is None else Batches(len(data), batch_size, [seed])

    def __call__(self, like: Points, theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Losses ``[N]`` and gradients ``[N, P]`` at coordinates ``[N, P]`` of an architecture."""
        objective = self.objective
        if self.batches is not None and not self.batches.whole:
            assert objective.data is not None
            index = self.batches.at(step)
            objective = objective.on(objective.data.take(index))
            objective.chunk = len(index)
        values, gradients = objective.gradient(like.at(theta))
        slope = gradients.matrix()
        if self.weight_decay:
            slope = slope.add(theta, alpha=self.weight_decay)
        return values.double().cpu(), slope

    def losses(self, like: Points, theta: Tensor) -> Tensor:
        """Losses on all training data, ``[N]``, float64."""
        return self.objective.value(like.at(theta)).double().cpu()


def mover(rule: Any, members: int) -> Updater | TorchUpdater:
    """What moves so many points by a rule of gradients; Adam with rate 0.01 if None.

    A point is one vector to the rule, so rules that act layer by layer see a single layer.

    Raises:
        LosslabError: A rule that asks for curvature, or of another number of members.
    """
    found = as_rule(make("adam", lr=0.01) if rule is None else rule)
    if not isinstance(found, TorchRule) and found.needs_curvature:
        raise LosslabError(f"{found.name} asks for curvature, which a path does not give: pass another rule")
    found.check_members(members)
    return updater(found)


__all__ = ["Slopes", "mover"]
