"""C32: AMSGrad and AdamNC on the sequence on which Adam fails, and AMSGrad in practice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.section_6_3.adam_convergence import horizon, reaches, spread
from losslab.lecture.section_6_3.adam_race import MEASURES, Arm, Budget, bench, finals, race_figures, races
from losslab.lecture.section_6_3.adam_sequence import BETA2, MEAN, sequence
from losslab.lecture.tuning import rates
from losslab.lecture.verdicts import paired_family
from losslab.rules import Adam, AMSGrad, Rule
from losslab.rules.schedules import inverse_sqrt
from losslab.tasks import logistic_regression, mlp

if TYPE_CHECKING:
    import pandas as pd

NETWORKS = ("logistic regression", "MLP")


def _arms(decaying: bool) -> list[Arm]:
    def arm(kind: type[Adam] | type[AMSGrad], beta2: float) -> Arm:
        def make(lr: list[float]) -> Rule:
            return kind(lr=inverse_sqrt(lr) if decaying else lr, beta2=beta2)

        grid = rates(1e-2, 1.0, 4) if decaying else rates(3e-4, 3e-2, 4)
        return Arm(f"{kind.title}, β₂ = {beta2:g}", make, tuple(grid))

    return [arm(kind, beta2) for kind in (Adam, AMSGrad) for beta2 in (0.99, 0.999)]


def _experiment(lab: Lab) -> Tables:
    table = sequence(horizon(lab), lab.progress)
    kept = table["rule"].isin(["AMSGrad", "AdamNC"]) | ((table["rule"] == "Adam") & (table["beta2"] == BETA2))
    where = bench(lab)
    budget = Budget(5, 128) if where.name == "MNIST" else Budget(20, 64)
    practice = races(
        lab,
        {
            "logistic regression": (logistic_regression(where.inputs, 10), _arms(decaying=True), budget),
            "MLP": (mlp(where.inputs, 100, 10), _arms(decaying=False), budget),
        },
    )
    return {"online": table[kept].reset_index(drop=True), **practice}


def _saved(tables: Tables, network: str, tuned: str) -> tuple[str, pd.Series]:
    """AMSGrad against Adam, each with the decay that tuned best: the share of Adam's loss that it saves."""
    runs, search = (table[table["network"] == network] for table in (tables["runs"], tables["tuning"]))
    losses = finals(runs, tuned)
    scores = search[search["tuned"] == tuned].groupby("arm")["score"].min()
    adam, amsgrad = (str(scores[scores.index.str.startswith(kind)].idxmin()) for kind in ("Adam", "AMSGrad"))
    name = f"{amsgrad} ends at least 1 % below {adam} ({network}, rates by {tuned} loss)"
    return name, (losses[adam] - losses[amsgrad]) / losses[adam]


def _judge(tables: Tables) -> list[Finding]:
    return [
        reaches(tables["online"], "AMSGrad", True, "online"),
        reaches(tables["online"], "AdamNC", True, "online"),
        *paired_family(
            dict(_saved(tables, network, tuned) for network in NETWORKS for tuned in MEASURES),
            delta=0.01,
            least=int(tables["runs"]["least"].iloc[0]),
            note=str(tables["runs"]["note"].iloc[0]),
        ),
    ]


def _figures(tables: Tables) -> list[Drawing]:
    exact = figure("Exact average regret", "step t", "R/t", log_x=True, log_y=True)
    table = spread(tables["online"], "exact", ("Adam", "AMSGrad", "AdamNC"))
    lines(exact, table[table["step"] > 1000], "step", "median", by="rule")
    reference(exact, 2 * MEAN, "regret of x = 1")
    return [
        Drawing(
            exact,
            "The regret of each step's own loss against −1. The two remedies' falls like 1/√t, as their "
            "theorems say; Adam's bends towards that of always playing +1.",
        ),
        *race_figures(tables["runs"]),
    ]


C32 = Claim(
    id="C32",
    section="6.3.3",
    title="AMSGrad and AdamNC as remedies",
    statement="With a second moment that never decreases (AMSGrad), or that averages all of the past "
    "(AdamNC), Adam converges there, and AMSGrad also trains better in practice.",
    source="Reddi, Kale & Kumar 2018, §4–5: the reference of notes §6.3.3",
    paper=True,
    experiment=_experiment,
    judge=_judge,
    figures=_figures,
    caveats=(
        "AMSGrad is the paper's form: no bias correction, the maximum of v. torch's amsgrad=True divides "
        "that maximum by the current correction, another rule, whose denominator can shrink. In practice it "
        "meets Adam with bias correction, so that comparison changes the correction and the maximum at once.",
        "Step size and horizon of the sequence are those of C31, derived before any run.",
        "Practice is the digits in the quick profile, MNIST in full and paper when a data folder is given: "
        "logistic regression with α/√t, and one hidden layer of 100 units with a constant rate. Rate and β₂ "
        "of each rule are chosen twice, by validation loss and by the training loss that is compared. The "
        "loss has an L2 penalty |w|²/(2n), without which the digits have no finite minimum; it and the finer "
        "grid of rates came after a first run without them, in which refining the grid alone turned "
        "AMSGrad's advantage on logistic regression into a disadvantage.",
    ),
    errata=("E21",),
)
