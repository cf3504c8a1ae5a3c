"""Which weights of a network may be pruned, and how many are left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from losslab.engine.points import Stack
from losslab.errors import LosslabError, unknown


@dataclass(frozen=True)
class Layers:
    """The weights that may be pruned: those of linear and convolutional layers, never biases or batch norm.

    Attributes:
        sizes: Name of the weight -> how many numbers it has, in the network's order.
        output: The last of them.
        biases: Name of a weight -> that of its layer's bias, where it has one.

    Example:
        >>> from losslab.tasks import lenet_300_100
        >>> prunable(lenet_300_100()()).sizes
        {'0.weight': 235200, '2.weight': 30000, '4.weight': 1000}
    """

    sizes: Mapping[str, int]
    output: str
    biases: Mapping[str, str]

    @property
    def total(self) -> int:
        """All of them together: what P_m is a share of."""
        return sum(self.sizes.values())

    def chosen(self, names: Iterable[str] | None) -> list[str]:
        """Some of the weights by name, all by default.

        Raises:
            LosslabError: A name that is no prunable weight's.
        """
        if names is None:
            return list(self.sizes)
        for name in names:
            if name not in self.sizes:
                raise unknown("prunable weight", name, self.sizes)
        return [n for n in self.sizes if n in set(names)]


def prunable(module: nn.Module) -> Layers:
    """Finds the weights that may be pruned.

    Raises:
        LosslabError: There are none.
    """
    names = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
    sizes, biases = {}, {}
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, _ConvNd)) and id(layer.weight) in names:
            name = names[id(layer.weight)]
            sizes[name] = layer.weight.numel()
            if layer.bias is not None and id(layer.bias) in names:
                biases[name] = names[id(layer.bias)]
    if not sizes:
        kind = type(module).__name__
        raise LosslabError(f"{kind} has no linear or convolutional layer to prune: pass one that has")
    return Layers(sizes, list(sizes)[-1], biases)


def whole(layers: Layers, like: Stack) -> Stack:
    """Masks that keep everything, name -> bool ``[N, *shape]``."""
    return {n: torch.ones_like(like[n], dtype=torch.bool) for n in layers.sizes}


def kept(masks: Stack, layers: Layers) -> Tensor:
    """How many prunable weights each member has left, int64 ``[N]``."""
    return torch.stack([masks[n].flatten(1).sum(1) for n in layers.sizes]).sum(0)
