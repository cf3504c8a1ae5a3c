"""C4: over-parameterised networks find minima of low training error."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.engine import EarlyStopping
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, decided_by
from losslab.lecture.figures import figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_1 import students
from losslab.lecture.statistics import Interval
from losslab.lecture.training import one_thread, trained
from losslab.lecture.verdicts import bound, count
from losslab.rules import Adam
from losslab.tasks import Batch, Data, Task, digits, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES, CLASSES = 300, 10
RATE = 0.01
SOLVED = 1e-2
"""Training cross-entropy below which, with every label right, a run has succeeded."""

ENOUGH = 5.0
"""Parameters per example from which the claim speaks of over-parameterisation."""

SHARE, SURE = 0.95, 0.8
TEACHER = 10
LABELS = ("true labels", "random labels")
THRESHOLD = "parameters per example at half success within a factor 2 of 1"


class Sizes(NamedTuple):
    """How much work to do: hidden widths, seeds, steps, runs of the students."""

    widths: tuple[int, ...]
    seeds: int
    steps: int
    students: int
    student_steps: int


def parameters(width: int) -> int:
    """Weights of the network 64-width-10.

    Example:
        >>> parameters(4)
        310
    """
    return 64 * width + width + CLASSES * width + CLASSES


def pictures(labels: str) -> Data:
    """The first 300 training digits, with their labels or with labels drawn uniformly."""
    x, y = digits().train.all()
    x, y = x[:EXAMPLES], y[:EXAMPLES]
    if labels == "random labels":
        y = torch.randint(CLASSES, (EXAMPLES,), generator=torch.Generator().manual_seed(4))
    return Data((x, y))


def task_of(width: int, activation: str, labels: str) -> Task:
    """One hidden layer on the digits; the metric ``left`` stops falling once a run has succeeded."""
    task = supervised(mlp(64, width, CLASSES, activation=activation), pictures(labels), name="digits")

    def metrics(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(batch[0])
        right = (out.argmax(-1) == batch[1]).float().mean()
        return {"accuracy": right, "left": F.cross_entropy(out, batch[1]).clamp(min=SOLVED / 2) + 1 - right}

    return task.replace(metrics=metrics)


def fits(sizes: Sizes) -> pd.DataFrame:
    """Full-batch Adam: one row a (labels, activation, width, seed) with the best loss and accuracy seen."""
    import pandas as pd

    tables = []
    for labels in LABELS:
        for activation in ("relu", "tanh"):
            for width in sizes.widths:
                rows = _fit(task_of(width, activation, labels), sizes)
                tables.append(rows.assign(labels=labels, activation=activation, width=width))
    return pd.concat(tables, ignore_index=True)


def _fit(task: Task, sizes: Sizes) -> pd.DataFrame:
    import pandas as pd

    run = trained(
        task,
        Adam(lr=RATE),
        seeds=sizes.seeds,
        steps=sizes.steps,
        batch_size=EXAMPLES,
        evaluate=25,
        evaluate_on=["train"],
        stop=EarlyStopping("train_left", patience=20, restore=False),
    )
    rows = run.history.dropna(subset="train_loss")
    solved = (rows.train_loss < SOLVED) & (rows.train_accuracy == 1.0)
    groups = rows.assign(solved=solved, when=rows.step.where(solved)).groupby("member")
    best = groups[["train_loss", "when"]].min().assign(
        accuracy=groups.train_accuracy.max(), solved=groups.solved.any()
    )  # fmt: skip
    return pd.DataFrame(best.reset_index(drop=True)).assign(seed=range(sizes.seeds))


def extra_students(runs: int, steps: int) -> pd.DataFrame:
    """ReLU students of ten units, as many as the teacher has, one more, two more."""
    import pandas as pd

    tables = [students.runs(TEACHER + extra, TEACHER, runs, steps)[1] for extra in (0, 1, 2)]
    return pd.concat(tables, ignore_index=True)


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Networks of growing width on digits, and more students than teachers."""
    lab.progress("fitting digits with networks of growing width")
    return {"fits": fits(sizes), "students": extra_students(sizes.students, sizes.student_steps)}


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    widths = lab.pick((1, 2, 4, 8, 16, 32, 64), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256))
    sizes = Sizes(
        widths, lab.replicates(10, 20), lab.pick(1500, 10_000), lab.pick(60, 300), lab.pick(600, 3000)
    )
    with one_thread():
        return evidence(lab, sizes)


def success_title(labels: str) -> str:
    """The finding about one kind of labels."""
    return f"{labels}: runs at {ENOUGH:g} or more parameters per example that fit the data"


def student_title(extra: int) -> str:
    """The finding about more students than teachers."""
    told = "one student" if extra == 1 else f"{extra} students"
    return f"{told} more than the teacher's {TEACHER} units: certified bad minima"


def judge(tables: Tables) -> list[Finding]:
    """V2 on the runs beyond the threshold, and where half of the runs succeed."""
    rows = tables["fits"].assign(ratio=[parameters(w) / EXAMPLES for w in tables["fits"].width])
    findings = [_judge_success(rows[rows.labels == labels], labels) for labels in LABELS]
    findings += [_judge_threshold(rows[rows.labels == labels], labels) for labels in LABELS]
    plain = tables["students"]
    level = plain[plain.students == TEACHER].bad.mean()
    for extra in (1, 2):
        some = plain[plain.students == TEACHER + extra]
        note = f"with as many students as units {number(level)}"
        findings.append(count(student_title(extra), int(some.bad.sum()), len(some), at_most=0.1, note=note))
    return findings


