"""C3: small nonlinear networks have many bad local minima."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from losslab.engine import Objective, Points
from losslab.engine.randomness import seeded
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, decided_by
from losslab.lecture.figures import NEUTRAL, colour, figure
from losslab.lecture.numbers import number
from losslab.lecture.section_6_1 import students
from losslab.lecture.section_6_1.certified import certified_minima, normal_starts
from losslab.lecture.statistics import clopper_pearson
from losslab.lecture.training import one_thread
from losslab.lecture.verdicts import count, join_notes
from losslab.tasks import Batch, Data, Task, digits, half_mse, mlp

if TYPE_CHECKING:
    import pandas as pd

RARE = 0.05
"""Share of bad minima above which they count as many."""

WORSE = 1.05
"""A certified minimum is bad where its loss is more than this times the best found."""

PENALTY = 1e-3
"""Weight of |theta|^2 / 2 in the digits' loss: without one the best weights are infinite."""

ARRIVED = 1e-7
"""Length of the gradient at which a search on digits has arrived."""

XOR_BAD = 1e-3
SIZES = (6, 8, 10, 12)
WIDTHS = (2, 3, 4)


class Sizes(NamedTuple):
    """How much work to do: units of the teacher and runs; digits, widths by penalty, starts; XOR's starts."""

    teachers: tuple[int, ...]
    runs: int
    steps: int
    examples: int
    widths: Mapping[float, tuple[int, ...]]
    starts: int
    digit_steps: int
    xor: int


def regression_of_classes(penalty: float) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """Half the mean squared error against one-hot labels, plus ``penalty |theta|^2 / 2``."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        fit = half_mse(model(batch[0]), batch[1])
        if not penalty:
            return fit
        return fit + penalty / 2 * sum(p.square().sum() for p in model.parameters())

    return loss


def starts_of(task: Task, seeds: int) -> Points:
    """The networks of seeds 0, 1, ... as torch's layers draw them."""
    modules = []
    for seed in range(seeds):
        with seeded(seed, "init"):
            modules.append(task.model())
    return Points.from_modules(modules)


def digit_minima(sizes: Sizes) -> pd.DataFrame:
    """Certified ends on digits, tanh networks 64-width-10: one row a (penalty, width, start)."""
    import pandas as pd

    x, y = digits().train.all()
    data = (x[: sizes.examples].double(), F.one_hot(y[: sizes.examples], 10).double())
    tables = []
    for penalty, widths in sizes.widths.items():
        for width in widths:
            model = mlp(64, width, 10, activation="tanh").to(torch.float64)
            task = Task(model, regression_of_classes(penalty), Data(data), name="digits")
            objective = Objective(task, execution="stacked")
            starts = starts_of(task, sizes.starts)
            _, rows = certified_minima(objective, starts, sizes.digit_steps, ARRIVED, ARRIVED)
            tables.append(rows.assign(penalty=penalty, width=width))
    return pd.concat(tables, ignore_index=True)


