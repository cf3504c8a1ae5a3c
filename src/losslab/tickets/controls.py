"""Controls: networks that share a ticket's size and not its luck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from losslab.engine import Points, randomness
from losslab.engine.points import Stack
from losslab.errors import LosslabError, unknown
from losslab.tasks import Task, mlp
from losslab.tasks.models import ACTIVATIONS
from losslab.tickets.prunable import Layers

Control = Callable[["Ticket"], tuple[Points, Stack]]


@dataclass(frozen=True)
class Ticket:
    """A ticket before it trains, what a control is made from.

    Attributes:
        task: The task.
        layers: What may be pruned.
        start: The weights it starts from, N members.
        masks: What is alive.
        seeds: One a member.
        level: Its level.
    """

    task: Task
    layers: Layers
    start: Points
    masks: Stack
    seeds: Sequence[int]
    level: int


def reinitialised(ticket: Ticket) -> tuple[Points, Stack]:
    """The same mask on weights drawn anew (Frankle & Carbin 2019, figure 4)."""
    return _fresh(ticket), ticket.masks


def random_mask(ticket: Ticket) -> tuple[Points, Stack]:
    """The same starting weights, another mask: as many of each layer, anywhere."""
    return ticket.start, _each(ticket, "random mask", lambda mask, g: _shuffled(mask, g))


def shuffled(ticket: Ticket) -> tuple[Points, Stack]:
    """The same mask, the surviving starting values exchanged among themselves within each layer.

    Zhou et al. 2019 ("reshuffle"): what it keeps is each layer's distribution of values.
    """
    weights = dict(ticket.start.weights)
    for k, name in enumerate(ticket.layers.sizes):
        rows = weights[name].clone()
        for i, seed in enumerate(ticket.seeds):
            alive = ticket.masks[name][i]
            values = rows[i][alive]
            g = randomness.generator(seed, "shuffled", ticket.level, k)
            rows[i][alive] = values[torch.randperm(len(values), generator=g)]
        weights[name] = rows
    return Points(weights, ticket.start.buffers), ticket.masks


def same_signs(ticket: Ticket) -> tuple[Points, Stack]:
    """The same mask and signs, sizes drawn anew (Zhou et al. 2019)."""
    fresh = _fresh(ticket)
    signed = {n: fresh[n].abs() * ticket.start[n].sign() for n in ticket.layers.sizes}
    return Points(fresh.weights | signed, fresh.buffers), ticket.masks


CONTROLS: dict[str, Control] = {
    "reinit": reinitialised,
    "random": random_mask,
    "shuffled": shuffled,
    "signs": same_signs,
}
"""The controls that share the ticket's network; beside them there is ``"dense"``, a smaller network."""


def check_controls(names: Sequence[str]) -> None:
    """Refuses unknown controls."""
    for name in names:
        if name not in CONTROLS and name != "dense":
            raise unknown("control", name, [*CONTROLS, "dense"])


def smaller(task: Task, layers: Layers, weights: int) -> Task:
    """The task with a dense network of at most so many weights (not counting biases), widths in proportion.

    Raises:
        LosslabError: The model is not a chain of linear layers as `losslab.tasks.mlp` builds it.
    """
    from torch import nn

    module = task.model()
    chain = list(module) if isinstance(module, nn.Sequential) else []
    linear = [m for m in chain if isinstance(m, nn.Linear)]
    kinds = {type(m) for m in chain} - {nn.Linear}
    known = [n for n, make in ACTIVATIONS.items() if {type(make())} == kinds]
    if len(linear) != len(layers.sizes) or len(linear) < 2 or len(known) != 1:
        raise LosslabError(
            "the dense control shrinks networks of losslab.tasks.mlp: leave it out, or take such a model"
        )
    widths = [linear[0].in_features, *(m.out_features for m in linear)]

    def shrunk(share: float) -> list[int]:
        return [widths[0], *(max(1, int(w * share)) for w in widths[1:-1]), widths[-1]]

    def size(w: list[int]) -> int:
        return sum(a * b for a, b in pairwise(w))

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(shrunk(middle)) <= weights else (low, middle)
    best = shrunk(1.0 if size(widths) <= weights else low)
    return task.replace(model=mlp(*best, activation=known[0]), name=f"{task.name} dense")


def _fresh(ticket: Ticket) -> Points:
    """Networks drawn from the task's own factory, by a seed of their own."""
    modules = []
    for seed in ticket.seeds:
        with randomness.seeded(seed, "reinitialised", ticket.level):
            modules.append(ticket.task.model())
    dtype = next(iter(ticket.start.weights.values())).dtype
    return Points.from_modules(modules).to(dtype=dtype)


def _shuffled(mask: Tensor, g: torch.Generator) -> Tensor:
    flat = mask.flatten()
    return flat[torch.randperm(flat.numel(), generator=g)].view_as(mask)


def _each(ticket: Ticket, purpose: str, change: Callable[[Tensor, torch.Generator], Tensor]) -> Stack:
    found: Stack = {}
    for k, (name, mask) in enumerate(ticket.masks.items()):
        rows = [
            change(mask[i], randomness.generator(seed, purpose, ticket.level, k))
            for i, seed in enumerate(ticket.seeds)
        ]
        found[name] = torch.stack(rows)
    return found
