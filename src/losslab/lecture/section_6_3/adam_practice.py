"""C29 and C30: who takes Adam by default, and how it trains beside the other rules."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from losslab.lecture.claim import Claim, Finding, Lab, Tables, Verdict
from losslab.lecture.section_6_3.adam_race import MEASURES, Arm, Budget, bench, finals, race_figures, races
from losslab.lecture.tuning import rates
from losslab.lecture.verdicts import paired_family
from losslab.rules import SGD, AdaGrad, Adam, Nesterov, RMSProp, Rule
from losslab.rules.schedules import inverse_sqrt
from losslab.tasks import logistic_regression, mlp

if TYPE_CHECKING:
    import pandas as pd

# -- C29 -----------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Where a package says which optimizer it takes when the user names none; no parameter: nowhere."""

    package: str
    module: str
    name: str
    parameter: str | None


ENTRIES = (
    Entry("torch", "torch.nn", "Module", None),
    Entry("scikit-learn", "sklearn.neural_network", "MLPClassifier", "solver"),
    Entry("keras", "keras", "Model.compile", "optimizer"),
    Entry("transformers", "transformers", "TrainingArguments", "optim"),
    Entry("fastai", "fastai.learner", "Learner", "opt_func"),
    Entry("skorch", "skorch", "NeuralNet", "optimizer"),
)


def defaults(entries: Sequence[Entry] = ENTRIES) -> pd.DataFrame:
    """The default optimizer of each package that is installed here, read from its signatures.

    Columns package, place, installed, default (``"none"`` where the user must name one, ``""`` where it could
    not be read) and adam (the default is Adam or AdamW).
    """
    import pandas as pd

    rows = []
    for entry in entries:
        installed = importlib.util.find_spec(entry.module.split(".")[0]) is not None
        default = _default(entry) if installed else ""
        place = f"{entry.module}.{entry.name}" + (f"({entry.parameter}=)" if entry.parameter else "")
        rows.append((entry.package, place, installed, default, "adam" in default.lower()))
    return pd.DataFrame(rows, columns=["package", "place", "installed", "default", "adam"])


def _default(entry: Entry) -> str:
    try:
        found: Any = importlib.import_module(entry.module)
        for part in entry.name.split("."):
            found = getattr(found, part)
        if entry.parameter is None:  # nothing that trains, so nothing that chooses
            return "" if hasattr(found, "fit") else "none"
        value = inspect.signature(found).parameters[entry.parameter].default
    except (ImportError, AttributeError, KeyError, ValueError):
        return ""
    return "none" if value is inspect.Parameter.empty else str(getattr(value, "__name__", value))


def _judge_29(tables: Tables) -> list[Finding]:
    table = tables["defaults"]
    read = table[table["installed"] & (table["default"] != "")]
    absent = table.loc[~table.index.isin(read.index), "package"]
    n, k = len(read), int(read["adam"].sum())
    told = "; ".join(
        f"{package}: {default}" for package, default in zip(read["package"], read["default"], strict=True)
    )
    return [
        Finding(
            "most packages take Adam unless told otherwise",
            Verdict.UNDECIDED if n < 3 else Verdict.HOLDS if k > n / 2 else Verdict.FAILS,
            k / n if n else float("nan"),
            (float("nan"), float("nan")),
            n,
            f"{k} of {n} packages that are installed here, by their signatures",
            "more than half of at least 3 packages",
            told + (f"; not installed here: {', '.join(absent)}" if len(absent) else ""),
        )
    ]


C29 = Claim(
    id="C29",
    section="6.3.3",
    title="Adam as the default optimizer",
    statement="Adam is what most packages use by default today.",
    source="Notes §6.3.3",
    experiment=lambda lab: {"defaults": defaults()},
    judge=_judge_29,
    caveats=(
        "Documentation, not an experiment: only packages that are installed beside losslab are looked at, "
        "so the result is about this installation. AdamW counts as Adam.",
        "torch, with which most networks are trained, has no default: the user names an optimizer. A "
        "package that leaves the choice to the user counts against the claim.",
        "A default says little about use; Schmidt, Schneider & Hennig (2021) count mentions in papers.",
    ),
)


