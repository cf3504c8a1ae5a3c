"""Batch normalisation at inference is an affine map, and so part of the layer before it."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer

from losslab.layers.batchnorm import is_batchnorm
from losslab.layers.switching import Normalised, copied, rebuilt, without

FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ChannelAffine(nn.Module):
    """``y = scale x + shift``, a number of each a channel: ``[B, C, *positions]`` -> the same."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map."""
        shape = (-1, *[1] * (x.dim() - 2))
        return x * self.scale.reshape(*shape) + self.shift.reshape(*shape)

    def extra_repr(self) -> str:
        """The channels."""
        return str(len(self.scale))


def fold(model: nn.Module) -> nn.Module:
    """A copy of the network, in evaluation mode, with batch norm folded into the layer before it.

    ``W <- W gamma / sqrt(var + eps)`` row by row, ``b <- (b - mean) gamma / sqrt(var + eps) + beta`` (Ioffe
    and Szegedy 2015, Alg. 2, step 11), computed in float64: the outputs are those of the network in
    evaluation mode, to rounding. What a norm follows is read from the network's code (`torch.fx`); where that
    cannot be traced, only neighbours in an `nn.Sequential` count. A norm that does not follow a linear or
    convolutional layer, or shares that layer's output, becomes a `ChannelAffine`; one without running
    statistics stays.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()).eval()
        >>> fold(model)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
        )
        >>> x = torch.randn(5, 4)
        >>> bool(torch.allclose(fold(model)(x), model(x), atol=1e-6))
        True
    """
    model = copied(model).eval()
    folded: set[int] = set()
    for layer, norm in _pairs(model):
        if norm.running_mean is not None and id(norm) not in folded:
            _into(layer, *_affine(norm))
            folded.add(id(norm))

    def plan(child: Any) -> list[nn.Module]:
        pair = isinstance(child, Normalised) and id(child[1]) in folded
        if pair or id(child) in folded:
            return without(child)
        if not is_batchnorm(child) or child.running_mean is None:
            return [child]
        scale, shift = _affine(child)
        kind = child.running_mean
        return [ChannelAffine(scale.to(kind), shift.to(kind)).eval()]

    return rebuilt(model, plan)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm at inference, float64."""
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        return scale, shift if norm.bias is None else shift + norm.bias.double()


def _into(layer: Any, scale: Tensor, shift: Tensor) -> None:
    weight = layer.weight
    with torch.no_grad():
        rows = scale.reshape(-1, *[1] * (weight.dim() - 1))
        bias = shift if layer.bias is None else layer.bias.double() * scale + shift
        layer.weight = nn.Parameter((weight.double() * rows).to(weight), weight.requires_grad)
        layer.bias = nn.Parameter(bias.to(weight), weight.requires_grad)


class _Flow(Tracer):
    """Reads which layer's output goes into which; norms are kept whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_batchnorm(m) or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Foldable layers and the norms that alone take their output; nothing of the two is used elsewhere."""
    try:
        graph = _Flow().trace(model)
    except Exception:  # whatever tracing the user's code brings up
        found = _neighbours(model)
    else:
        found = _successors(model, graph)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return [
        (layer, norm)
        for layer, norm in found
        if type(layer) in FOLDABLE and is_batchnorm(norm) and owners[id(layer.weight)] == 1
        if not layer._forward_hooks and not layer._forward_pre_hooks
    ]


def _successors(model: nn.Module, graph: Graph) -> list[tuple[Any, Any]]:
    """Modules that are called once, the second on nothing but the output of the first."""
    named = dict(model.named_modules(remove_duplicate=False))
    calls = {node: named[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    times = Counter(id(module) for module in calls.values())
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    times.update(id(named[name]) for name in read)
    return [
        (calls[source], module)
        for node, module in calls.items()
        for source in node.args[:1]
        if isinstance(source, Node) and source in calls and len(source.users) == 1
        if times[id(calls[source])] == times[id(module)] == 1
    ]


def _neighbours(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    return [
        pair
        for owner in model.modules()
        if type(owner) in (nn.Sequential, Normalised)
        for pair in itertools.pairwise(owner.children())
        if all(places[id(m)] == 1 for m in pair)
    ]
