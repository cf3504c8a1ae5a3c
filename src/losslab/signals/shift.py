"""Internal covariate shift by gradients: how much a layer's changes when the layers below it step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from losslab.engine import Execution, Points, Population
from losslab.engine.backends import LoopBackend, Stand
from losslab.engine.points import Stack
from losslab.engine.template import Template
from losslab.errors import LosslabError, unknown
from losslab.rules.rule import Weights
from losslab.signals.flows import aimed
from losslab.tasks import Data, Task, map_nest
from losslab.tasks.task import Batch, Loss

if TYPE_CHECKING:
    import pandas as pd

TOGETHER = 2**26
"""The most weights that are evaluated as one stack."""


@dataclass(frozen=True, eq=False)
class GradientShift:
    """Of each layer i and each member, ``[K, N]``; see `gradient_shift` for G and G'.

    Attributes:
        layers: The K layers, in order.
        difference: ``||G_i - G'_i||_2``.
        cosine: ``<G_i, G'_i> / (||G_i|| ||G'_i||)``.
        norm: ``||G_i||_2``.
        losses: The loss at the earlier weights, ``[N]``.
    """

    layers: tuple[str, ...]
    difference: Tensor
    cosine: Tensor
    norm: Tensor
    losses: Tensor

    @property
    def relative(self) -> Tensor:
        """``||G_i - G'_i|| / ||G_i||``, which a change of the gradient's scale leaves alone, ``[K, N]``."""
        return self.difference / self.norm

    @property
    def table(self) -> pd.DataFrame:
        """One row a (layer, member): ``difference``, ``relative``, ``cosine``, ``norm``."""
        import pandas as pd

        members = self.losses.shape[0]
        columns = {name: getattr(self, name) for name in ("difference", "relative", "cosine", "norm")}
        return pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in range(members)],
                "member": list(range(members)) * len(self.layers),
                **{name: t.reshape(-1).double().cpu().numpy() for name, t in columns.items()},
            }
        )


def gradient_shift(
    network: nn.Module | Population,
    later: Points | nn.Module | None = None,
    loss: Loss | Task | None = None,
    batch: Batch | Data | None = None,
    lr: float | Sequence[float] | Tensor | None = None,
    layers: Sequence[str] | None = None,
    private: bool = False,
) -> GradientShift:
    """The gradient of each layer before and after the layers below it have stepped, on the same batch.

    Santurkar, Tsipras, Ilyas, Madry, "How does batch normalization help optimization?" (2018), definition
    2.1: with the weights W^t of layers 1 to k and W^{t+1} after an update,

        G_i  = grad_{W_i} L(W_1^t, ..., W_k^t)
        G'_i = grad_{W_i} L(W_1^{t+1}, ..., W_{i-1}^{t+1}, W_i^t, W_{i+1}^t, ..., W_k^t)

    and the shift of layer i is ``||G_i - G'_i||``; it is 0 for the first layer. A layer's weights are all
    those of its module (a bias too, and gamma and beta of batch norm); the layers are in the order in which
    the network registers them. All layers and members are evaluated as one stack, in training mode.

    Args:
        network: Stands at W^t: a module or a population.
        later: Stands at W^{t+1}.
        loss: As for `losslab.signals.flow`.
        batch: As for `losslab.signals.flow`.
        lr: Instead of ``later``: W^{t+1} is a step of plain gradient descent at this rate (one, or one a
            member) on the batch.
        layers: Names of modules, to measure these only; the others step all the same.
        private: Whether each member has its own batch.

    Raises:
        LosslabError: Neither or both of ``later`` and ``lr``, weights of another architecture, no such layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> seen = gradient_shift(net, loss=lambda m, b: m(b).square().mean(), batch=torch.ones(4, 2), lr=0.1)
        >>> seen.layers, seen.difference[0].item()
        (('0', '2'), 0.0)
    """
    if (later is None) == (lr is None):
        got = "neither" if later is None else "both"
        raise LosslabError(f"{got} of later= and lr= given: pass the weights after the step, or its rate")
    instrument, at = aimed(network, loss, batch, None, private)
    function, execution = instrument.loss, _execution(network)
    losses, gradients = execution.gradients(function, at.sheltered())
    after = _stepped(at.weights, gradients, lr) if lr is not None else _weights(later, at.weights)
    groups = _groups(at.weights)
    chosen = _chosen(layers, groups)
    size = sum(w.numel() for w in at.weights.values())
    each = max(1, TOGETHER // max(size, 1))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(chosen), each):
        part = chosen[start : start + each]
        mixed = _mixed(at, after, groups, part)
        _, shifted = execution.gradients(function, mixed)
        for row, layer in enumerate(part):
            here = slice(row * at.members, (row + 1) * at.members)
            g, h = (
                torch.cat([t[n][rows].flatten(1) for n in groups[layer]], 1)
                for t, rows in ((gradients, slice(None)), (shifted, here))
            )
            found.append(_compared(g, h))
    difference, cosine, norm = (torch.stack(column) for column in zip(*found, strict=True))
    return GradientShift(tuple(chosen), difference, cosine, norm, losses)


def _compared(g: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size, other = g.norm(dim=1), h.norm(dim=1)
    return (g - h).norm(dim=1), (g * h).sum(1) / (size * other), size


def _execution(network: nn.Module | Population) -> Execution:
    if isinstance(network, Population) and network.execution is not None:
        return network.execution
    module = network.template if isinstance(network, Population) else network
    return Execution(LoopBackend(Template(module), True, True), 1)


def _stepped(weights: Stack, gradients: Weights, lr: float | Sequence[float] | Tensor) -> Stack:
    rate = torch.as_tensor(lr, dtype=torch.float64)
    moved = {}
    for name, w in weights.items():
        here = rate.to(w)
        moved[name] = w - (here if here.dim() == 0 else here.view(-1, *[1] * (w.dim() - 1))) * gradients[name]
    return moved


def _weights(later: Points | nn.Module | None, like: Stack) -> Stack:
    points = Points.from_modules([later]) if isinstance(later, nn.Module) else later
    assert points is not None
    got, wanted = ({n: tuple(t.shape) for n, t in s.items()} for s in (points.weights, like))
    if got != wanted:
        odd = min(set(got.items()) ^ set(wanted.items()))[0]
        raise LosslabError(
            f"later differs from the network at {odd!r}: pass weights of the same architecture and members"
        )
    return points.weights


def _groups(weights: Stack) -> dict[str, list[str]]:
    """Module -> its own weights, in the order of registration."""
    groups: dict[str, list[str]] = {}
    for name in weights:
        owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else ""
        groups.setdefault(owner or name.rpartition(".")[0], []).append(name)
    return groups


def _chosen(layers: Sequence[str] | None, groups: dict[str, list[str]]) -> list[str]:
    if layers is None:
        return list(groups)
    for layer in layers:
        if layer not in groups:
            raise unknown("layer with weights", layer, groups)
    return [name for name in groups if name in set(layers)]


def _mixed(at: Stand, after: Stack, groups: dict[str, list[str]], layers: Sequence[str]) -> Stand:
    """For each layer all members, with the weights of the layers before it stepped."""
    order = {name: k for k, group in enumerate(groups.values()) for name in group}
    places = [list(groups).index(layer) for layer in layers]
    weights = {
        name: torch.cat([after[name] if order[name] < place else w for place in places])
        for name, w in at.weights.items()
    }
    repeated = lambda t: torch.cat([t] * len(places))
    return dataclasses.replace(
        at,
        weights=weights,
        buffers={n: repeated(b) for n, b in at.buffers.items()},
        batch=map_nest(repeated, at.batch) if at.private else at.batch,
        keys=repeated(at.keys),
    )