# -- C30 -----------------------------------------------------------------------------------------------


def _arms(decaying: bool) -> list[Arm]:
    """The paper's rules, with plain SGD in the place of AdaDelta, which is not among ours."""

    def arm(name: str, make: Callable[..., Rule], low: float, high: float) -> Arm:
        def build(values: list[float]) -> Rule:
            return make(lr=inverse_sqrt(values) if decaying else values)

        factor = 10.0 if decaying else 1.0  # so that the rates are alike halfway through the run
        return Arm(name, build, tuple(rates(low * factor, high * factor, per_decade=4)))

    return [
        arm("Adam", Adam, 1e-3, 1e-1),
        arm("SGD", SGD, 3e-2, 3.0),
        arm("Nesterov", Nesterov, 3e-3, 3e-1),
        arm("AdaGrad", AdaGrad, 1e-2, 1.0),
        arm("RMSProp", RMSProp, 1e-3, 1e-1),
    ]


def _experiment_30(lab: Lab) -> Tables:
    where = bench(lab)
    mnist = where.name == "MNIST"
    hidden = lab.pick(32, 200, 1000) if mnist else 32
    logistic = logistic_regression(where.inputs, 10)
    network = mlp(where.inputs, hidden, hidden, 10, dropout=0.5)
    return races(
        lab,
        {
            "logistic regression": (logistic, _arms(decaying=True), Budget(10, 128 if mnist else 64)),
            "MLP with dropout": (network, _arms(decaying=False), Budget(5, 128) if mnist else Budget(10, 64)),
        },
    )


def _judge_30(tables: Tables) -> list[Finding]:
    below, within = {}, {}
    runs = tables["runs"]
    for network, some in runs.groupby("network", sort=False):
        for tuned in MEASURES:
            losses = finals(some, tuned)
            adam = losses.pop("Adam")
            best = min(losses, key=lambda arm: losses[arm].median())
            where = f"{network}, rates by {tuned} loss"
            below[f"Adam ends below AdaGrad ({where})"] = 1 - adam / losses["AdaGrad"]
            within[f"Adam is within 5 % of the best other, {best} ({where})"] = 1.05 - adam / losses[best]
    least, note = int(runs["least"].iloc[0]), str(runs["note"].iloc[0])
    margin = "; ".join(part for part in ("1.05 less the ratio of the losses", note) if part)
    return [*paired_family(below, 0.0, least, note), *paired_family(within, 0.0, least, margin)]


C30 = Claim(
    id="C30",
    section="6.3.3",
    title="Adam's speed in practice",
    statement="Momentum and per-parameter rates combine well: Adam trains faster than AdaGrad, and about "
    "as fast as the best other rule.",
    source="Implied in notes §6.3.3; Kingma & Ba 2015, §6",
    paper=True,
    experiment=_experiment_30,
    judge=_judge_30,
    figures=lambda tables: race_figures(tables["runs"]),
    caveats=(
        "The paper shows curves and no numbers, so only the order of the rules is tested. On the digits "
        "everything is smaller: batches of 64, two hidden layers of 32 units, 10 epochs of 1000 examples.",
        "The loss has an L2 penalty |w|²/(2n), as the paper's logistic regression has one. Without it the "
        "digits can be separated, and the training loss measures the size of the rate. The penalty and the "
        "finer grid of rates came after a first run without them, in which refining the grid alone turned "
        "some signs round.",
        "Each rule's rate is chosen twice: by validation loss, and by the training loss that is compared. "
        "Where the two disagree, the answer depends on what one tunes for.",
        "Plain SGD stands in for the paper's AdaDelta; its network on CIFAR-10 is not run.",
        "The best other rule is picked by the runs that are judged, which is to Adam's disadvantage.",
        "Training loss at a fixed budget says nothing about generalisation, where adaptive rules can be "
        "worse (Wilson et al. 2017).",
    ),
)
