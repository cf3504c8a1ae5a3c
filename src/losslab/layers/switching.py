"""Batch normalisation put into a network, or taken out of it: new modules, the caller's stays as it is."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from losslab.layers.batchnorm import BatchNorm, is_batchnorm
from losslab.tasks import check_module

Plan = Callable[[nn.Module], list[nn.Module]]
"""A child -> what stands in its place, one after the other; nothing where it is removed."""

#: Modules of torch that read their children's weights instead of calling them.
CLOSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Normalised(nn.Sequential):
    """A layer and its batch norm, in the place of the layer alone."""


def with_batchnorm(model: nn.Module, make: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """A copy of the network with batch norm behind each linear and convolutional layer but the last.

    The norm stands before the activation (Ioffe and Szegedy 2015, section 3.2). The layer loses its bias,
    which the normalisation would subtract again; the norm's own takes its place. Weights are kept. In an
    `nn.Sequential` the norm becomes an entry of its own; a layer that is an attribute is replaced by the pair
    of layer and norm. Layers stand in the order in which they were registered; the last one, and attention
    and transformer blocks, are left alone. The network is not run: features are expected on the second axis,
    where a linear layer that is given sequences does not have them, and a layer that is called twice has one
    norm for both calls.

    Args:
        model: Any network; it stays as it is.
        make: Features -> the norm, e.g. ``lambda n: BatchNorm(n, ghost=16)``. Batch-norm layers that the
            network has already are then replaced as well, their weights and statistics kept. By default new
            norms are `BatchNorm(features)` and those that exist stay.

    Raises:
        LosslabError: No module, or one that cannot be rebuilt (see `losslab.tasks.check_module`).

    Example:
        >>> with_batchnorm(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=False)
          (1): BatchNorm(3)
          (2): ReLU()
          (3): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    model = copied(model)
    order = [leaf for leaf in _leaves(model) if not isinstance(leaf, nn.Identity)]
    layers = [leaf for leaf in order if is_weighted(leaf)]
    normalised = {id(layer) for layer, norm in itertools.pairwise(order) if is_batchnorm(norm)}
    made: dict[int, list[nn.Module]] = {}
    for leaf in order:
        if is_weighted(leaf) and leaf is not layers[-1] and id(leaf) not in normalised:
            norm = (make or BatchNorm)(_outputs(leaf)).to(leaf.weight)
            leaf.register_parameter("bias", None)
            made[id(leaf)] = [leaf, norm.train(leaf.training)]
        elif is_batchnorm(leaf) and make is not None:
            made[id(leaf)] = [_like(make(_features(leaf)), leaf)]
    return rebuilt(model, lambda child: made.get(id(child), [child]))


def without_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of the network without batch norm, losslab's or torch's.

    The function computed is another one (`fold` keeps it). The layer before a norm gets a bias of zeros where
    it had none, so that the network can represent what it could. In an `nn.Sequential` the norm's entry goes;
    a norm that is an attribute becomes an identity.

    Example:
        >>> without_batchnorm(nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU()))
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
        )
    """
    model = copied(model)
    order = [leaf for leaf in _leaves(model) if not isinstance(leaf, nn.Identity)]
    for layer, norm in itertools.pairwise(order):
        if is_batchnorm(norm) and is_weighted(layer) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(_outputs(layer)))
    return rebuilt(model, without)


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network, to be rebuilt.

    Raises:
        LosslabError: See `losslab.tasks.check_module`.
    """
    check_module(model, "the network")
    return copy.deepcopy(model)


def without(child: nn.Module) -> list[nn.Module]:
    """A plan: norms go, pairs of layer and norm become the layer."""
    if isinstance(child, Normalised):
        return [child[0]]
    return [] if is_batchnorm(child) else [child]


def is_weighted(module: nn.Module) -> bool:
    """Whether a layer is linear or a convolution."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def rebuilt(model: nn.Module, plan: Plan) -> nn.Module:
    """The network with its parts replaced as planned, in place where it is not itself replaced."""
    seen: set[int] = set()

    def edit(owner: nn.Module) -> None:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        found = {name: plan(child) for name, child in owner._modules.items() if child is not None}
        for parts in found.values():
            for part in parts:
                edit(part)
        changed = any(parts != [owner._modules[name]] for name, parts in found.items())
        if changed and type(owner) in (nn.Sequential, nn.ModuleList):
            owner._modules = _spliced(found)
        elif changed:
            for name, parts in found.items():
                owner._modules[name] = _one(parts)

    top = _one(plan(model))
    edit(top)
    return top


def _one(parts: list[nn.Module]) -> nn.Module:
    if len(parts) == 1:
        return parts[0]
    return Normalised(*parts) if parts else nn.Identity()


def _spliced(found: dict[str, list[nn.Module]]) -> dict[str, nn.Module | None]:
    numbered = all(name.isdigit() for name in found)
    named: dict[str, nn.Module | None] = {}
    for name, parts in found.items():
        for place, part in enumerate(parts):
            key = str(len(named)) if numbered else f"{name}_norm" if place else name
            named[key] = part
    return named


def _leaves(model: nn.Module) -> Iterator[Any]:
    """Modules without parts, each once, in the order of registration."""
    seen: set[int] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in seen or isinstance(module, CLOSED):
            return
        seen.add(id(module))
        if not module._modules or is_weighted(module):
            yield module  # one with parametrised weights has parts, which are none of the network's
            return
        for child in module.children():
            yield from walk(child)

    return walk(model)


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _features(norm: Any) -> int:
    return int(norm.features if isinstance(norm, BatchNorm) else norm.num_features)


def _like(norm: nn.Module, old: nn.Module) -> nn.Module:
    """A new norm with the weights, statistics, device, dtype and mode of an old one."""
    tensors = old.state_dict()
    floating = next((t for t in tensors.values() if t.is_floating_point()), torch.empty(0))
    norm = norm.to(floating)
    norm.load_state_dict({n: t for n, t in tensors.items() if n in norm.state_dict()}, strict=False)
    return norm.train(old.training)
