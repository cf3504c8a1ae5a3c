"""C7: the average of a network and its permuted copy has a larger loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from losslab.engine import Points, Population, randomness
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, decided_by
from losslab.lecture.figures import figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.training import trained
from losslab.lecture.verdicts import count, paired
from losslab.paths import Landscape, Spec, combine, joined, permutation_spec
from losslab.rules import Adam
from losslab.tasks import Task, digits_task, mlp, mnist_task

if TYPE_CHECKING:
    import pandas as pd

HIGH = 0.1
"""Loss above that of the network, in nats, from which an average counts as worse."""

LIKELY = 0.95
ALL, TWO = "all units", "two units"
LINE = 21
"""Points of the drawn lines."""


class Sizes(NamedTuple):
    """How much work to do: networks, permutations of each kind by hidden width, and the training."""

    networks: int
    permutations: Mapping[int, int]
    steps: int
    batch: int


def exchanged(spec: Spec, seed: int) -> dict[str, torch.Tensor]:
    """The order in which two random units of one random layer have changed places."""
    draw = randomness.generator(seed, "exchange")
    groups = list(spec.groups)
    group = groups[int(torch.randint(len(groups), (), generator=draw))]
    first, second = torch.randperm(spec.groups[group], generator=draw)[:2].tolist()
    return spec.swap(group, first, second)


def permuted(spec: Spec, network: Points, kind: str, seeds: range) -> Points:
    """Copies of one network with their units in random orders, one a seed."""
    orders = [spec.random(seed) if kind == ALL else exchanged(spec, seed) for seed in seeds]
    return joined(*(spec.permute(network, order) for order in orders))


def barriers(run: Population, spec: Spec, number: int) -> pd.DataFrame:
    """``L((theta + pi theta) / 2) - L(theta)``: one row a (network, kind, permutation)."""
    import pandas as pd

    landscape = Landscape.of(run, ["train"], execution="stacked")
    tables = []
    for net in range(len(run)):
        own = run.points.select([net])
        level = float(landscape(own)["train_loss"])
        for kind in (ALL, TWO):
            copies = permuted(spec, own, kind, range(1000 * net, 1000 * net + number))
            shares = torch.eye(number, dtype=torch.float64) / 2
            shares = torch.cat([torch.full((number, 1), 0.5, dtype=torch.float64), shares], 1)
            middle = landscape(combine(joined(own, copies), shares))["train_loss"]
            tables.append(
                pd.DataFrame({"barrier": middle.numpy() - level, "loss": level}).assign(
                    network=net, kind=kind
                )
            )
    return pd.concat(tables, ignore_index=True)


def segments(run: Population, spec: Spec) -> pd.DataFrame:
    """The loss on the way from each network to one permuted copy of it of each kind."""
    import pandas as pd

    landscape = Landscape.of(run, ["train"], execution="stacked")
    t = torch.linspace(0, 1, LINE, dtype=torch.float64)
    shares = torch.stack([1 - t, t], 1)
    tables = []
    for net in range(len(run)):
        own = run.points.select([net])
        for kind in (ALL, TWO):
            copy = permuted(spec, own, kind, range(1000 * net, 1000 * net + 1))
            loss = landscape.along(joined(own, copy), shares)["train_loss"]
            table = pd.DataFrame({"t": t.numpy(), "loss": loss.numpy()})
            tables.append(table.assign(network=net, kind=kind))
    return pd.concat(tables, ignore_index=True)


def evidence(tasks: Mapping[int, Task], sizes: Sizes, lab: Lab) -> Tables:
    """Trained networks of each width, and averages of them with their permuted copies."""
    import pandas as pd

    averages, ways = [], []
    for width, task in tasks.items():
        lab.progress(f"averaging networks of width {width} with permuted copies")
        run = trained(task, Adam(lr=0.003), seeds=sizes.networks, steps=sizes.steps, batch_size=sizes.batch)
        spec = permutation_spec(run)
        averages.append(barriers(run, spec, sizes.permutations[width]).assign(width=width))
        ways.append(segments(run, spec).assign(width=width))
    return {
        "averages": pd.concat(averages, ignore_index=True),
        "segments": pd.concat(ways, ignore_index=True),
    }


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    if lab.profile == "paper":
        wide = mnist_task(mlp(784, 512, 512, 512, 10), lab.data)
        return evidence({512: wide}, Sizes(lab.replicates(5), {512: 20}, 11_000, 500), lab)
    permutations = lab.pick({16: 200, 64: 200, 256: 20}, dict.fromkeys((16, 64, 256), 200))
    tasks = {width: digits_task(mlp(64, width, width, 10)) for width in permutations}
    return evidence(tasks, Sizes(lab.replicates(10), permutations, lab.pick(200, 1000), 100), lab)


def title(width: int) -> str:
    """The deciding finding about one width."""
    return f"width {width}, all units permuted: averages more than {HIGH:g} nat worse"


def judge(tables: Tables) -> list[Finding]:
    """V2 on the permutations of all units, V3 on the networks' medians; exchanges of two units beside it."""
    rows = tables["averages"]
    findings, context = [], []
    for width in sorted(rows.width.unique().tolist()):
        some = rows[rows.width == width]
        for kind in (ALL, TWO):
            found = some[some.kind == kind]
            middle = found.groupby("network").barrier.median()
            high = int((found.barrier > HIGH).sum())
            note = f"median {number(found.barrier.median())} nat above a loss of {number(found.loss.mean())}"
            if kind == ALL:
                findings.append(count(title(width), high, len(found), at_least=LIKELY, note=note))
                least = 5 if width == 512 else 10
                name = f"width {width}, all units permuted: median rise of a network's averages"
                context.append(paired(name, middle, delta=HIGH, least=least))
            else:
                name = f"width {width}, two units exchanged: averages worse at all"
                worse = int((found.barrier > 0).sum())
                told = f"{high} of them by more than {HIGH:g} nat; {note}"
                context.append(count(name, worse, len(found), at_least=LIKELY, note=told))
    return [*findings, *context]


