"""Statistics of a chain of layers while it runs: each value is looked at where it is made, and then let go.

What a look keeps goes through memory, and that is most of its cost. A population that was trained as a chain
of torch's own layers needs no hooks to be seen, and what is asked of its values fits in a few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.engine import Points, Population
from losslab.engine.chain import Chain
from losslab.engine.glance import Glances
from losslab.engine.points import Stack
from losslab.engine.template import Template
from losslab.signals.capture import Layer, Watch
from losslab.signals.describing import (
    Part,
    Place,
    ahead,
    behind,
    finished,
    glanced,
    glanced_weight,
    main_weights,
    update_parts,
    weight_parts,
)
from losslab.signals.statistics import Statistics, chosen, flat_part, ranked, update_ratio
from losslab.tasks import Batch

RELU = 2
"""The part of a block that is a ReLU's."""


@dataclass(frozen=True)
class Glanced:
    """A look by machine code whose statistics are still to be made.

    Attributes:
        told: Of each block the moments of its parts, their percentiles ``[N, 3, P]``, the sizes of weights.
        steps: Steps since the earlier weights; 0 where there were none.
    """

    told: tuple[tuple[Tensor, ...], ...]
    steps: int


@dataclass(frozen=True)
class Glancer:
    """Looks again and again at a population of chains, in training mode.

    Args:
        chain: What it was trained as.
        machine: Looks by machine code, where there is some.
        layers: Those reported.
        counts: Layer -> numbers in its main weight.
        x: ``[N, B, ...]``, the examples.
        y: ``[N, B]``, or as the outputs.
        which: Percentiles.
        sample: Values of a layer that they are taken of, a member.
    """

    chain: Chain
    machine: Glances | None
    layers: Mapping[str, Layer]
    counts: Mapping[str, int]
    x: Tensor
    y: Tensor
    which: tuple[float, ...]
    sample: int | None

    @classmethod
    def of(
        cls,
        population: Population,
        layers: Sequence[str] | None,
        batch: Batch,
        which: tuple[float, ...],
        sample: int | None,
    ) -> Glancer | None:
        """For a population; None if its networks were not trained as a chain, or cannot be seen as one.

        Raises:
            LosslabError: A layer that the network does not have.
            NotInTable: A batch of a kind that the chain has no kernels for.
        """
        if population.execution is None or population.execution.backend.name != "tape":
            return None
        weights, template = population.points.weights, Template(population.template)
        chain = Chain.of(template, population.task.loss, weights)
        if chain is None:
            return None
        reported = Watch(template.module, layers).in_a_row(chain.called)
        first = next(k for k, (_, names) in enumerate(chain.steps) if names)
        # No gradient reaches what is before weights; a network that is one layer has no name for it.
        if not reported or "" in chain.called or {*chain.called[:first]} & {*reported}:
            return None
        x, y = chain.stacked(weights, batch, private=False)
        counts = {name: weights[weight][0].numel() for name, weight in main_weights(reported, weights)}
        machine = None
        if chain.compiled is not None:
            at = (chain.compiled, weights, population.points.buffers, x, y)
            machine = Glances(*at, lambda count: chosen(count, sample))
        return cls(chain, machine, reported, counts, x, y, which, sample)

    def __call__(self, points: Points, earlier: Stack, steps: int) -> tuple[Tensor, Glanced | list[Part]]:
        """Losses ``[N]`` and a look.

        Args:
            points: Where the members stand.
            earlier: Their main weights some steps earlier, which may be overwritten; none if there are none.
            steps: How many.

        Raises:
            NotInTable: A batch of a kind that the chain has no kernels for.
        """
        told = None if self.machine is None else self.machine(points.weights, earlier)
        if told is not None:
            ranks = _ranked_together(told.samples, self.which)
            return told.losses, Glanced((told.values, ranks, told.sizes), steps if earlier else 0)
        buffers = {name: buffer.clone() for name, buffer in points.buffers.items()}  # they stay as they are
        return self._by_operations(points.weights, buffers, earlier, steps)

    def _by_operations(
        self, weights: Stack, buffers: Stack, earlier: Stack, steps: int
    ) -> tuple[Tensor, list[Part]]:
        parts: list[Part] = []
        flat: dict[str, Tensor | None] = {}

        def visit(step: int, value: Tensor, back: bool) -> None:
            name = self.chain.called[step]
            layer = self.layers.get(name)
            if layer is not None and back:
                parts.append(behind(name, value))
            elif layer is not None:
                parts.extend(ahead(name, layer, value, flat.pop(name, None), self.which, self.sample))
            following = self.chain.called[step + 1] if step + 1 < len(self.chain.called) else ""
            if not back and following in self.layers:  # an activation may overwrite what it is given
                flat[following] = flat_part(self.layers[following], value)

        with torch.no_grad():
            losses, gradients = self.chain.stepwise(weights, buffers, self.x, self.y, visit)
            parts += weight_parts(self.layers, weights, gradients)
            if earlier:
                parts += update_parts(self.layers, update_ratio(earlier, weights, steps, ours=True))
        return losses, parts

    def finished(self, looks: Sequence[Glanced]) -> list[dict[Place, Statistics]]:
        """The statistics of some looks: what is alike in all of them is done for all at once."""
        columns = zip(*(look.told for look in looks), strict=True)
        values, ranks, sizes = ([torch.cat(row) for row in zip(*column, strict=True)] for column in columns)
        members = len(self.x)
        steps = torch.tensor([look.steps for look in looks]).repeat_interleave(members)
        (rows,) = finished([self._parts(values, ranks, sizes, steps)])
        found: list[dict[Place, Statistics]] = [{} for _ in looks]
        for place, told in rows.items():
            each = {name: column.view(len(looks), members).unbind(0) for name, column in told.items()}
            for k, row in enumerate(found):
                row[place] = {name: column[k] for name, column in each.items()}
        return found

    def _parts(
        self, values: list[Tensor], ranks: list[Tensor], sizes: list[Tensor], steps: Tensor
    ) -> list[Part]:
        assert self.chain.compiled is not None
        blocks = self.chain.compiled.blocks
        where = {name: (k, p) for k, block in enumerate(blocks) for p, name in enumerate(block.layers)}
        parts: list[Part] = []
        for name in self.layers:
            k, p = where[name]
            parts += glanced(name, values[k][:, p], ranks[k][:, p], self.which, p == RELU)
        for name, count in self.counts.items():
            k, p = where[name]
            parts += glanced_weight(name, sizes[k][:, p], count, steps)
        return parts


def _ranked_together(samples: Sequence[Tensor], which: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Percentiles of each; where all have the same shape, in one go."""
    if len({sample.shape for sample in samples}) == 1:
        return ranked(torch.stack([*samples]), which).unbind(0)
    return tuple(ranked(sample, which) for sample in samples)


def held_by(look: Glanced | Sequence[Part]) -> int:
    """Bytes that wait for their statistics."""
    if isinstance(look, Glanced):
        return sum(t.nbytes for column in look.told for t in column)
    return sum(t.untyped_storage().nbytes() for part in look for t in part.columns)
