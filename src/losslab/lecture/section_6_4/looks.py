"""What stands before each non-linearity of a population while it trains: position, spread, drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.engine import Population, randomness
from losslab.signals import Flow, Instrument, drift, percentiles, saturated, shift_in_distribution
from losslab.tasks import Batch, map_nest

if TYPE_CHECKING:
    import pandas as pd

PERCENTILES = (15, 50, 85)
"""Those of Ioffe and Szegedy's figure 1."""

UNITS = 32
"""The most units of a layer that are followed, the first ones; units of a layer are exchangeable."""

KEPT = 100
"""The most activations of one unit that are kept whole."""


class Before(NamedTuple):
    """The inputs of one non-linearity, and what the batch norm before it got, if there is one.

    Attributes:
        name: The non-linearity's layer.
        inputs: What it gets, ``[N, samples, units]``.
        raw: What the batch norm got.
        gamma: The norm's scale, ``[N, units]``.
        beta: The norm's shift, ``[N, units]``.
        eps: The norm's addition to the variance.
        noisy: Whether the norm adds noise.
    """

    name: str
    inputs: Tensor
    raw: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 0.0
    noisy: bool = False

    def normalised(self) -> Tensor | None:
        """``(x - mean) / sqrt(var + eps)`` over the batch, before gamma and beta; None without batch norm."""
        if self.raw is None:
            return None
        mean, variance = self.raw.mean(1, keepdim=True), self.raw.var(1, correction=0, keepdim=True)
        return (self.raw - mean) / (variance + self.eps).sqrt()

    def errors(self) -> tuple[Tensor, Tensor]:
        """How far mean and variance are from beta and gamma^2 var / (var + eps), the worst unit, ``[N]``."""
        if self.raw is None or self.gamma is None or self.beta is None or self.noisy:
            nothing = self.inputs.new_full(self.inputs.shape[:1], torch.nan)
            return nothing, nothing
        variance = self.raw.var(1, correction=0)
        wanted = self.gamma.square() * variance / (variance + self.eps)
        mean_error = (self.inputs.mean(1) - self.beta).abs() / (self.beta.abs() + self.gamma.abs())
        variance_error = (self.inputs.var(1, correction=0) / wanted - 1).abs()
        return mean_error.amax(1), variance_error.amax(1)


def befores(seen: Flow, eps: float = 1e-5) -> list[Before]:
    """What stands before each activation of a network, in the order of the calls."""
    norms = [name for name, layer in seen.layers.items() if "BatchNorm" in layer.kind]
    activations = [name for name, layer in seen.layers.items() if layer.activation is not None]
    if not norms:
        return [Before(name, _units(seen.inputs[name])) for name in activations]
    found = []
    for name, norm in zip(activations, norms, strict=True):
        gamma, beta = (seen.points[f"{norm}.{which}"][:, :UNITS] for which in ("weight", "bias"))
        noisy = seen.layers[norm].kind.startswith("Noisy")
        inputs, raw = _units(seen.inputs[name]), _units(seen.inputs[norm])
        found.append(Before(name, inputs, raw, gamma, beta, eps, noisy))
    return found


def _units(values: Tensor) -> Tensor:
    """``[N, B, units]`` or ``[N, B, units, *positions]`` -> ``[N, samples, units]``, the first units."""
    flat = values.movedim(2, -1).flatten(1, -2) if values.dim() > 3 else values
    return flat[..., :UNITS]