def decision(findings: Sequence[Finding]) -> Verdict:
    """The counts over permutations of all units decide, whichever widths were trained."""
    return decided_by(*(f.name for f in findings if f.name.endswith("nat worse")))(findings)


def figures(tables: Tables) -> list[Drawing]:
    """The loss on the way to a permuted copy, and how much worse the averages are."""
    rows = tables["segments"]
    rows = rows.assign(arm=rows.kind + ", width " + rows.width.astype(str))
    way = figure("From a network to its permuted copy", "share of the way", "training loss", log_y=True)
    for arm, some in rows.groupby("arm", sort=False):
        middle = spread(some, ["t"], "loss")
        lines(way, middle, "t", "middle", band=("low", "high"), name=str(arm))
    table = tables["averages"]
    drawn = figure("Averages of a network and a permuted copy", "", "rise of the loss, nat")
    for kind in (ALL, TWO):
        some = table[table.kind == kind]
        labels = "width " + some.width.astype(str)
        drawn.add_box(x=labels.to_numpy(), y=some.barrier.to_numpy(), name=kind, boxpoints=False)
    drawn.update_layout(boxmode="group")
    drawn.update_xaxes(title_text="hidden layers", type="category")
    reference(drawn, HIGH, "worse")
    return [
        Drawing(
            way,
            "Both ends are the same function; the straight way between them passes over a hill "
            "(median and 80 % of the networks). Exchanging two units only is another matter.",
        ),
        Drawing(drawn, "How much larger the loss is halfway, over all networks and permutations."),
    ]


C7 = Claim(
    id="C7",
    section="6.1",
    title="Averaging permuted copies raises the loss",
    statement="Averaging the parameters of a network and of a copy with permuted neurons likely leads to a "
    "larger loss.",
    source="Notes §6.1; Entezari et al. 2022; Ainsworth et al. 2023",
    paper=True,
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decision,
    caveats=(
        "Networks 64-h-h-10 on digits, Adam at the fixed rate 0.003; permutations of one network share its "
        "weights, so the intervals of the counts are narrower than those of independent runs.",
        "A larger loss halfway proves no saddle there: that takes an argument over all paths, see C6.",
        "The right permutation does the opposite: independent networks of enough width, brought into one "
        "order, average well (see C63).",
        "In the quick profile the widest networks are averaged with 20 copies of each kind.",
    ),
    errata=("E3",),
)
