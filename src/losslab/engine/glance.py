"""One look at a population by machine code, told as sums: no value leaves the cache that it is made in.

A look's values are many and its numbers few. Where machine code runs the networks, it takes the moments of
each layer right there, and a look costs what the arithmetic of its examples costs.
"""

from __future__ import annotations

from collections.abc import Sequence
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
            share of units with no positive value.
        samples: ``[N, 3, S]``: values of each part, at places that are the same for all members.
        sizes: ``[N, 2, 5]``, float64: of the linear layer's weight, and of batch norm's, the sum of squares;
            the sum and the sum of squares of the gradient; the squared distance from the earlier weight, and
            that one's sum of squares.
    """

    losses: Tensor
    values: tuple[Tensor, ...]
    samples: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]


def glance(
    compiled: Compiled,
    weights: Stack,
    buffers: Stack,
    x: Tensor,
    y: Tensor,
    places: Sequence[Tensor],
    earlier: Stack,
) -> Glance | None:
    """A glance at all members in training mode; None where the tensors are not for machine code.

    Args:
        compiled: The networks.
        weights: Name -> ``[N, ...]``.
        buffers: Batch norm's; they stay as they are.
        x: ``[N, B, ...]``.
        y: ``[N, B]``.
        places: Of each block, which values of a part ``[B, o]`` are sampled: ``[S]``, int64.
        earlier: Weights that distances are measured from; void for those that are not among them.
    """
    members, examples = x.shape[:2]
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    small = {name for block in compiled.blocks for name in (block.bias, *block.norm[:2])} - {None}
    gradients = {name: torch.empty_like(weights[name]) for name in weights if name in small}
    values, samples, sizes, told = [], [], [], []
    for block, chosen in zip(compiled.blocks, places, strict=True):
        o = weights[block.weight].shape[1]
        values.append(torch.empty(members, PARTS, 2, TOLD, dtype=torch.float32))
        samples.append(torch.empty(members, PARTS, len(chosen), dtype=torch.float32))
        sizes.append(torch.empty(members, 2, 5, dtype=torch.float64))
        before = [earlier.get(name) for name in (block.weight, block.norm[0] if block.norm else "")]
        inside = chosen % o * up(examples) + chosen // o  # where machine code keeps it
        told.append([values[-1], samples[-1], sizes[-1], *before, inside])
    losses = compiled.run(weights, buffers, x, y, gradients, told)
    return None if losses is None else Glance(losses, tuple(values), tuple(samples), tuple(sizes))


__all__ = ["Glance", "glance"]