def xor_minima(starts: int, steps: int = 400) -> pd.DataFrame:
    """Certified ends of 2-2-1 networks on exclusive or, starts of standard normal weights and biases."""
    import pandas as pd

    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    tables = []
    for activation in ("sigmoid", "tanh", "relu"):
        model = mlp(2, 2, 1, activation=activation).to(torch.float64)
        task = Task(model, regression_of_classes(0.0), Data((x, y)), name="xor")
        generator = torch.Generator().manual_seed(7)
        like = Points.from_modules([model()])
        points = normal_starts(like, np.ones(starts), generator, fan_in=False)
        _, rows = certified_minima(Objective(task, execution="stacked"), points, steps)
        tables.append(rows.assign(activation=activation))
    return pd.concat(tables, ignore_index=True)


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Students of a teacher, digits, exclusive or."""
    import pandas as pd

    lab.progress("students of a teacher")
    ends, spectra = [], []
    for k in sizes.teachers:
        points, rows = students.runs(k, k, sizes.runs, sizes.steps)
        ends.append(rows)
        bad = torch.from_numpy(rows.bad.to_numpy().copy())
        spectra.append(students.spectra(k, k, points, bad).assign(k=k))
    lab.progress("small networks on digits")
    return {
        "students": pd.concat(ends, ignore_index=True),
        "spectra": pd.concat(spectra[-1:], ignore_index=True),
        "digits": digit_minima(sizes),
        "xor": xor_minima(sizes.xor),
    }


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    sizes = Sizes(
        teachers=lab.pick(SIZES, (6, 7, 8, 9, 10, 11, 12, 14, 16, 20)),
        runs=lab.pick(150, 500),
        steps=lab.pick(1000, 5000),
        examples=lab.pick(200, 1000),
        widths=lab.pick({PENALTY: WIDTHS}, dict.fromkeys((PENALTY, PENALTY / 10), (2, 3, 4, 6, 8, 12))),
        starts=lab.pick(75, 100),
        digit_steps=lab.pick(800, 5000),
        xor=lab.pick(40, 500),
    )
    with one_thread():
        return evidence(lab, sizes)


def student_title(k: int) -> str:
    """The finding about k students of k units."""
    return f"{k} ReLU students of {k} units: runs that end in a certified bad minimum"


def digit_title(width: int, penalty: float = PENALTY) -> str:
    """The finding about digits."""
    told = f", penalty {number(penalty)}" if penalty != PENALTY else ""
    return f"digits, {width} tanh units{told}: starts that end in a certified bad minimum"


def judge(tables: Tables) -> list[Finding]:
    """V2 for each size; only ends that the Hessian certifies can be bad."""
    findings = []
    runs = tables["students"]
    for k in sorted(runs.k.unique()):
        rows = runs[runs.k == k]
        good = rows[rows.bad]
        note = f"{int(rows.certified.sum())} of {len(rows)} ends certified"
        if len(good):
            note += f"; loss of the bad ones {number(good.value.min())} to {number(good.value.max())}"
        findings.append(count(student_title(k), len(good), len(rows), at_least=RARE, note=note))
    findings.sort(key=lambda finding: finding.name != student_title(10))
    ends = tables["digits"]
    for penalty, width in sorted(set(zip(ends.penalty, ends.width, strict=True))):
        rows = ends[(ends.penalty == penalty) & (ends.width == width)]
        findings.append(_judge_digits(rows, width, penalty))
    return findings + [_judge_xor(rows, str(name)) for name, rows in tables["xor"].groupby("activation")]


def _judge_digits(rows: pd.DataFrame, width: int, penalty: float) -> Finding:
    good = rows[rows.certified]
    best = float(good.value.min()) if len(good) else float("nan")
    bad = int((good.value > WORSE * best).sum())
    spread = f"certified losses {number(best)} to {number(good.value.max())}" if len(good) else ""
    note = join_notes(f"{len(good)} of {len(rows)} ends certified", spread)
    found = count(digit_title(width, penalty), bad, len(rows), at_least=RARE, note=note)
    if found.verdict == Verdict.FAILS and len(good) < len(rows) / 2:
        return dataclasses.replace(
            found, verdict=Verdict.UNDECIDED, note=join_notes(note, "too few ends could be certified")
        )
    return found


def _judge_xor(rows: pd.DataFrame, activation: str) -> Finding:
    good = rows[rows.certified]
    bad = int((good.value > XOR_BAD).sum())
    note = f"{len(good)} of {len(rows)} ends certified; the others lie on plateaus or wander to infinity"
    return count(
        f"exclusive or, 2-2-1 {activation}: certified bad minima", bad, len(rows), at_least=RARE, note=note
    )


def figures(tables: Tables) -> list[Drawing]:
    """Rates against size, and the spectrum at bad minima."""
    return [_rates(tables), _losses(tables["digits"]), _spectrum(tables["spectra"])]


def _rates(tables: Tables) -> Drawing:
    drawn = figure("How often a bad minimum is found", "units k", "share of runs")
    runs = tables["students"]
    groups = [
        (k, int(runs[runs.k == k].bad.sum()), int((runs.k == k).sum())) for k in sorted(runs.k.unique())
    ]
    _with_intervals(drawn, groups, "ReLU students of a teacher", 0)
    plain = tables["digits"][tables["digits"].penalty == PENALTY]
    digits_ = []
    for width in sorted(plain.width.unique()):
        rows = plain[plain.width == width]
        good = rows[rows.certified]
        digits_.append((width, int((good.value > WORSE * good.value.min()).sum()), len(rows)))
    _with_intervals(drawn, digits_, "digits, tanh", 1)
    drawn.update_yaxes(range=[-0.02, 1])
    return Drawing(
        drawn,
        "Share of runs whose end is certified, by gradient and exact Hessian, as a minimum above the best "
        "one (95 % intervals). As many students as teachers: the larger, the more often descent ends badly.",
    )


def _with_intervals(drawn: object, groups: Sequence[tuple[int, int, int]], name: str, index: int) -> None:
    size, bad, runs = np.array(groups).T
    share = bad / runs
    low, high = np.array([clopper_pearson(int(b), int(n)) for b, n in zip(bad, runs, strict=True)]).T
    drawn.add_scatter(  # type: ignore[attr-defined]
        x=size,
        y=share,
        mode="lines+markers",
        name=name,
        meta="series",
        line={"color": colour(index), "width": 2},
        error_y={"array": high - share, "arrayminus": share - low, "color": colour(index)},
    )


def _losses(rows: pd.DataFrame) -> Drawing:
    plain = rows[(rows.penalty == PENALTY) & rows.certified]
    drawn = figure("Loss at certified minima on digits", "loss / best loss of that width", "minima")
    for index, (width, group) in enumerate(plain.groupby("width")):
        drawn.add_histogram(
            x=group.value / group.value.min(),
            name=f"{width} units",
            marker={"color": colour(index)},
            opacity=0.65,
            xbins={"start": 1.0, "size": 0.01},
        )
    drawn.add_vline(WORSE, line={"color": NEUTRAL, "dash": "dash"})
    return Drawing(
        drawn,
        "Networks of a few tanh units on digits end in minima of different height. Right of the dashed line, "
        "5 % above the best one found, a minimum counts as bad.",
    )


def _spectrum(rows: pd.DataFrame) -> Drawing:
    k = int(rows.k.iloc[0])
    drawn = figure(f"Curvature at minima, k = {k}", "eigenvalue of the Hessian", "share", log_x=True)
    for index, (kind, group) in enumerate(rows.groupby("kind", sort=False)):
        exponents = np.log10(group.eigenvalue.clip(lower=1e-12))
        heights, edges = np.histogram(exponents, bins=np.linspace(-4, 1.5, 56), density=False)
        drawn.add_scatter(
            x=10 ** ((edges[1:] + edges[:-1]) / 2),
            y=heights / len(group),
            mode="lines",
            line={"shape": "hvh", "color": colour(index), "width": 2},
            fill="tozeroy",
            fillcolor=colour(index, 0.2),
            name=f"{kind} minima",
        )
    return Drawing(
        drawn,
        "All eigenvalues are positive at the bad minima too: no direction leads down, so they are minima and "
        "not saddles that descent has yet to leave.",
    )


C3 = Claim(
    id="C3",
    section="6.1",
    title="Small networks have many bad local minima",
    statement="Small neural networks have many bad local minima.",
    source="Notes §6.1; Safran & Shamir 2018; Safran, Yehudai & Shamir 2021",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(student_title(10), student_title(12), *(digit_title(width) for width in WIDTHS)),
    caveats=(
        "A minimum counts only where the gradient is below 1e-9 (1e-7 on digits) and no eigenvalue of the "
        "exact Hessian is below −10⁻⁸ of the largest; bad means an expected loss above 0.001 for the "
        "students, whose global minimum is 0, and 5 % above the best one found on digits, whose global "
        "minimum is not known.",
        "The students' loss is the expectation over normal inputs in closed form, smooth away from zero "
        "weights. On a finite sample a ReLU network also has minima with dead units, and kinks that a "
        "Hessian does not see (the ReLU arm of exclusive or).",
        "Exclusive or with two sigmoid units has no strict bad minimum (Hamey 1998), only plateaus: what is "
        "certified there is flat along some direction or far out. These arms are context.",
        "On digits the loss is the mean squared error of 200 images (1000 in the full profile) and a penalty "
        "of 0.0005 |θ|². A first run without the penalty could certify hardly any end, because "
        "the weights grow without end; the penalty may itself remove bad minima.",
        "After a first run the quick profile has 75 starts on digits, 80 at first: still enough to exclude a "
        "share of 5 % when none ends badly.",
    ),
)
