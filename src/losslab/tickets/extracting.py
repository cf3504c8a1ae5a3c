"""Tickets as ordinary modules: with torch's pruning masks, or compacted, and whether that pays."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from losslab.errors import LosslabError
from losslab.tasks.models import ACTIVATIONS


def with_torch_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy whose pruned layers hold ``weight_orig`` and ``weight_mask``, as torch's pruning makes them.

    ``torch.nn.utils.prune.remove(layer, "weight")`` makes the pruning permanent.

    Args:
        module: A network.
        masks: Name of a parameter -> True where it is kept, ``[*shape]``.

    Raises:
        LosslabError: A mask of another model.

    Example:
        >>> layer = with_torch_masks(nn.Linear(2, 1), {"weight": torch.tensor([[True, False]])})
        >>> layer.weight_mask.tolist(), prune.is_pruned(layer)
        ([[1.0, 0.0]], True)
    """
    made = copy.deepcopy(module)
    parameters = dict(made.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise LosslabError(
                f"the mask of {name!r} does not fit the network: pass masks of this model, shape by shape"
            )
        owner, _, leaf = name.rpartition(".")
        prune.custom_from_mask(made.get_submodule(owner), leaf, mask.to(parameters[name]))
    return made


@dataclass(frozen=True)
class Compacted:
    """A network without its dead parts.

    Attributes:
        module: The smaller network: the same function, up to rounding.
        widths: Units of each layer that are left, inputs first.
        before: Those of the network it was made from.
        weights: Numbers in its weights; ``before`` that many.
        dense: Numbers in the weights of the network it was made from.
    """

    module: nn.Module
    widths: list[int]
    before: list[int]
    weights: int
    dense: int


def compact(module: nn.Module) -> Compacted:
    """Removes what a network of linear layers computes for nothing; exact up to rounding.

    A hidden unit whose incoming weights are zero puts out a constant, which moves into the next layer's
    biases; one whose outgoing weights are all zero is dropped; so on until nothing is left to remove.

    Args:
        module: A `torch.nn.Sequential` of linear layers and elementwise activations (dropout is dropped).

    Raises:
        LosslabError: Another kind of network.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = net[0].weight.data[1].zero_()
        >>> compact(net).widths
        [2, 2, 1]
    """
    layers, between = _chain(module)
    weights = [layer.weight.detach().double().clone() for layer in layers]
    biases = [
        torch.zeros(len(w), dtype=torch.float64)
        if layer.bias is None
        else layer.bias.detach().double().clone()
        for layer, w in zip(layers, weights, strict=True)
    ]
    before = [weights[0].shape[1], *(len(w) for w in weights)]
    changed = True
    while changed:
        changed = False
        for k in range(len(weights) - 1):
            silent = (weights[k] == 0).all(1)
            unheard = (weights[k + 1] == 0).all(0)
            gone = silent | unheard
            if bool(gone.all()):  # a layer of one unit stays: a module has no layer without units
                gone = gone.clone()
                gone[0] = False
            if not bool(gone.any()):
                continue
            with torch.no_grad():
                constant = between[k](biases[k])
            biases[k + 1] += weights[k + 1][:, gone] @ constant[gone]
            weights[k], biases[k] = weights[k][~gone], biases[k][~gone]
            weights[k + 1] = weights[k + 1][:, ~gone]
            changed = True
    built: list[nn.Module] = []
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        linear = nn.Linear(w.shape[1], len(w)).to(layers[k].weight)
        with torch.no_grad():
            linear.weight.copy_(w)
            assert linear.bias is not None
            linear.bias.copy_(b)
        built += [linear, copy.deepcopy(between[k])] if k < len(between) else [linear]
    widths = [weights[0].shape[1], *(len(w) for w in weights)]
    made = nn.Sequential(*built).train(module.training)
    dense = sum(layer.weight.numel() for layer in layers)
    return Compacted(made, widths, before, sum(w.numel() for w in weights), dense)


@dataclass(frozen=True)
class Speed:
    """How long a forward pass takes, dense and compacted.

    Attributes:
        dense: Seconds of the network as it was.
        compact: Seconds of the compacted one.
        ratio: dense / compact.
        low: Lower quartile of the ratio over rounds.
        high: Upper quartile.
        told: One sentence.
    """

    dense: float
    compact: float
    ratio: float
    low: float
    high: float
    told: str


def speed(module: nn.Module, inputs: Tensor, rounds: int = 15, calls: int = 5) -> Speed:
    """Measures what compaction gains on these inputs, dense and compact in turn; says so if it is nothing.

    Args:
        module: A network `compact` takes.
        inputs: A batch.
        rounds: Pairs of timings.
        calls: Forward passes a timing.
    """
    small = compact(module)
    contenders = (copy.deepcopy(module).eval(), small.module.eval())
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for turn in range(rounds + 2):
            for k, network in enumerate(contenders):
                begun = time.perf_counter()
                for _ in range(calls):
                    network(inputs)
                if turn >= 2:
                    times[k].append((time.perf_counter() - begun) / calls)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    widths = "-".join(map(str, small.widths))
    pays = f"runs {middle:.2f} times as fast" if low > 1 else "does not pay: it is no faster"
    told = f"{small.weights / small.dense:.0%} of the dense weights are left as {widths}, which {pays}"
    return Speed(statistics.median(times[0]), statistics.median(times[1]), middle, low, high, told)


def _chain(module: nn.Module) -> tuple[list[nn.Linear], list[nn.Module]]:
    """Linear layers, and what lies between them."""
    elementwise = tuple(type(make()) for make in ACTIVATIONS.values())
    layers: list[nn.Linear] = []
    between: list[list[nn.Module]] = []
    for part in module if isinstance(module, nn.Sequential) else []:
        if isinstance(part, nn.Linear):
            layers.append(part)
            between.append([])
        elif isinstance(part, elementwise) and layers:
            between[-1].append(part)
        elif not isinstance(part, nn.Dropout):
            layers = []
            break
    if len(layers) < 2 or between[-1]:
        raise LosslabError(
            f"{type(module).__name__} is no chain of linear layers and elementwise activations: compact such "
            "a network, as losslab.tasks.mlp builds it"
        )
    return layers, [p[0] if len(p) == 1 else nn.Sequential(*p) for p in between[:-1]]
