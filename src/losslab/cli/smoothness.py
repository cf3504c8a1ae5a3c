"""``losslab smoothness``: the loss along its gradient while a task trains."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from losslab.cli.terminal import counted, printed, terminal
from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd

    from losslab.cli.commands import Smoothness
    from losslab.tasks import Task

GRID = 8
"""Steps of a walk."""

SHOWN = 6
"""Probes of an arm that are printed; the page draws all."""

COLUMNS = {
    "loss": ("batch", "raw", "loss"),
    "gradient_norm": ("batch", "raw", "‖g‖"),
    "variation": ("batch", "raw", "range of the loss"),
    "relative": ("batch", "relative", "range, relative steps"),
    "first_order_error": ("batch", "raw", "first-order error"),
    "beta": ("batch", "raw", "effective β"),
    "curvature": ("batch", "raw", "gᵀHg / ‖g‖²"),
    "running": ("running", "raw", "range, running statistics"),
}
"""Printed column -> batch-norm mode, kind of step, title; columns of two modes are ranges."""


TITLES = {column: title for column, (_, _, title) in COLUMNS.items()} | {"arm": "network"}


def smoothness(command: Smoothness) -> None:
    """Trains and probes each network, prints the table, writes the page."""
    from losslab.tasks import load_task

    for name in ("seeds", "every", "examples"):
        if getattr(command, name) < 1:
            raise LosslabError(f"--{name} is {getattr(command, name)}: pass at least 1")
    for name in ("raw", "relative"):
        if not 0 < getattr(command, name) < float("inf"):
            raise LosslabError(f"--{name} is {getattr(command, name):g}: pass a length above 0")
    task = load_task(command.task, folder=command.data)
    begun = time.perf_counter()
    summary = probed(arms_of(task, command.compare), command)
    seconds = time.perf_counter() - begun
    shown = shown_rows(summary)
    told = [*sentences(summary, command), *left_out(summary, shown, command)]
    console = terminal()
    title = f"{task.name}: {counted(command.seeds, 'member')}, {command.rule}"
    console.print(printed(shown.rename(columns=TITLES), title, keys=2))
    for sentence in told:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"{seconds:.1f} s", style="dim")
    if command.out is not None:
        _write(command, task.name, summary, shown, told)
        console.print(f"open [bold]{command.out}[/bold]")


def arms_of(task: Task, compare: str) -> dict[str, Task]:
    """The task, and beside it the one with batch norm put in or taken out."""
    from losslab.layers import with_batchnorm, without_batchnorm
    from losslab.layers.batchnorm import is_batchnorm
    from losslab.tasks import build

    if compare == "none":
        return {task.name: task}
    network = build(task)
    normalised = any(is_batchnorm(module) for module in network.modules())
    if not normalised and not any(is_batchnorm(module) for module in with_batchnorm(network).modules()):
        raise LosslabError(
            f"the network of {task.name!r} has no place for batch norm, which goes behind linear and "
            "convolutional layers but the last, outside of attention and transformer blocks: leave out "
            "--compare, or put it into the task's network yourself"
        )
    other = task.replace(
        model=lambda: without_batchnorm(task.model()) if normalised else with_batchnorm(task.model())
    )
    plain, norm = (other, task) if normalised else (task, other)
    return {"standard": plain, "batch norm": norm}


def probed(arms: dict[str, Task], command: Smoothness) -> pd.DataFrame:
    """`SmoothnessRecorder.summary` of each arm, before training and on the way."""
    import pandas as pd

    from losslab import engine
    from losslab.engine import Objective
    from losslab.rules import make
    from losslab.signals import SmoothnessRecorder
    from losslab.signals.flows import examples_of

    settings = {
        "raw": [command.raw * k / GRID for k in range(1, GRID + 1)],
        "relative": [command.relative * k / GRID for k in range(1, GRID + 1)],
    }
    rule = make(command.rule, **({} if command.lr is None else {"lr": command.lr}))
    tables, planned = [], probes_of(command)
    for name, task in arms.items():
        batch = examples_of(task, command.examples)
        recorder = SmoothnessRecorder(Objective(task, "train" if batch is None else batch), settings)

        def trained(
            steps: int, task: Task = task, recorder: SmoothnessRecorder = recorder
        ) -> engine.Population:
            return engine.train(
                task,
                rule,
                seeds=command.seeds,
                steps=steps,
                batch_size=command.batch_size,
                evaluate=None,
                watch=recorder,
                record=lambda step: step + 1 in planned,
            )

        recorder(trained(0))
        trained(command.steps)
        tables.append(recorder.summary.assign(arm=name))
    return pd.concat(tables, ignore_index=True)


def probes_of(command: Smoothness) -> list[int]:
    """Updates after which the networks are probed: the start, every so many, and the end."""
    return sorted({*range(0, command.steps + 1, command.every), command.steps})


def shown_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """Medians over members, one row a (arm, probe), for up to six probes an arm."""
    import numpy as np
    import pandas as pd

    probes = np.sort(summary["updates"].unique())
    picked = probes[np.unique(np.linspace(0, len(probes) - 1, SHOWN).round().astype(int))]
    rows = summary[summary["updates"].isin(picked)]
    keys = ["arm", "updates"]
    columns = {}
    for name, (mode, kind, _) in COLUMNS.items():
        mine = rows[(rows["mode"] == mode) & (rows["kind"] == kind)]
        measured = name if name in rows else "variation"
        columns[name] = mine.groupby(keys, sort=False)[measured].median()
    # A mode that one arm lacks must not reorder the others.
    order = columns["loss"].index
    table = pd.DataFrame({name: column.reindex(order) for name, column in columns.items()})
    return table.reset_index().dropna(axis=1, how="all")


def sentences(summary: pd.DataFrame, command: Smoothness) -> list[str]:
    """What the probes say, arm by arm and of the pair; medians over members and probes."""
    rows = summary[summary["mode"] == "batch"]
    told: list[str] = []
    ranges: dict[object, dict[str, float]] = {}
    for arm, mine in rows.groupby("arm", sort=False):
        raw = mine[mine["kind"] == "raw"]
        lost = raw.loc[raw["loss"].isna(), "member"].nunique()
        if raw["loss"].isna().all():  # `left_out` tells
            continue
        if not raw["variation"].notna().any():
            told.append(
                f"{arm}: the loss is {raw['loss'].median():.3g} and its gradient is not finite, so there is "
                "nothing to follow: mend what has no derivative there (a root at 0, a division by 0)."
            )
            continue
        ranges[arm] = {str(k): float(group["variation"].median()) for k, group in mine.groupby("kind")}
        error, beta = raw["first_order_error"].median(), raw["beta"].median()
        told.append(
            f"{arm}: over steps of up to {command.raw:g} times the gradient the loss varies by "
            f"{ranges[arm]['raw']:.3g}, and its slope is wrong by {error:.0%} of what it promises; the "
            f"gradient changes by up to {beta:.3g} per distance, so steps of plain gradient descent above "
            f"{2 / beta:.2g} may overshoot along it."
        )
        if 0 < lost < command.seeds:
            told.append(f"{arm}: {lost} of {command.seeds} members diverged; lower the rate to see them too.")
    if len(ranges) == 2:
        plain, normalised = ranges.values()
        raw_steps, relative_steps = (_times(plain[k], normalised[k]) for k in ("raw", "relative"))
        told.append(
            f"With batch norm the loss varies {raw_steps} along raw steps, and {relative_steps} along steps "
            "relative to the weights, which do not see how a network is parametrised."
        )
    return told


def left_out(summary: pd.DataFrame, shown: pd.DataFrame, command: Smoothness) -> list[str]:
    """Which rows the table does not have, and why."""
    planned, told = probes_of(command), []
    rows = summary[summary["loss"].notna()]
    for arm in summary["arm"].unique():
        last = max(rows.loc[rows["arm"] == arm, "updates"], default=-1)
        gone = [probe for probe in planned if probe > last]
        if last < 0:
            told.append(
                f"{arm}: the loss is not finite before the first update; mend the data or the network."
            )
        elif gone:
            members = "its one member" if command.seeds == 1 else f"all {command.seeds} members"
            told.append(
                f"{arm}: {members} diverged before update {gone[0]}, so from there on nothing is measured; "
                "lower the rate to see it."
            )
    everything = summary["updates"].nunique()
    if (some := shown["updates"].nunique()) < everything:
        told.append(
            f"The table has {some} of the {everything} probes, spread over training; the figures "
            "(--out) draw all."
        )
    return told


def _times(plain: float, normalised: float) -> str:
    if not (0 < plain < float("inf") and 0 < normalised < float("inf")):
        return f"by {normalised:.3g} instead of {plain:.3g}"
    ratio = plain / normalised
    if 0.95 < ratio < 1.05:
        return "about as much"
    return f"{ratio:.2g} times less" if ratio >= 1 else f"{1 / ratio:.2g} times more"


def _write(
    command: Smoothness, name: str, summary: pd.DataFrame, shown: pd.DataFrame, told: list[str]
) -> None:
    from losslab import provenance
    from losslab.report import write_page
    from losslab.report.smoothness import draw_smoothness

    assert command.out is not None
    settings = {k: v for k, v in asdict(command).items() if v is not None and k != "out"}
    write_page(
        command.out,
        f"Smoothness of {name}",
        f"The loss of {command.examples} training examples along its own gradient, every {command.every} "
        "updates.",
        draw_smoothness(summary),
        told,
        {"Medians over members": shown.rename(columns=TITLES)},
        settings | provenance.machine(),
        heading="What was found",
    )