def _judge_success(rows: pd.DataFrame, labels: str) -> Finding:
    wide = rows[rows.ratio >= ENOUGH]
    cells = wide.groupby(["activation", "width"], as_index=False).solved.mean()
    worst = cells.loc[cells.solved.idxmin()]
    note = f"lowest share of a network {number(worst.solved)}, {worst.activation} with {worst.width} units"
    found = count(success_title(labels), int(wide.solved.sum()), len(wide), at_least=SURE, note=note)
    if found.verdict == Verdict.HOLDS and worst.solved < SHARE:
        return dataclasses.replace(found, verdict=Verdict.MIXED)
    return found


def _judge_threshold(rows: pd.DataFrame, labels: str) -> Finding:
    seeds = rows.seed.unique()
    rng = np.random.default_rng(0)
    table = rows.pivot_table(index="seed", columns="ratio", values="solved", aggfunc="mean")
    draws = [half_success(table.loc[rng.choice(seeds, len(seeds))].mean()) for _ in range(500)]
    ends: Interval = (float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975)))
    outputs = number(half_success(table.mean()) / CLASSES)
    return bound(
        f"{labels}: {THRESHOLD}",
        half_success(table.mean()),
        ends,
        len(seeds),
        "where the share of successes crosses one half, bootstrap over seeds",
        at_least=0.5,
        at_most=2.0,
        note=f"{outputs} parameters per label entry, of which there are ten an example",
    )


def half_success(share: pd.Series) -> float:
    """Where a share, indexed by parameters per example, first reaches one half; infinite for never.

    Interpolated in the logarithm of the index.

    Example:
        >>> import pandas as pd
        >>> round(half_success(pd.Series({1.0: 0.0, 4.0: 1.0})), 6)
        2.0
    """
    x, y = np.log(share.index.to_numpy(dtype=float)), share.to_numpy(dtype=float)
    above = np.flatnonzero(y >= 0.5)
    if not len(above):
        return float("inf")
    k = int(above[0])
    if k == 0:
        return float(np.exp(x[0]))
    part = (0.5 - y[k - 1]) / (y[k] - y[k - 1])
    return float(np.exp(x[k - 1] + part * (x[k] - x[k - 1])))


def figures(tables: Tables) -> list[Drawing]:
    """Success and loss against the number of parameters, bad minima against extra students."""
    rows = tables["fits"].assign(ratio=[parameters(w) / EXAMPLES for w in tables["fits"].width])
    rows = rows.assign(arm=rows.labels + ", " + rows.activation)
    drawn = figure("Success against size", "parameters per example", "share of runs", log_x=True)
    share = rows.groupby(["arm", "ratio"], sort=False).solved.mean().reset_index()
    lines(drawn, share.sort_values("ratio"), "ratio", "solved", by="arm", mode="lines+markers")
    reference(drawn, 1.0, "one per example", axis="x")
    reference(drawn, CLASSES, "one per output", axis="x")
    loss = figure(
        "Training loss against size", "parameters per example", "cross-entropy", log_x=True, log_y=True
    )
    for arm, group in rows.groupby("arm", sort=False):
        found = spread(group, ["ratio"], "train_loss").sort_values("ratio")
        lines(loss, found, "ratio", "middle", band=("low", "high"), mode="lines+markers", name=str(arm))
    reference(loss, SOLVED, "success")
    return [
        Drawing(
            drawn,
            "Share of random starts from which full-batch Adam fits all 300 digits. Random labels need more "
            "parameters than true ones. Lines mark one parameter per example and one per output.",
        ),
        Drawing(loss, "Least training loss reached (median and 80 % of the seeds), by size and labels."),
        _students(tables["students"]),
    ]


def _students(rows: pd.DataFrame) -> Drawing:
    share = rows.groupby("students").bad.mean().reset_index()
    drawn = figure("Bad minima against extra units", "students", "share of runs in a certified bad minimum")
    drawn.add_bar(x=share.students, y=share.bad, name="", showlegend=False, meta="series")
    drawn.update_xaxes(dtick=1)
    return Drawing(
        drawn,
        "ReLU students of ten units, as in C3: one or two more units than the teacher has and hardly a run "
        "ends badly.",
    )


C4 = Claim(
    id="C4",
    section="6.1",
    title="Over-parameterised networks find minima of low training error",
    statement="With more parameters than training samples, descent from random weights somehow finds local "
    "minima of low training error.",
    source="Notes §6.1; Zhang et al. 2017; Safran & Shamir 2018",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(*(success_title(labels) for labels in LABELS)),
    caveats=(
        "Adam at the fixed rate 0.01 on all 300 images, at most 1500 steps in the quick profile; a run ends "
        "early once it has succeeded, or when nothing has improved for 500 steps.",
        "The notes' threshold, more parameters than samples, is tested apart: with ten outputs an example "
        "asks for ten numbers, and true labels for far fewer. It is neither necessary nor sufficient.",
        "The quick profile had 3000 steps at first and now has 1500: a run that would succeed later "
        "counts as a failure, which can only lower the shares and raise the threshold.",
        "Theory (Du et al. 2019; Allen-Zhu et al. 2019) needs far wider networks than these.",
    ),
)
