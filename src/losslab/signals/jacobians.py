"""Singular values of the Jacobians between layers, exactly, for a few examples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losslab.engine import Population
from losslab.errors import LosslabError
from losslab.signals.capture import Capture, sent_back
from losslab.signals.flows import Look, aimed
from losslab.tasks import Data, Task, map_nest
from losslab.tasks.task import Batch, Loss

LARGEST = 2**20
"""The most entries of a Jacobian; a larger one is left out."""


def singular_values(
    network: nn.Module | Population,
    loss: Loss | Task | None = None,
    batch: Batch | Data | None = None,
    layers: Sequence[str] | None = None,
    examples: int = 4,
    training: bool = True,
    largest: int = LARGEST,
) -> dict[tuple[str, str], Tensor]:
    """Singular values of d(output of a layer) / d(output of the layer before), for the first few examples.

    From one activation to the next these are Glorot and Bengio's layer Jacobians (Understanding the
    difficulty of training deep feedforward neural networks, 2010, section 4.2.1); in a fully connected
    network, of ``diag(f'(s)) W``. Signals and gradients keep their size where they lie around 1.

    The Jacobian is computed row by row, backward, and is that of one example's output by the same example's
    input; with batch norm in training mode the batch's statistics are part of the function.

    Args:
        network: As for `losslab.signals.flow`.
        loss: As for `losslab.signals.flow`.
        batch: As for `losslab.signals.flow`.
        layers: The layers to go from one to the next, in the order of the calls; by default the activations
            and the last layer, or all layers with weights where there is no activation.
        examples: How many, from the batch's start.
        training: Whether the network is in training mode.
        largest: The most entries of a Jacobian; pairs with more are left out.

    Returns:
        (from, to) -> ``[N, examples, min(n_from, n_to)]``, descending; NaN where the Jacobian is not finite.
        Layers of which neither follows from the other, such as two branches, are no pair.

    Raises:
        LosslabError: As `losslab.signals.flow`, or fewer than two layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
        >>> found = singular_values(net, lambda m, b: m(b).mean(), torch.ones(5, 3))
        >>> torch.allclose(found["0", "1"][0, 0], torch.linalg.svdvals(net[1].weight))
        True
    """
    instrument, at = aimed(network, loss, batch, layers)
    scouted = instrument.look(at, training, False).captures[0]
    names = _stations(scouted) if layers is None else [*scouted.layers]
    if len(names) < 2:
        raise LosslabError(f"{len(names)} layers to go between, at least two are needed: name them in layers")
    mixing = training and any("BatchNorm" in type(m).__name__ for m in instrument.template.module.modules())
    if not mixing:  # no example sees another: the rest need not be computed
        at = dataclasses.replace(at, batch=map_nest(lambda t: t[:examples], at.batch))
    seen = instrument.look(at, training, True)
    found = {}
    for pair in itertools.pairwise(names):
        source, target = (seen.outputs(name) for name in pair)
        entries = [t[0].shape[2 if seen.together else 1 :].numel() for t in (source, target)]
        if entries[0] * entries[1] <= largest:
            jacobian = _jacobian(seen, source, target, examples, mixing)
            if jacobian is not None:
                found[pair] = _svdvals(jacobian)
    return found


def _stations(seen: Capture) -> list[str]:
    names = [name for name, layer in seen.layers.items() if layer.activation is not None]
    if not names:
        return [name for name, layer in seen.layers.items() if layer.weights]
    last = next(reversed(seen.layers))
    return names if last in names else [*names, last]


def _jacobian(
    seen: Look, sources: list[Tensor], targets: list[Tensor], examples: int, mixing: bool
) -> Tensor | None:
    """``[N, examples, n_to, n_from]``; None where the targets are no function of the sources."""
    flat = [t.flatten(2 if seen.together else 1) for t in targets]
    count = min(examples, flat[0].shape[-2])

    if all(g is None for g in sent_back(_total(flat), sources, keep=True)):
        return None

    def row(total: Tensor) -> Tensor:
        sent = sent_back(total, sources, keep=True)
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip(sources, sent, strict=True)]
        return seen.gathered(filled).flatten(2)[:, :count]

    rows = []
    for unit in range(flat[0].shape[-1]):
        if mixing:
            each = [row(_total([t[..., e, unit] for t in flat]))[:, e] for e in range(count)]
            rows.append(torch.stack(each, 1))
        else:
            rows.append(row(_total([t[..., :count, unit] for t in flat])))
    return torch.stack(rows, 2)


def _total(values: Sequence[Tensor]) -> Tensor:
    """The sum of all numbers of some tensors."""
    return torch.stack([t.sum() for t in values]).sum()


def _svdvals(jacobian: Tensor) -> Tensor:
    finite = jacobian.isfinite().all(-1).all(-1, keepdim=True)
    sound = torch.where(finite[..., None], jacobian, torch.zeros_like(jacobian))
    found = torch.linalg.svdvals(sound.to(torch.promote_types(sound.dtype, torch.float32)))
    return torch.where(finite, found, torch.full_like(found, torch.nan))