class Looks:
    """Given as ``watch`` to `losslab.train`: looks at some members at every recorded step, in float64.

    A look is a forward pass in training mode over one fixed batch; noise is drawn as at a training step, and
    nothing of the population moves.

    Args:
        batch: The examples ``(x, labels)`` that every look is over.
        members: Which members to look at; all by default.
    """

    def __init__(self, batch: Batch, members: Sequence[int] | None = None) -> None:
        self.batch = map_nest(lambda t: t.double() if t.is_floating_point() else t, batch)
        self.members = members
        self.instrument: Instrument | None = None
        self.rows: list[pd.DataFrame] = []
        self.values: list[pd.DataFrame] = []
        self.outputs: list[pd.DataFrame] = []
        self.earlier: dict[tuple[int, str], Tensor] = {}

    def __call__(self, population: Population) -> None:
        """One look."""
        import pandas as pd

        index = list(range(len(population))) if self.members is None else list(self.members)
        if self.instrument is None:
            self.instrument = Instrument.of(population)
        seeds = [population.seeds[i] for i in index]
        points = population.points.select(index).to(dtype=torch.float64)
        device = next(iter(points.values())).device
        keys = randomness.fold(randomness.member_keys(seeds, "forward", device), population.step)
        batch = map_nest(lambda t: t.to(device), self.batch)
        seen = self.instrument(points, batch, keys, training=True, gradients=False)
        answers = list(seen.outputs.values())[-1].argmax(-1)
        right = (answers == batch[1]).double().mean(1)
        outputs = {"member": index, "seed": seeds, "step": population.step}
        measured = {"loss": seen.losses.cpu().numpy(), "accuracy": right.cpu().numpy()}
        self.outputs.append(pd.DataFrame(outputs | measured))
        for layer, before in enumerate(befores(seen), start=1):
            found = self._measured(layer, before) | {"saturated": saturated(seen, before.name)}
            frame = pd.DataFrame({name: value.cpu().numpy() for name, value in found.items()})
            place = {"layer": layer, "step": population.step}
            self.rows.append(frame.assign(member=index, seed=seeds, **place))
            ordered = np.sort(before.inputs[0, :, 0].cpu().numpy())
            # Evenly spread over the sorted values, so that few of them show the distribution.
            chosen = np.linspace(0, len(ordered) - 1, min(KEPT, len(ordered))).astype(int)
            self.values.append(pd.DataFrame({"value": ordered[chosen], "member": index[0], **place}))

    def tables(self) -> dict[str, pd.DataFrame]:
        """The looks, the samples and the outputs.

        Returns:
            ``looks``, one row a (step, layer, member): ``drift`` and ``wasserstein`` since the look before,
            of what the non-linearity gets and, with the ending ``_normalised``, before gamma and beta;
            ``saturated``, the share in the flat part of the non-linearity; ``p15``, ``p50``, ``p85`` of unit
            0; ``mean`` (its size) and ``variance`` of the middle unit; ``mean_error`` and ``variance_error``.
            NaN where there is no batch norm, no look before, or the member has diverged. ``samples``, the
            distribution of unit 0 in the first member that was looked at: ``step``, ``layer``, ``member``,
            ``value``.
            ``outputs``, one row a (step, member): ``loss`` and ``accuracy`` in training mode, noise included.
        """
        import pandas as pd

        parts = {"looks": self.rows, "samples": self.values, "outputs": self.outputs}
        return {name: pd.concat(rows, ignore_index=True) for name, rows in parts.items()}

    def _measured(self, layer: int, before: Before) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        nothing = before.inputs.new_full(before.inputs.shape[:1], torch.nan)
        for ending, values in (("", before.inputs), ("_normalised", before.normalised())):
            earlier = self.earlier.get((layer, ending))
            for name, measure in (("drift", drift), ("wasserstein", shift_in_distribution)):
                found[name + ending] = nothing
                if earlier is not None and values is not None:
                    found[name + ending] = measure(earlier, values)
            if values is not None:
                self.earlier[layer, ending] = values
        found["mean_error"], found["variance_error"] = before.errors()
        found["mean"] = before.inputs.mean(1).abs().median(-1).values
        found["variance"] = before.inputs.var(1, correction=0).median(-1).values
        unit = percentiles(before.inputs[..., 0], PERCENTILES, sample=None)
        return found | {f"p{p}": unit[:, k] for k, p in enumerate(PERCENTILES)}
