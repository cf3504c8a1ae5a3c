"""Losses and gradients on mini-batches, at all the points that move together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from losslab.engine import Batches, Execution, Objective, Points, TorchRule
from losslab.engine.backends import Stand
from losslab.engine.memory import free_memory
from losslab.engine.updating import TorchUpdater, as_rule, updater
from losslab.errors import LosslabError
from losslab.rules import make
from losslab.tasks import Data, Task


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
        self.weight_decay, self._batch_size, self._seed = weight_decay, batch_size, seed
        data = self.objective.data
        self.batches = None if data is None else Batches(len(data), batch_size, [seed])
        self._moved: dict[tuple[torch.device, torch.dtype], Data] = {}
        self._cut: tuple[Points, Tensor, Points] | None = None
        self._ways: dict[tuple[object, ...], tuple[Execution, Tensor]] = {}

    def __call__(self, like: Points, theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Losses ``[N]`` and gradients ``[N, P]`` at coordinates ``[N, P]`` of an architecture."""
        if self.objective.memory is None:  # or the system would be asked at every step
            self.objective.memory = 0.5 * free_memory(theta.device)
        points = self._points(like, theta)
        gradients: Mapping[str, Tensor]
        if self.batches is None or self.batches.whole:
            values, found = self.objective.gradient(points)
            gradients = found.weights
        else:
            values, gradients = self._on(points, self.batches.at(step))
        slope = torch.cat([g.reshape(len(theta), -1) for g in gradients.values()], 1)
        if self.weight_decay:
            slope = slope.add(theta, alpha=self.weight_decay)
        return values.double().cpu(), slope

    def _points(self, like: Points, theta: Tensor) -> Points:
        """The points at the coordinates; a stack that is moved in place is cut up only once."""
        if self._cut is None or self._cut[0] is not like or self._cut[1] is not theta or like.buffers:
            self._cut = (like, theta, like.at(theta))
        return self._cut[2]

    def _on(self, points: Points, index: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The objective of one mini-batch; how it is run is found out once a size."""
        like = next(iter(points.weights.values()))
        place = (like.device, like.dtype)
        if place not in self._moved:
            assert self.objective.data is not None
            self._moved[place] = self.objective.data.to(*place)
        batch = self._moved[place].take(index.to(like.device))
        key = (*place, len(index), points.members)
        if key not in self._ways:
            objective = self.objective.on(batch)
            objective.chunk = len(index)
            execution, at, _ = next(iter(objective.pieces(objective.settled(points))))
            self._ways[key] = (execution, at.keys)
        execution, keys = self._ways[key]
        at = Stand(points.weights, points.buffers, batch, False, keys)
        return execution.gradients(self.objective.loss, at)

    def describe(self) -> dict[str, Any]:
        """What identifies the slopes, for a file."""
        task, data = self.objective.task, self.objective.data
        return {
            "task": task.name,
            "examples": None if data is None else len(data),
            "batch_size": self._batch_size,
            "seed": self._seed,
            "weight_decay": self.weight_decay,
        }

    def losses(self, like: Points, theta: Tensor) -> Tensor:
        """Losses on all training data, ``[N]``, float64."""
        return self.objective.value(like.at(theta)).double().cpu()


class Mover:
    """Points that a rule of gradients moves, with the rule's state: all that a file must hold to go on.

    A point is one vector to the rule, so rules that act layer by layer see a single layer.

    Args:
        rule: A losslab or torch update rule; Adam with rate 0.01 if None.
        theta: The points, ``[N, P]``; they may be moved in place.

    Raises:
        LosslabError: A rule that asks for curvature, or of another number of members.
    """

    def __init__(self, rule: Any, theta: Tensor) -> None:
        found = as_rule(make("adam", lr=0.01) if rule is None else rule)
        if not isinstance(found, TorchRule) and found.needs_curvature:
            raise LosslabError(
                f"{found.name} asks for curvature, which a path does not give: pass another rule"
            )
        found.check_members(len(theta))
        self._updater = updater(found)
        self._weights = {"theta": theta}
        self._state = self._updater.init(self._weights)

    @property
    def theta(self) -> Tensor:
        """Where the points are, ``[N, P]``."""
        return self._weights["theta"]

    def move(self, slope: Tensor, step: int) -> None:
        """One update."""
        self._weights, self._state = self._updater.apply({"theta": slope}, self._state, self._weights, step)

    def tensors(self) -> dict[str, Tensor]:
        """Points and state, for a file."""
        told = {f"state/{slot}/{n}": t for slot, ts in self._state.items() for n, t in ts.items()}
        return {"theta": self.theta, **told, **{f"rule/{n}": t for n, t in self._updater.save().items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` told."""
        self.theta.copy_(tensors["theta"])
        for slot, own in self._state.items():
            for name in own:
                own[name] = tensors[f"state/{slot}/{name}"].to(self.theta.device)
        saved = {n.removeprefix("rule/"): t for n, t in tensors.items() if n.startswith("rule/")}
        if isinstance(self._updater, TorchUpdater):
            self._updater.load(saved, self._weights)


__all__ = ["Mover", "Slopes"]
