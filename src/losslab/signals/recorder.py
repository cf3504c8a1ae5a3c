"""Signals through training: a few numbers a layer, taken while a population trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losslab.engine import Population
from losslab.engine.points import Stack
from losslab.errors import LosslabError
from losslab.signals.describing import Part, Place, finished, main_weights, measured, update_parts
from losslab.signals.flows import Instrument, examples_of, keys_of, placed
from losslab.signals.glancing import Glanced, Glancer, held_by
from losslab.signals.statistics import PERCENTILES, Statistics, as_percentiles, update_ratio
from losslab.tasks import Batch, Data

if TYPE_CHECKING:
    import pandas as pd

HELD = 2**22
"""Bytes that looks may hold before their statistics are finished, all together."""

PROBE = 32
"""Examples looked at by default: enough for moments over all units, and cheap."""


class Recorder:
    """Given as ``watch`` to `losslab.train`: keeps the statistics of every layer as training goes on.

    Pass ``record=recorder.when`` with it: the recorder then also sees the weights just before a look, and
    ``update_ratio`` is that of one update. With another ``record`` a look follows the first record that is
    at least ``every`` steps after the last look, and ``update_ratio`` spans the steps between two records.

    Looks are at the population after a step, on the same examples each time, with the random draws (dropout)
    of its next step; nothing of the population moves. Members that have diverged are NaN.

    Args:
        probe: The examples: a number of training examples, or the batch itself.
        every: Steps between two looks.
        layers: Names of layers, as for `losslab.signals.flow`; all by default.
        training: Whether the network is looked at in training mode.
        gradients: Whether to look at gradients too, which is most of the cost.
        percentiles: Which to keep.
        sample: Values of a layer that percentiles are taken of, a member; None for all.

    Example:
        >>> from losslab import train
        >>> from losslab.tasks import mlp, supervised
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> task = supervised(mlp(3, 8, 2), train=(x, (x[:, 0] > 0).long()))
        >>> recorder = Recorder(every=5)
        >>> _ = train(task, "adam", seeds=2, steps=11, watch=recorder, record=recorder.when)
        >>> recorder.steps, sorted(recorder.table.layer.unique())
        ([1, 6, 11], ['0', '1', '2'])
    """

    def __init__(
        self,
        probe: int | Batch | Data = PROBE,
        every: int = 20,
        layers: Sequence[str] | None = None,
        training: bool = True,
        gradients: bool = True,
        percentiles: Sequence[float] = PERCENTILES,
        sample: int | None = 256,
    ) -> None:
        if every < 1:
            raise LosslabError(f"every is {every}: pass at least 1 step")
        if sample is not None and sample < 1:
            raise LosslabError(f"sample is {sample}: pass at least 1 value, or None for all")
        self.probe, self.every, self.layers = probe, every, layers
        self.training, self.gradients = training, gradients
        self.percentiles, self.sample = as_percentiles(percentiles), sample
        self.steps: list[int] = []
        self.done: list[dict[Place, Statistics]] = []
        self.waiting: list[list[Part] | Glanced] = []
        self.losses: list[Tensor] = []
        self.instrument: Instrument | None = None
        self.glancer: Glancer | None = None
        self.batch: Batch = None
        self.main: dict[str, str] = {}
        self.held = 0
        self.keys = torch.empty(0, dtype=torch.int64)
        self.before: tuple[int, Stack] | None = None
        self.aim: tuple[Any, ...] = ()

    def when(self, step: int) -> bool:
        """For ``record=``: the steps of the looks, and those just before."""
        return step % self.every in (0, self.every - 1)

    def __call__(self, population: Population) -> None:
        """One look, if it is time for one."""
        step = population.step
        waited = step - self.steps[-1] if self.steps else self.every
        looks, remembers = waited >= self.every, waited >= self.every - 1 or self.every == 1
        if (looks or remembers) and self.aim != _aim(population):
            self._begin(population)
        if looks:
            self._look(population)
        if remembers:
            self._remember(population)

    def _remember(self, population: Population) -> None:
        weights = {name: population.points.weights[name] for name in self.main.values()}
        held = {} if self.before is None else self.before[1]
        if {n: w.shape for n, w in held.items()} == {n: w.shape for n, w in weights.items()}:
            for name, weight in weights.items():  # where the earlier ones were
                held[name].copy_(weight)
        else:
            held = {name: weight.clone() for name, weight in weights.items()}
        self.before = population.step, held

    def _look(self, population: Population) -> None:
        span, earlier = 0, {}
        if self.before is not None:
            span, earlier = population.step - self.before[0], self.before[1]
        losses, look = self._seen(population, earlier, span)
        self.steps.append(population.step)
        self.losses.append(losses)
        self.waiting.append(look)
        if self.held == 0:  # the same at every look
            self.held = held_by(look)
        if self.held * len(self.waiting) > HELD:
            self._finish()

    def _begin(self, population: Population) -> None:
        """Takes aim at a population: at the first look, and where another one is given."""
        self._finish()
        self.aim, self.before, self.main = _aim(population), None, {}
        self.instrument = self.glancer = None
        given = examples_of(population.task, self.probe) if isinstance(self.probe, int) else self.probe
        self.batch = placed(given.all() if isinstance(given, Data) else given, population)
        self.keys = keys_of(population)
        if not (self.training and self.gradients):
            return
        with _trying():
            at = (self.layers, self.batch, self.percentiles, self.sample)
            self.glancer = Glancer.of(population, *at)
        if self.glancer is not None:
            self.main = dict(main_weights(self.glancer.layers, population.points.weights))

    def _seen(self, population: Population, earlier: Stack, span: int) -> tuple[Tensor, list[Part] | Glanced]:
        """Losses and a look: at a chain where the networks are one, else by the instrument for any."""
        if self.glancer is not None:
            with _trying():
                return self.glancer(population.points, earlier, span)
            self._finish()
            self.glancer = None
        if self.instrument is None:
            self.instrument = Instrument.of(population, self.layers)
        keys = keys_of(population) if self.instrument.drawing else self.keys
        seen = self.instrument(population.points, self.batch, keys, False, self.training, self.gradients)
        self.main = dict(main_weights(seen.layers, seen.points.weights))
        parts = measured(seen, self.percentiles, self.sample, backward_percentiles=False)
        if earlier:
            ratios = update_ratio(earlier, population.points.weights, span, ours=True)
            parts += update_parts(seen.layers, ratios)
        return seen.losses, parts

    def _finish(self) -> None:
        glances = [look for look in self.waiting if isinstance(look, Glanced)]
        others = [look for look in self.waiting if not isinstance(look, Glanced)]
        told = iter(self.glancer.finished(glances) if self.glancer is not None and glances else ())
        made = iter(finished(others))
        self.done += [next(told if isinstance(look, Glanced) else made) for look in self.waiting]
        self.waiting.clear()

    @property
    def updates(self) -> Stack:
        """The last look's update-to-weight ratios, weight -> ``[N]``."""
        last = self.rows[-1] if self.steps else {}
        told = {w: last.get((layer, "weight"), {}) for layer, w in self.main.items()}
        ratios = {w: row["update_ratio"] for w, row in told.items() if "update_ratio" in row}
        return {w: ratio for w, ratio in ratios.items() if not bool(ratio.isnan().all())}

    @property
    def rows(self) -> list[dict[Place, Statistics]]:
        """Each look's statistics, as `losslab.signals.describe` gives them, and ``update_ratio``."""
        self._finish()
        return self.done

    def statistic(self, layer: str, name: str, direction: str = "forward") -> Tensor:
        """One statistic through training, ``[looks, N]``; NaN at looks that did not measure it.

        Raises:
            LosslabError: No look so far, or no such layer, direction or statistic.
        """
        place = (layer, direction)
        known = [row[place][name] for row in self.rows if name in row.get(place, {})]
        if not known:
            there = sorted(
                {f"{a} {b} {n}" for row in self.rows for (a, b), told in row.items() for n in told}
            )
            raise LosslabError(
                f"no {name!r} of layer {layer!r}, {direction}, was recorded: there is "
                f"{', '.join(there) or 'nothing, no step was recorded'}"
            )
        blank = torch.full_like(known[0], torch.nan)
        looks = [row.get(place, {}).get(name, blank) for row in self.rows]
        return torch.stack(looks).to("cpu", torch.float64)

    @property
    def table(self) -> pd.DataFrame:
        """One row a (step, layer, direction, member); columns as `losslab.signals.describe` names them."""
        import pandas as pd

        frames = []
        for step, row in zip(self.steps, self.rows, strict=True):
            for (layer, direction), told in row.items():
                columns = {n: values.to("cpu", torch.float64).numpy() for n, values in told.items()}
                members = range(len(next(iter(columns.values()))))
                place = {"step": step, "layer": layer, "direction": direction, "member": members}
                frames.append(pd.DataFrame({**place, **columns}))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _aim(population: Population) -> tuple[Any, ...]:
    """What a recorder's instruments are made for."""
    shapes = tuple((name, tensor.shape) for name, tensor in population.points.items())
    return population.template, shapes, population.plan.dtype, population.plan.device


@contextmanager
def _trying() -> Iterator[None]:
    """What a chain does not take is left to the instrument for any network, which tells what is wrong."""
    try:
        yield
    except LosslabError:
        raise
    except Exception:
        pass
