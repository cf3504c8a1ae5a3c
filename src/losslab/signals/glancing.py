"""Statistics of a population's layers from glances by machine code, where its networks have some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.engine import Points, Population
from losslab.engine.chain import Chain
from losslab.engine.compiled import Compiled
from losslab.engine.glance import Glance, glance
from losslab.engine.points import Stack
from losslab.engine.template import Template
from losslab.signals.capture import Layer
from losslab.signals.describing import (
    Part,
    Place,
    finished,
    glanced,
    glanced_weight,
    main_weights,
)
from losslab.signals.flows import Flow
from losslab.signals.statistics import Statistics, chosen
from losslab.tasks import Batch

GATE = 2
"""The part of a block that is a ReLU's."""


@dataclass(frozen=True)
class Glanced:
    """A look whose statistics are still to be made.

    Attributes:
        told: What machine code told.
        steps: Steps since the earlier weights; 0 where there were none.
    """

    told: Glance
    steps: int


@dataclass(frozen=True)
class Glancer:
    """Looks again and again at a population that machine code trains.

    Args:
        compiled: The networks.
        layers: Those reported.
        where: Layer -> block, and part of the block.
        weights: Layer -> how many numbers its weight has.
        x: ``[N, B, ...]``, the examples.
        y: ``[N, B]``.
        places: Of each block, which values of a part are sampled.
        which: Percentiles.
    """

    compiled: Compiled
    layers: Mapping[str, Layer]
    where: Mapping[str, tuple[int, int]]
    weights: Mapping[str, int]
    x: Tensor
    y: Tensor
    places: Sequence[Tensor]
    which: tuple[float, ...]

    @classmethod
    def of(
        cls, population: Population, seen: Flow, batch: Batch, which: tuple[float, ...], sample: int | None
    ) -> Glancer | None:
        """For a population, after a first look in training mode; None if its networks are no such chain."""
        execution, members, stack = population.execution, len(population), seen.points.weights
        if execution is None or execution.backend.name != "tape" or not seen.gradients:
            return None
        chain = Chain.of(Template(population.template), population.task.loss, stack)
        if chain is None or chain.compiled is None or not _labelled(batch):
            return None
        blocks, (x, y) = chain.compiled.blocks, batch
        places = [(name, (k, p)) for k, block in enumerate(blocks) for p, name in enumerate(block.layers)]
        where = {name: place for name, place in places if name}
        once = len(where) == sum(bool(name) for name, _ in places)
        if not once or not {*seen.outputs} <= {*where}:
            return None
        sizes = [stack[block.weight].shape[1] for block in blocks]
        return cls(
            chain.compiled,
            seen.layers,
            where,
            {name: stack[w][0].numel() for name, w in main_weights(seen.layers, stack)},
            x.expand(members, *x.shape),
            y.expand(members, *y.shape),
            [chosen(len(x) * o, sample) for o in sizes],
            which,
        )

    def __call__(self, points: Points, earlier: Stack, steps: int) -> Glanced | None:
        """One look; None where the tensors are not for machine code, then or ever."""
        told = glance(self.compiled, points.weights, points.buffers, self.x, self.y, self.places, earlier)
        return None if told is None else Glanced(told, steps if earlier else 0)

    def finished(self, looks: Sequence[Glanced]) -> list[dict[Place, Statistics]]:
        """The statistics of some looks: what is alike in all of them is done for all at once."""
        columns = zip(
            *((look.told.values, look.told.samples, look.told.sizes) for look in looks), strict=True
        )
        values, samples, sizes = ([torch.cat(row) for row in zip(*column, strict=True)] for column in columns)
        members = len(self.x)
        steps = torch.tensor([look.steps for look in looks]).repeat_interleave(members)
        (rows,) = finished([self._parts(values, samples, sizes, steps)])
        found: list[dict[Place, Statistics]] = [{} for _ in looks]
        for place, told in rows.items():
            for row in found:
                row[place] = {}
            for name, column in told.items():
                for row, mine in zip(found, column.split(members), strict=True):
                    row[place][name] = mine
        return found

    def _parts(
        self, values: list[Tensor], samples: list[Tensor], sizes: list[Tensor], steps: Tensor
    ) -> list[Part]:
        parts: list[Part] = []
        for name in self.layers:
            k, p = self.where[name]
            parts += glanced(name, values[k][:, p], samples[k][:, p], self.which, p == GATE)
        for name, count in self.weights.items():
            k, p = self.where[name]
            parts += glanced_weight(name, sizes[k][:, p], count, steps)
        return parts


def _labelled(batch: Batch) -> bool:
    """Whether it is of examples and their classes."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    return pair and all(isinstance(t, Tensor) for t in batch) and batch[1].dtype == torch.int64
