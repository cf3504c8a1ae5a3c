"""Pairs of ResNet-20s on CIFAR-10 and the paths between them: the papers' settings, or a reduction of them.

The networks, and the elastic bands between them, are those of Draxler et al. (2018): SGD with momentum 0.9
and no decay, at the rate 0.1, divided by ten at half and at three quarters of the steps. The curves are
trained as Garipov et al. (2018) do: one t a mini-batch, a rate that stays up to half of the steps and then
falls in a line to a hundredth, statistics of batch norm estimated anew at each point that is measured. The
reduction divides the network, the images, the examples and the steps, and leaves the rates as they are.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from losslab.engine import Points, Population
from losslab.files import write_atomically
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_6.pairs import (
    Pair,
    aligned,
    couples,
    courses,
    ensembles,
    labelled,
    plane_of,
    summaries,
)
from losslab.lecture.training import trained
from losslab.paths import (
    DRAXLER,
    Cycle,
    Landscape,
    Slopes,
    auto_bands,
    joined,
    straight,
    train_curves,
    walk_curves,
)
from losslab.paths import (
    Path as Way,
)
from losslab.rules import Momentum
from losslab.rules.schedules import constant, step_decay
from losslab.tasks import Data, Task, cifar10, resnet20, supervised

if TYPE_CHECKING:
    import pandas as pd

CURVES = ("polychain", "bezier")
VOTING = ("straight", *CURVES, "autoneb")
"""Ways along which ensembles are formed."""

KINDS = ("courses", "paths")
MOMENTUM = 0.9
RATE, CURVE_RATE = 0.1, 0.03


@dataclass(frozen=True)
class Setting:
    """What is trained, for how long, and at how many points it is measured.

    Attributes:
        name: For tables and figures.
        note: What is smaller than in the papers.
        width: Channels of the network's first stage.
        pooled: Pixels a side that are averaged into one.
        examples: Training examples, if not all.
        tests: Test examples, if not all.
        batch: Examples a step of the networks and curves.
        steps: Of a network.
        curve_steps: Of a curve.
        cycles: Of an elastic band.
        band_batch: Examples a step of the bands.
        band_decay: Weight decay of the bands.
        between: Points measured in each gap between two images.
        stations: Points at which a curve or line is measured.
        side: Points a side of the plane.
        pairs: Pairs of networks, none in two of them.
        device: Where to compute.
    """

    name: str = "ResNet-20 on CIFAR-10"
    note: str = "45,000 training images, without random crops and flips"
    width: int = 16
    pooled: int = 1
    examples: int | None = None
    tests: int | None = None
    batch: int = 128
    steps: int = 64_000
    curve_steps: int = 70_400
    cycles: tuple[Cycle, ...] = DRAXLER
    band_batch: int = 512
    band_decay: float = 1e-4
    between: int = 9
    stations: int = 61
    side: int = 51
    pairs: int = 5
    device: str = "cuda"


REDUCED = Setting(
    name="half-width ResNet-20 on CIFAR-10",
    note="reduced, since there is no GPU: 8 to 32 channels, 1000 training and 500 test images of 16×16 "
    "pixels, batches of 64, 400 steps a network, 500 a curve, 120 in 3 cycles a band, 13 points on a curve",
    width=8,
    pooled=2,
    examples=1000,
    tests=500,
    batch=64,
    steps=400,
    curve_steps=500,
    cycles=(Cycle(40, 0.1), Cycle(40, 0.01), Cycle(40, 0.001)),
    band_batch=64,
    between=2,
    stations=13,
    side=21,
    device="cpu",
)


def bench(lab: Lab) -> Bench | None:
    """The networks of the paper profile, where the folder of the data is given; else None."""
    if lab.profile != "paper" or lab.data is None:
        return None
    where = Setting() if torch.cuda.is_available() else REDUCED
    return _bench(where, Path(lab.data), lab.folder, lab.replicates(where.pairs), lab.progress)


@functools.lru_cache(maxsize=1)
def _bench(
    where: Setting, data: Path, folder: Path | None, pairs: int, progress: Callable[[str], None]
) -> Bench:
    return Bench(task_of(where, data), where, pairs, None if folder is None else folder / "cifar", progress)


def task_of(where: Setting, data: Path) -> Task:
    """CIFAR-10 for a ResNet-20, as small as the setting wants it."""
    splits = cifar10(data)

    def some(part: Data, count: int | None) -> Data:
        images, labels = (part if count is None else part.head(count)).all()
        return Data((F.avg_pool2d(images, where.pooled), labels))

    network = resnet20(width=where.width)
    train, test = some(splits.train, where.examples), some(splits.test, where.tests)
    return supervised(network, train, test, name=where.name)


@dataclass(frozen=True)
class falling(constant):
    """Garipov et al.'s schedule: the value up to half of the steps, in a line to 1 % at 90 %, then that.

    Example:
        >>> [round(falling(1.0, steps=100)(step), 3) for step in (0, 50, 70, 90, 99)]
        [1.0, 1.0, 0.505, 0.01, 0.01]
    """

    steps: int = 1

    def factor(self, step: int) -> float:
        """From 1 to 0.01."""
        return 1 - 0.99 * min(max(step / self.steps - 0.5, 0.0) / 0.4, 1.0)


class Bench:
    """The networks and what lies between them; each stage is done once and kept on disk.

    Args:
        task: What the networks are trained on.
        where: How.
        pairs: Pairs of networks.
        folder: Where stages are kept; nowhere if None.
        progress: Called with a short text before each stage.
    """

    def __init__(
        self, task: Task, where: Setting, pairs: int, folder: Path | None, progress: Callable[[str], None]
    ) -> None:
        self.task, self.where, self.folder, self.progress = task, where, folder, progress
        self.pairs: list[Pair] = couples(pairs)
        self.known: dict[tuple[str, str], pd.DataFrame] = {}

    @functools.cached_property
    def run(self) -> Population:
        """The independent networks."""
        return self._trained("networks", list(range(2 * len(self.pairs))))

    def table(self, arm: str, kind: str) -> pd.DataFrame:
        """What a stage found: ``courses``, ``paths``, of some ``ensembles``, of the polychain a ``plane``."""
        import pandas as pd

        kinds = [*KINDS, *(["ensembles"] if arm in VOTING else []), *(["plane"] if arm == CURVES[0] else [])]
        if (arm, kind) not in self.known:
            files = {k: self._file(f"{arm}-{k}.parquet") for k in kinds}
            made = {k: pd.read_parquet(path) for k, path in files.items() if path and path.is_file()}
            if len(made) < len(kinds):
                self.progress(f"{self.where.name}: {arm}")
                made = self._measured(arm, self._ways(arm))
                for k, path in files.items():
                    buffer = io.BytesIO()
                    made[k].to_parquet(buffer)
                    if path is not None:
                        write_atomically(path, buffer.getvalue())
            self.known |= {(arm, k): table for k, table in made.items()}
        return self.known[arm, kind]

    def tables(self, kind: str, arms: Sequence[str]) -> pd.DataFrame:
        """One kind of table for several arms, with `pairs.labelled`'s columns and ``method``."""
        import pandas as pd

        where = self.where
        rows = pd.concat([self.table(arm, kind).assign(method=arm) for arm in arms], ignore_index=True)
        return labelled(rows, where.width, where.name, least=5, note=where.note)

    def _file(self, name: str) -> Path | None:
        """Where a stage keeps something; a killed run goes on from there."""
        return None if self.folder is None else self.folder / name

    # -- the stages --------------------------------------------------------------------------------------

    def _measured(self, arm: str, ways: list[Way]) -> dict[str, pd.DataFrame]:
        found = {"courses": courses(ways), "paths": summaries(ways)}
        if arm in VOTING:
            found["ensembles"] = ensembles(self._landscape(("test",)), ways)
        if arm == CURVES[0]:
            found["plane"] = plane_of(self._landscape(("train",)), ways[0], self.where.side)
        return found

    def _ways(self, arm: str) -> list[Way]:
        where, points = self.where, self.run.points
        if arm in CURVES:
            return self._curves(arm)
        if arm == "autoneb":
            slopes = Slopes(self.task, where.band_batch, weight_decay=where.band_decay, execution="loop")
            return auto_bands(
                slopes, self._landscape(), points, self.pairs, cycles=where.cycles, between=where.between,
                out=self._file(f"{arm}.safetensors"),
            )  # fmt: skip
        if arm == "same start":
            points = self._siblings()
        elif arm == "aligned":
            points = aligned(self.run, self.pairs)
        return straight(self._landscape(), points, self.pairs, where.stations)

    def _curves(self, kind: str) -> list[Way]:
        where = self.where
        slopes = Slopes(self.task, where.batch, execution="loop")
        rule = Momentum(lr=falling(CURVE_RATE, steps=where.curve_steps), beta=MOMENTUM)
        curves = train_curves(
            slopes, self.run.points, self.pairs, kind=kind, rule=rule, steps=where.curve_steps, samples=1,
            out=self._file(f"{kind}.safetensors"),
        )  # fmt: skip
        return walk_curves(self._landscape(), curves, where.stations)

    def _siblings(self) -> Points:
        """The first network of each pair, and another from its start that sees the data in another order."""
        firsts, seconds = ([pair[end] for pair in self.pairs] for end in (0, 1))
        start = self._trained("starts", firsts, steps=0).points
        later = self._trained("siblings", seconds, start=start).points
        own = self.run.points
        return joined(*(part for i, a in enumerate(firsts) for part in (own.select([a]), later.select([i]))))

    def _trained(
        self, name: str, seeds: list[int], steps: int | None = None, start: Points | None = None
    ) -> Population:
        where, steps = self.where, self.where.steps if steps is None else steps
        lr = step_decay(RATE, milestones=(where.steps // 2, where.steps * 3 // 4))
        out = self._file(name)
        # A loop: grouped convolutions are no faster than one network after another, on a GPU slower.
        return trained(
            self.task, Momentum(lr=lr, beta=MOMENTUM), seeds=seeds, steps=steps, batch_size=where.batch,
            start=start, device=where.device, execution="loop", out=out,
            resume=out is not None,
        )  # fmt: skip

    def _landscape(self, on: Sequence[str] | None = None) -> Landscape:
        return Landscape.of(self.run, on, execution="loop", chunk=500)
