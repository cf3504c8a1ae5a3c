"""Scopes: among which weights the lowest scores are sought, and how many go at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from losslab.engine.points import Stack
from losslab.errors import LosslabError
from losslab.tickets.prunable import Layers


@dataclass(frozen=True)
class Scope:
    """What one round of pruning takes.

    Args:
        rate: Share of the living weights that goes, in (0, 1).
        output: That of the output layer; by default half of ``rate`` in layers of their own, and nothing
            where all layers are ranked together or units go.
        rates: Rates of single layers, by the name of their weight.
        layers: Prune these weights only.
        together: Rank the weights of all layers together instead of each layer's among themselves.
        units: Take whole units or filters, ranked by the mean score of their incoming weights, with their
            biases; the output's units stay.

    Raises:
        LosslabError: A rate outside of (0, 1), or rates of layers that are ranked together.

    Example:
        >>> from losslab.tasks import lenet_300_100
        >>> from losslab.tickets import prunable
        >>> [round(100 * s, 1) for s in Scope().shares(prunable(lenet_300_100()()), 3)]
        [100.0, 80.0, 64.1, 51.3]
    """

    rate: float = 0.2
    output: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] | None = None
    together: bool = False
    units: bool = False

    def __post_init__(self) -> None:
        for name, rate in {"rate": self.rate, **self.rates}.items():
            if not 0 < rate < 1:
                raise LosslabError(f"{name} is {rate:g}: a share of the weights lies in (0, 1), 0.2 say")
        if self.output is not None and not 0 <= self.output < 1:
            raise LosslabError(f"output is {self.output:g}: a share lies in [0, 1), 0 leaves the layer alone")
        if self.together and (self.rates or self.units or self.output):
            raise LosslabError(
                "layers that are ranked together have one rate: leave out rates, units and output"
            )

    def describe(self) -> dict[str, object]:
        """Every setting as a plain value."""
        told = {"rate": self.rate, "output": self.output, "rates": dict(self.rates)}
        return told | {"layers": self.layers, "together": self.together, "units": self.units}

    def of(self, layers: Layers, times: float = 1) -> dict[str, float]:
        """The rate of each weight, ``times`` rounds taken at once; 0 for those left alone."""
        chosen = layers.chosen(self.layers)
        layers.chosen(self.rates)
        told = {}
        for name in layers.sizes:
            rate = self.rates.get(name, self.rate)
            if name == layers.output and name not in self.rates:
                none = self.together or self.units
                rate = self.output if self.output is not None else 0.0 if none else self.rate / 2
            told[name] = 1 - (1 - rate) ** times if name in chosen else 0.0
        return told

    def shares(self, layers: Layers, levels: int, at_once: bool = False) -> list[float]:
        """P_m at levels 0, 1, ..., ``levels``: the share of the prunable weights that is left, to the weight.

        For unstructured pruning, whose counts do not depend on the weights.

        Args:
            layers: What may be pruned.
            levels: Rounds of pruning.
            at_once: Count every level from the whole network, as one-shot pruning does.

        Raises:
            LosslabError: A level would empty a layer or prune nothing, or units are pruned.
        """
        if self.units:
            raise LosslabError(
                "how many weights units take depends on the layers: prune, and count the masks"
            )
        sizes = dict(layers.sizes)
        if self.together:
            rates = self.of(layers)
            sizes = {"the network": sum(size for n, size in sizes.items() if rates[n] > 0)}
        rest = layers.total - sum(sizes.values())
        counts, told = sizes, [1.0]
        for level in range(1, levels + 1):
            times = level if at_once else 1
            rates = {"the network": 1 - (1 - self.rate) ** times} if self.together else self.of(layers, times)
            begun = sizes if at_once else counts
            left = {n: _left(c, rates[n], n, False, f"level {level}") for n, c in begun.items()}
            if left == counts and not at_once:  # then it stays so
                raise idle(level)
            counts = left
            told.append((sum(counts.values()) + rest) / layers.total)
        return told

    def prune(self, scores: Stack, masks: Stack, layers: Layers, times: float = 1) -> Stack:
        """Masks after one more round (or ``times`` at once): exactly as many go as the rates say.

        Equal scores go in the order of their places. Every member is pruned by its own scores.

        Args:
            scores: Name -> ``[N, *shape]``; NaN counts as the highest.
            masks: What is alive, name -> bool ``[N, *shape]``.
            layers: What may be pruned.
            times: Rounds taken at once.

        Raises:
            LosslabError: A layer would be left without weights.
        """
        rates = {n: r for n, r in self.of(layers, times).items() if r > 0}
        if self.units:
            return _units(scores, masks, layers, rates)
        if not self.together:
            parts = {n: _cut(scores[n].flatten(1), masks[n].flatten(1), r, n) for n, r in rates.items()}
            return masks | {n: part.view_as(masks[n]) for n, part in parts.items()}
        flat, alive = (
            torch.cat([t[n].flatten(1).to(scores[n].dtype if t is scores else torch.bool) for n in rates], 1)
            for t in (scores, masks)
        )
        left = _cut(flat, alive, 1 - (1 - self.rate) ** times, "the network")
        parts = dict(zip(rates, left.split([layers.sizes[n] for n in rates], dim=1), strict=True))
        for name, part in parts.items():
            if not bool(part.any(1).all()):
                raise LosslabError(f"this level would leave {name!r} without weights: prune fewer levels")
        return masks | {n: part.reshape(masks[n].shape) for n, part in parts.items()}


def idle(level: int) -> LosslabError:
    """The error for a level that changes nothing: what is left is so little that every share rounds to 0."""
    fewer = f"{level - 1} levels at most, or " if level > 1 else ""
    return LosslabError(
        f"level {level} would prune nothing, every share of what is left rounds to 0: ask for {fewer}a "
        "higher rate"
    )


def _left(count: int, rate: float, name: str, units: bool, level: str = "this level") -> int:
    left = count - math.floor(rate * count + 0.5)
    if left < 1:
        what = "units" if units else "weights"
        raise LosslabError(f"{level} would leave {name!r} without {what}: prune fewer levels, or less")
    return left


def _cut(scores: Tensor, alive: Tensor, rate: float, name: str, units: bool = False) -> Tensor:
    """Which of ``[N, P]`` stay: of each member's living ones all but the lowest share."""
    found = torch.zeros_like(alive)
    for i in range(len(alive)):
        places = alive[i].nonzero().flatten()
        left = _left(len(places), rate, name, units)
        order = scores[i, places].argsort(stable=True)
        found[i, places[order[len(places) - left :]]] = True
    return found


def _units(scores: Stack, masks: Stack, layers: Layers, rates: Mapping[str, float]) -> Stack:
    """Masks without the units of the lowest mean score; their biases get masks too."""
    found = dict(masks)
    for name, rate in rates.items():
        alive = masks[name].flatten(2).any(2)
        total = (scores[name] * masks[name]).flatten(2).sum(2)
        mean = total / masks[name].flatten(2).sum(2).clamp(min=1)
        stay = _cut(mean, alive, rate, name, units=True)
        found[name] = masks[name] & stay.view(*stay.shape, *[1] * (masks[name].dim() - 2))
        if name in layers.biases:
            bias = layers.biases[name]
            found[bias] = stay if bias not in masks else masks[bias] & stay
    return found
