"""All cheap statistics of a flow, in as few operations as there can be.

The passes over all values are made layer by layer, while the values are in the cache. What they leave is
small, and operations on it would cost more than their arithmetic; so it is put off, and then done for all
layers of one shape, and for many looks, in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from losslab.signals.capture import Layer
from losslab.signals.flows import Flow
from losslab.signals.statistics import (
    PERCENTILES,
    SAMPLE,
    Statistics,
    as_percentiles,
    drawn,
    flat_part,
    gates,
    mean_and_variance,
    of_units,
    ranked,
    share_of,
    silent_units,
    single_valued,
    unit_moments,
)

Place = tuple[str, str]
"""Layer and direction."""

Finish = Callable[..., Statistics]
"""Stacks of columns ``[K, N, ...]`` -> statistic -> ``[K, N]``."""


@dataclass(frozen=True)
class Part:
    """Some statistics of one layer, half done.

    Attributes:
        place: Whose they are.
        finish: What is still to do.
        columns: With what, ``[N, ...]`` each.
    """

    place: Place
    finish: Finish
    columns: tuple[Tensor, ...]


def describe(
    seen: Flow,
    which: Sequence[float] = PERCENTILES,
    sample: int | None = SAMPLE,
    seed: int = 0,
    backward_percentiles: bool = True,
) -> dict[Place, Statistics]:
    """All cheap statistics of a flow: (layer, direction) -> statistic -> ``[N]``.

    Args:
        seen: The flow.
        which: As for `losslab.signals.percentiles`.
        sample: As for `losslab.signals.percentiles`.
        seed: As for `losslab.signals.percentiles`.
        backward_percentiles: Whether to take percentiles of the gradients too.

    Returns:
        For the directions ``"forward"`` (outputs), ``"backward"`` (gradients with respect to the outputs) and
        ``"weight"`` (a layer's first weight and its gradient). Both ways there are ``mean``, ``std`` and
        percentiles (``p15``), forward also ``unit_std``, ``constant``, ``saturated``, ``dead``. A weight has
        ``weight_norm``; of its gradient ``mean``, ``std``, ``norm``; and ``gradient_ratio``,
        the gradient's norm by the weight's.
    """
    return finished([measured(seen, which, sample, seed, backward_percentiles)])[0]


def measured(
    seen: Flow, which: Sequence[float], sample: int | None, seed: int = 0, backward_percentiles: bool = True
) -> list[Part]:
    """The passes over all values; arguments as for `describe`."""
    parts: list[Part] = []
    which = as_percentiles(which)
    for name, layer in seen.layers.items():
        flat = flat_part(layer, seen.inputs.get(name))
        parts += ahead(name, layer, seen.outputs[name], flat, which, sample, seed)
    for name, back in seen.gradients.items():
        parts.append(behind(name, back))
        if backward_percentiles:
            parts.append(Part((name, "backward"), _percentiles(which), (drawn(back, sample, seed),)))
    return parts + weight_parts(seen.layers, seen.points.weights, seen.weight_gradients)


def ahead(
    name: str,
    layer: Layer,
    values: Tensor,
    flat: Tensor | None,
    which: tuple[float, ...],
    sample: int | None,
    seed: int = 0,
) -> list[Part]:
    """The parts of a layer's output ``[N, B, ...]``; ``flat`` is its `flat_part`."""
    mean, variance = unit_moments(values, layer.unit_axis)
    shares = (None if gates(layer) else flat, silent_units(layer, values, flat))
    finish = _single_forward if single_valued(values, layer.unit_axis) else _forward
    place = (name, "forward")
    return [
        Part(place, finish, (mean, variance, *(share_of(flags, mean[:, 0]) for flags in shares))),
        Part(place, _percentiles(which), (drawn(values, sample, seed),)),
    ]


def behind(name: str, back: Tensor) -> Part:
    """The moments of the gradient with respect to a layer's output."""
    return Part((name, "backward"), _backward, mean_and_variance(back, [*range(1, back.dim())]))


def weight_parts(
    layers: Mapping[str, Layer], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> list[Part]:
    """The parts of each layer's weight and its gradient, if there are any gradients."""
    parts = []
    for name, weight in main_weights(layers, weights):
        columns: tuple[Tensor, ...] = (_norm(weights[weight].detach()),)
        if gradients:
            gradient = gradients[weight].flatten(1)
            columns += (gradient.mean(1), _norm(gradient), _count(gradient))
        parts.append(Part((name, "weight"), _weight, columns))
    return parts


def glanced(name: str, values: Tensor, ranks: Tensor, which: tuple[float, ...], relu: bool) -> list[Part]:
    """The parts of a layer's values from what `losslab.engine.glance` told of it.

    Args:
        name: The layer.
        values: ``[N, 2, 5]``.
        ranks: Its percentiles, ``[N, P]``.
        which: Percentiles.
        relu: Whether it is a ReLU.
    """
    output, back = values.unbind(1)
    return [
        Part((name, "forward"), _glanced_relu if relu else _glanced, (output,)),
        Part((name, "forward"), _ranks(which), (ranks,)),
        Part((name, "backward"), _backward, (back[:, 0], back[:, 1])),
    ]


def glanced_weight(name: str, sizes: Tensor, count: int, steps: Tensor) -> list[Part]:
    """The same of a layer's weight.

    Args:
        name: The layer.
        sizes: ``[N, 5]``.
        count: Numbers in the weight.
        steps: Updates since the earlier weight, ``[N]``; 0 where there is none.
    """
    square, total, along, moved, before = sizes.unbind(1)
    told = (t.to(torch.float32) for t in (square.sqrt(), total / count, along.sqrt()))
    ratio = (moved.sqrt() / (steps * before.sqrt())).to(torch.float32).masked_fill(steps == 0, torch.nan)
    place = (name, "weight")
    return [
        Part(place, _weight, (*told, torch.full_like(square, count))),
        Part(place, _update, (ratio,)),
    ]


def finished(looks: Sequence[Sequence[Part]]) -> list[dict[Place, Statistics]]:
    """What is left to do after `measured`, for some looks."""
    alike: dict[Any, list[tuple[int, Part]]] = {}
    found: list[dict[Place, Statistics]] = [{} for _ in looks]
    for k, parts in enumerate(looks):
        for part in parts:
            found[k].setdefault(part.place, {})
            key = (part.finish, *((t.shape, t.dtype) for t in part.columns))
            alike.setdefault(key, []).append((k, part))
    for (finish, *_), group in alike.items():
        stacks = (torch.stack(column) for column in zip(*(part.columns for _, part in group), strict=True))
        for name, values in finish(*stacks).items():
            for (k, part), value in zip(group, values.unbind(0), strict=True):
                found[k][part.place][name] = value
    return [{place: row[place] for place in _ordered(row)} for row in found]


def main_weights(layers: Mapping[str, Layer], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Each layer with its first trainable weight; at the layer's first call."""
    for name, layer in layers.items():
        first = next((w for w in layer.weights if w in weights), None)
        if first is not None and "#" not in name:
            yield name, first


def update_parts(layers: Mapping[str, Layer], ratios: Mapping[str, Tensor]) -> list[Part]:
    """The update-to-weight ratio of each layer's weight."""
    return [Part((name, "weight"), _update, (ratios[w],)) for name, w in main_weights(layers, ratios)]


def _ordered(places: Mapping[Place, Statistics]) -> list[Place]:
    """Layer by layer."""
    layers = list(dict.fromkeys(layer for layer, _ in places))
    return [(a, b) for a in layers for b in ("forward", "backward", "weight") if (a, b) in places]


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)


def _count(values: Tensor) -> Tensor:
    return values.new_full(values.shape[:1], values.shape[1], dtype=torch.float64)


def _forward(
    mean: Tensor, variance: Tensor, flat: Tensor, silent: Tensor, single: bool = False
) -> Statistics:
    told = of_units(mean, variance, single)
    gone = told["mean"].isnan()
    return told | {
        "saturated": flat.masked_fill(gone, torch.nan),
        "dead": silent.masked_fill(gone, torch.nan),
    }


def _single_forward(mean: Tensor, variance: Tensor, flat: Tensor, silent: Tensor) -> Statistics:
    return _forward(mean, variance, flat, silent, single=True)


@lru_cache(maxsize=16)
def _percentiles(which: tuple[float, ...]) -> Finish:
    return lambda values: _ranks(which)(ranked(values, which))


@lru_cache(maxsize=16)
def _ranks(which: tuple[float, ...]) -> Finish:
    return lambda ranks: {f"p{p:g}": column for p, column in zip(which, ranks.unbind(-1), strict=True)}


def _backward(mean: Tensor, variance: Tensor) -> Statistics:
    return {"mean": mean, "std": variance.sqrt()}


def _glanced(told: Tensor, relu: bool = False) -> Statistics:
    mean, variance, within, flat, silent = told.unbind(2)
    neither, gone = torch.full_like(mean, torch.nan), mean.isnan()
    overflown = ~(variance + mean.square()).isfinite()  # what is rounding beside that, nobody knows
    return {
        "mean": mean,
        "std": variance.sqrt(),
        "unit_std": within.sqrt(),
        "constant": flat.masked_fill(overflown, torch.nan),
        "saturated": neither,
        "dead": silent.masked_fill(gone, torch.nan) if relu else neither,
    }


def _glanced_relu(told: Tensor) -> Statistics:
    return _glanced(told, relu=True)


def _weight(
    size: Tensor, mean: Tensor | None = None, norm: Tensor | None = None, count: Tensor | None = None
) -> Statistics:
    if mean is None or norm is None or count is None:
        return {"weight_norm": size}
    # One pass less than around the mean: weights are many, and their gradients' mean is small.
    square = norm.double().square() / count - mean.double().square()
    std = square.clamp(min=0).sqrt().to(mean.dtype)
    return {"weight_norm": size, "mean": mean, "std": std, "norm": norm, "gradient_ratio": norm / size}


def _update(ratio: Tensor) -> Statistics:
    return {"update_ratio": ratio}
