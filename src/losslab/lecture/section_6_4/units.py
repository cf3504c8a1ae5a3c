"""The statistics of the units before batch norms, over all training examples, for N members at once."""

from __future__ import annotations

import torch
from torch import Tensor

from losslab.engine import Points
from losslab.engine.randomness import member_keys
from losslab.layers import BatchNorm
from losslab.signals import Instrument
from losslab.tasks import Task

ROOM = 100_000
"""The most examples, counted for each member, that are looked at in one piece."""


class Units:
    """What goes into the batch norms of a network's members on its training examples."""

    def __init__(self, task: Task) -> None:
        module = task.model()
        self.norms = [name for name, part in module.named_modules() if isinstance(part, BatchNorm)]
        self.see, self.data = Instrument(module, task.loss, self.norms), task.train

    def moments(self, points: Points) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and unbiased variance of every unit over all examples: norm -> two of ``[N, k]``.

        The norms use their running statistics, whatever they do in training.
        """
        assert self.data is not None
        together = max(1, ROOM // len(self.data))
        parts = [self._moments(points.select(rows)) for rows in torch.arange(points.members).split(together)]
        return {
            name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
            for name in self.norms
        }

    def _moments(self, points: Points) -> dict[str, tuple[Tensor, Tensor]]:
        assert self.data is not None
        keys = member_keys(range(points.members), "forward")
        seen = self.see(points, self.data.all(), keys, training=False, gradients=False)
        return {name: (seen.inputs[name].mean(1), seen.inputs[name].var(1)) for name in self.norms}

    def freeze(self, points: Points) -> Points:
        """The same weights, the running statistics those of the training examples.

        A norm's inputs depend on the norms before it, so they are settled one after another.
        """
        for name in self.norms:
            mean, var = self.moments(points)[name]
            settled = {f"{name}.running_mean": mean, f"{name}.running_var": var}
            points = Points(points.weights, {**points.buffers, **settled})
        return points

    def drift(self, points: Points) -> tuple[Tensor, Tensor]:
        """How far the units are from the statistics they are normalised by, ``[N, units]`` each.

        Returns:
            ``|mean - running mean| / running deviation``, and the deviation over the running one.
        """
        shifts, widths = [], []
        for name, (mean, var) in self.moments(points).items():
            frozen = points[f"{name}.running_var"].sqrt()
            shifts.append((mean - points[f"{name}.running_mean"]).abs() / frozen)
            widths.append(var.sqrt() / frozen)
        return torch.cat(shifts, dim=1), torch.cat(widths, dim=1)
