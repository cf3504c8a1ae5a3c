"""C10: an epoch uses every batch once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.engine import Points, Population
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import bars, figure
from losslab.lecture.statistics import bootstrap_interval
from losslab.lecture.training import trained
from losslab.lecture.verdicts import identity, law
from losslab.rules import SGD
from losslab.tasks import Data, Task, linear_net

if TYPE_CHECKING:
    import pandas as pd

EPOCHS = 2


class Shape(NamedTuple):
    """A way of cutting a data set into batches."""

    examples: int
    batch_size: int
    drop_last: bool = False
    replacement: bool = False

    @property
    def sizes(self) -> list[int]:
        """The sizes of an epoch's batches: ceil(N/B) of them, or floor(N/B) where the rest is dropped."""
        whole, rest = divmod(self.examples, self.batch_size)
        return [self.batch_size] * whole + ([rest] if rest and not self.drop_last else [])


SHAPES = tuple(
    Shape(n, b, drop)
    for n, b in ((12, 4), (13, 4), (10, 3), (17, 5), (8, 8), (9, 1))
    for drop in (False, True)
)
CONTRAST = (Shape(500, 10), Shape(500, 10, replacement=True))
"""The two sampling schemes of the notes, at a size where they differ as much as they ever do."""


def ledger(shape: Shape, seeds: int) -> Tensor:
    """How much of each update came from each example, ``[updates, seeds, N]``, in the engine's own training.

    Example i has the input e_i and the loss w_i, so with rate 1 an update lowers w_i by 1/B for each use of
    example i in its batch of B, and leaves the other weights alone.
    """
    task = Task(
        linear_net(shape.examples, 1),
        loss=lambda model, batch: model(batch).mean(),
        train=Data(torch.eye(shape.examples)),
        name="ledger",
    )
    zero = torch.zeros(1, 1, shape.examples, dtype=torch.float64)
    path = [zero.expand(seeds, -1, -1)]

    def note(population: Population) -> None:
        path.append(population.points["0.weight"].clone())

    trained(
        task,
        SGD(lr=1.0),
        seeds=seeds,
        epochs=EPOCHS,
        batch_size=shape.batch_size,
        drop_last=shape.drop_last,
        replacement=shape.replacement,
        dtype="float64",
        record=1,
        watch=note,
        start=Points({"0.weight": zero}, {}),
    )
    weights = torch.stack(path).squeeze(2)
    return weights[:-1] - weights[1:]


def accounts(shape: Shape, seeds: int) -> pd.DataFrame:
    """How each epoch departs from one visit to each of m different batches.

    Returns:
        One row a (seed, epoch): ``updates`` and ``expected`` (m), ``repeated`` and ``unused`` (examples used
        more than once, or never), ``wrong_size`` (batches that have not the size they should).
    """
    import pandas as pd

    used = ledger(shape, seeds) > 0.5 / shape.batch_size
    updates, sizes = len(used) // EPOCHS, shape.sizes
    rows = []
    for seed in range(seeds):
        for epoch, visits in enumerate(used[:, seed].split(updates)):
            counts, found = visits.sum(0), visits.sum(1).tolist()
            rows.append(
                {
                    **shape._asdict(),
                    "seed": seed,
                    "epoch": epoch,
                    "updates": len(found),
                    "expected": len(sizes),
                    "repeated": int((counts > 1).sum()),
                    "unused": int((counts == 0).sum()),
                    "wrong_size": sum(a != b for a, b in zip(found, sizes, strict=False)),
                }
            )
    return pd.DataFrame(rows)


def uses(shape: Shape, seeds: int) -> pd.DataFrame:
    """One row a (seed, times): the share of examples used so many times in the first epoch."""
    import pandas as pd

    updates = len(shape.sizes)
    counts = (ledger(shape, seeds)[:updates] * shape.batch_size).sum(0).round().long()
    return pd.DataFrame(
        [
            {"replacement": shape.replacement, "examples": shape.examples, "seed": seed, "times": times}
            | {"share": float((counts[seed] == times).double().mean())}
            for seed in range(seeds)
            for times in range(int(counts.max()) + 1)
        ]
    )


def experiment_c10(lab: Lab) -> Tables:
    """Small data sets cut into even and uneven batches, and the two sampling schemes side by side."""
    import pandas as pd

    seeds = lab.pick(10, 50)
    return {
        "epochs": pd.concat([accounts(shape, seeds) for shape in SHAPES], ignore_index=True),
        "uses": pd.concat([uses(shape, seeds) for shape in CONTRAST], ignore_index=True),
    }


ONCE = "an epoch is ⌈N/B⌉ updates, each on other examples, all of them used"
DROPPED = "with the uneven last batch dropped: ⌊N/B⌋ updates, N mod B examples unused"


def judge_c10(tables: Tables) -> list[Finding]:
    """V1 without any tolerance; draws with replacement as the contrast."""
    table, shares = tables["epochs"], tables["uses"]
    rest = np.where(table.drop_last, table.examples % table.batch_size, 0)
    wrong = (
        (table.updates - table.expected).abs()
        + table.repeated
        + table.wrong_size
        + (table.unused - rest).abs()
    )
    unused = shares[shares.replacement & (shares.times == 0)]
    n = int(unused.examples.iloc[0])
    return [
        identity(ONCE, wrong[~table.drop_last], tolerance=0.0),
        identity(DROPPED, wrong[table.drop_last], tolerance=0.0),
        law(
            "as many draws with replacement leave (1 − 1/N)ᴺ of the examples out",
            float(unused.share.mean()),
            bootstrap_interval(unused.share, np.mean),
            theory=(1 - 1 / n) ** n,
            n=len(unused),
        ),
    ]


def figures_c10(tables: Tables) -> list[Drawing]:
    """How often an example is used in one epoch, for both schemes."""
    shares = tables["uses"].groupby(["replacement", "times"]).share.mean()
    drawn = figure("Uses of an example in one epoch", "times used", "share of the examples")
    times = [k for k in range(10) if max(shares.get((r, k), 0.0) for r in (False, True)) >= 0.001]
    for replacement, name in ((False, "batches of a permutation"), (True, "drawn with replacement")):
        heights = [shares.get((replacement, k), 0.0) for k in times]
        bars(drawn, [str(k) for k in times], heights, name=name)
    return [
        Drawing(
            drawn,
            "The notes describe both schemes under one name: picking samples at random leaves 37 % of them "
            "out of an epoch and uses others several times, batches cut from a permutation use each once.",
        )
    ]


C10 = Claim(
    id="C10",
    section="6.2.1",
    title="An epoch uses every batch once",
    statement="With m batches an epoch is m gradient updates, each on a different batch, until all batches "
    "have been used.",
    source="Notes §6.2.1",
    experiment=experiment_c10,
    judge=judge_c10,
    figures=figures_c10,
    combine=decided_by(ONCE, DROPPED),
    caveats=(
        "Seen in the weights themselves: on a loss that writes down which examples an update used, the "
        "engine's own training is checked epoch by epoch.",
        "This is not the random picking of §6.2. Within an epoch the later batches depend on the earlier "
        "ones, so their gradients are unbiased only before the epoch begins, and convergence differs.",
    ),
    errata=("E43",),
)
