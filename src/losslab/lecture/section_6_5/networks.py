"""Random networks of equal or unequal layers, and what passes through them forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from losslab.engine import Points
from losslab.engine.randomness import generator
from losslab.layers import Initialisation
from losslab.tasks import digits

BLOCKS = 20
"""Independent repetitions of an estimate; its error is their scatter."""


def units(init: Initialisation, inputs: int, count: int, stream: Generator) -> Tensor:
    """The weights of ``count`` units with the same inputs, ``[count, inputs]``."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, count, bias=False)
    init.apply(layer, stream)
    return layer.weight.detach()


def drawn(init: Initialisation, widths: Sequence[int], draws: int, seed: int = 0) -> list[Tensor]:
    """The weights of ``draws`` networks without biases, a tensor ``[draws, outputs, inputs]`` a layer."""
    networks = []
    for draw in range(draws):
        layers = [nn.utils.skip_init(nn.Linear, i, o, bias=False) for i, o in pairwise(widths)]
        networks.append(init.apply(nn.Sequential(*layers), generator(seed, "weights", draw)))
    return list(Points.from_modules(networks).weights.values())


class Passage(NamedTuple):
    """What passed through N networks.

    Attributes:
        ahead: Pre-activations of each layer, ``[N, B, width]``.
        back: d / d(pre-activation) of what was asked for at the top, likewise.
        weights: d / d(weights), ``[N, outputs, inputs]``, summed over the examples.
    """

    ahead: list[Tensor]
    back: list[Tensor]
    weights: list[Tensor]


def passage(
    weights: Sequence[Tensor], x: Tensor, top: Tensor, activation: Callable[[Tensor], Tensor] | None = None
) -> Passage:
    """Passes examples forward and a gradient backward, by autograd.

    Args:
        weights: As `drawn` gives them.
        x: ``[B, inputs]``.
        top: The gradient with respect to the last layer's pre-activations, ``[N, B, outputs]``.
        activation: Between the layers; None for a linear network.
    """
    leaves = [w.detach().requires_grad_() for w in weights]
    ahead = forward(leaves, x, activation)
    found = torch.autograd.grad(ahead[-1], [*ahead, *leaves], top)
    return Passage([h.detach() for h in ahead], list(found[: len(ahead)]), list(found[len(ahead) :]))


def forward(
    weights: Sequence[Tensor], x: Tensor, activation: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The pre-activations of every layer, ``[N, B, width]``; see `passage`."""
    a = x.expand(len(weights[0]), *x.shape)
    ahead = []
    for layer, w in enumerate(weights):
        if layer and activation is not None:
            a = activation(a)
        a = torch.bmm(a, w.transpose(1, 2))
        ahead.append(a)
    return ahead


def gaussian_rows(*shape: int, seed: int = 0) -> Tensor:
    """Independent standard normal numbers, float32."""
    return torch.randn(shape, generator=generator(seed, "inputs"))


def digit_rows(count: int) -> Tensor:
    """The first standardised digits of the training split, ``[count, 64]``."""
    return digits().train.head(count).all()[0]
