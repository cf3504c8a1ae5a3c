"""The objective by plain torch, one network at a time: slow, in the module's own mode, no stack anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.tasks.nest import leaves, map_nest


def pieces(batch: Any, chunk: int | None) -> list[tuple[Any, float]]:
    """Consecutive chunks and their shares of the examples."""
    tensors = leaves(batch)
    if not tensors:
        return [(batch, 1.0)]
    n = len(tensors[0])
    size = chunk or n
    return [
        (map_nest(lambda t, a=a: t[a : a + size], batch), min(size, n - a) / n) for a in range(0, n, size)
    ]


def objective(
    module: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    vectors: Tensor,
    chunk: int | None = None,
    training: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient ``[P]`` and products of the Hessian with vectors ``[K, P]``, mean over examples."""
    value, gradient, products = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
    for part, share in pieces(batch, chunk):
        network = copy.deepcopy(module).train(training)
        for layer in network.modules():
            if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
                layer.p = 0.0
        weights = [p for p in network.parameters() if p.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernel of attention has no second derivative
            here = loss(network, part)
        flat = _flat(torch.autograd.grad(here, weights, create_graph=True, allow_unused=True), weights)
        rows = []
        for v in vectors:
            along = (flat * v).sum()
            rows.append(
                _flat(torch.autograd.grad(along, weights, retain_graph=True, allow_unused=True), weights)
                if along.requires_grad
                else torch.zeros_like(v)
            )
        value = value + share * here.detach()
        gradient = gradient + share * flat.detach()
        products = products + share * torch.stack(rows).detach()
    return value, gradient, products


def _flat(grads: tuple[Tensor | None, ...], weights: list[nn.Parameter]) -> Tensor:
    pairs = zip(grads, weights, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])


def with_population_statistics(
    module: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, chunk: int | None
) -> nn.Module:
    """A copy whose batch norm holds the mean of the chunks' statistics, weighted by their examples."""
    found = copy.deepcopy(module)
    norms = {n: m for n, m in found.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    sums: dict[str, list[Any]] = {name: [0.0, 0.0] for name in norms}
    for part, share in pieces(batch, chunk):
        network = copy.deepcopy(module).train()
        seen = {}
        hooks = [
            network.get_submodule(name).register_forward_pre_hook(
                lambda _m, given, name=name, seen=seen: seen.__setitem__(name, given[0].detach())
            )
            for name in norms
        ]
        loss(network, part)
        for hook in hooks:
            hook.remove()
        for name, x in seen.items():
            over = [0, *range(2, x.dim())]
            sums[name][0] = sums[name][0] + share * x.mean(over)
            sums[name][1] = sums[name][1] + share * x.var(over, unbiased=True)
    for name, norm in norms.items():
        norm.running_mean.copy_(sums[name][0])
        norm.running_var.copy_(sums[name][1])
    return found
