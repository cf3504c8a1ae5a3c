"""One look at a population by machine code, told as sums: no value leaves the cache that it is made in.

A look's values are many and its numbers few. Where machine code runs the networks, it takes the moments of
each layer right there, and a look costs what the arithmetic of its examples costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.engine.compiled import PARTS, TOLD, Compiled, up
from losslab.engine.points import Stack


@dataclass(frozen=True)
class Glance:
    """What one way through the networks comes to, block by block; parts that a block lacks are void.

    Attributes:
        losses: ``[N]``.
        values: ``[N, 3, 2, 5]``: of each part, and of the gradient of the loss: mean, variance, variance over
            examples (the mean of those of the units), share of units whose variance is rounding (`CONSTANT`),
            share of units with no positive value; of a gradient only the first two mean anything.
        samples: ``[N, 3, S]``: values of each part, at places that are the same for all members; the next
            look writes over them.
        sizes: ``[N, 2, 5]``, float64: of the linear layer's weight, and of batch norm's, the sum of squares;
            the sum and the sum of squares of the gradient; the squared distance from the earlier weight, and
            that one's sum of squares.
    """

    losses: Tensor
    values: tuple[Tensor, ...]
    samples: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]


class Glances:
    """Looks at all members in training mode, on the same examples each time.

    Args:
        compiled: The networks.
        weights: Name -> ``[N, ...]``, for their shapes.
        buffers: The same of batch norm's, which stay as they are.
        x: ``[N, B, ...]``.
        y: ``[N, B]``.
        sampled: ``(values in a part) -> [S]``, int64: which of its ``[B, o]`` are sampled.
    """

    def __init__(
        self,
        compiled: Compiled,
        weights: Stack,
        buffers: Stack,
        x: Tensor,
        y: Tensor,
        sampled: Callable[[int], Tensor],
    ) -> None:
        self.compiled, self.x, self.y = compiled, x, y
        small = {name for block in compiled.blocks for name in (block.bias, *block.norm[:2])}
        # What is written and never asked for; outputs do not depend on running statistics.
        self.gradients = {name: torch.empty_like(w) for name, w in weights.items() if name in small}
        self.buffers = {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}
        self.places: list[Tensor] = []
        self.samples: list[Tensor] = []  # the largest of what is told, in memory that stays in a cache
        for block in compiled.blocks:
            o = weights[block.weight].shape[1]
            chosen = sampled(x.shape[1] * o)
            self.places.append(chosen % o * up(x.shape[1]) + chosen // o)  # where machine code keeps it
            self.samples.append(torch.empty(len(x), PARTS, len(chosen), dtype=torch.float32))

    def __call__(self, weights: Stack, earlier: Stack) -> Glance | None:
        """One look; None where the tensors are not for machine code.

        Args:
            weights: Name -> ``[N, ...]``.
            earlier: Weights that distances are measured from; void for those that are not among them.
        """
        members = self.x.shape[0]
        values, sizes, told = [], [], []
        for block, places, sample in zip(self.compiled.blocks, self.places, self.samples, strict=True):
            values.append(torch.empty(members, PARTS, 2, TOLD, dtype=torch.float32))
            sizes.append(torch.empty(members, 2, 5, dtype=torch.float64))
            before = [earlier.get(name) for name in (block.weight, block.norm[0] if block.norm else "")]
            told.append([values[-1], sample, sizes[-1], *before, places])
        losses = self.compiled.run(weights, self.buffers, self.x, self.y, self.gradients, told)
        return None if losses is None else Glance(losses, tuple(values), tuple(self.samples), tuple(sizes))


__all__ = ["Glance", "Glances"]
