"""``losslab signals``: what flows through the networks of a task, and what needs attention."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from losslab.cli.terminal import counted, printed, terminal
from losslab.errors import LosslabError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from losslab.cli.commands import Signals
    from losslab.engine import Population
    from losslab.signals import Recorder, SignalTable
    from losslab.tasks import Task

LOOKS = 60
"""About how often training is looked at."""

COLUMNS = {
    "mean": "mean",
    "std": "std",
    "expected_std": "std in theory",
    "unit_std": "over examples",
    "saturated": "saturated",
    "dead": "dead",
    "jacobian_mean": "Jacobian",
    "gradient": "gradient",
    "expected_gradient": "gradient in theory",
    "gradient_ratio": "gradient / weight",
    "update_ratio": "update / weight",
}


def signals(command: Signals) -> None:
    """Looks, trains and looks again, prints the table, writes the page."""
    from losslab import engine
    from losslab.rules import make
    from losslab.signals import Recorder, drifted, signals
    from losslab.tasks import load_task

    task = _started(load_task(command.task, folder=command.data), command.init)
    begun = time.perf_counter()
    layers, training = command.layers or None, not command.eval_mode
    recorder = Recorder(command.examples, max(1, command.steps // LOOKS), layers, training)

    def trained(steps: int) -> Population:
        return engine.train(
            task,
            make(command.rule, **({} if command.lr is None else {"lr": command.lr})),
            seeds=command.seeds,
            steps=steps,
            batch_size=command.batch_size,
            evaluate=None,
            dtype=command.dtype,
            watch=recorder,
            record=recorder.when,
        )

    def look(population: Population) -> SignalTable:
        return signals(
            population,
            layers=layers,
            examples=command.examples,
            training=training,
            updates=recorder.updates,
        )

    seen = look(trained(0))
    told = list(seen.attention)
    if command.steps:
        first, seen = seen, look(trained(command.steps))
        told = [*seen.attention, *drifted(first.rows, seen.rows, seen.layers)]
    seconds = time.perf_counter() - begun
    console = terminal()
    summary = summarised(seen)
    title = f"{task.name}: {counted(command.seeds, 'member')}, step {command.steps}"
    console.print(printed(summary.rename(columns=COLUMNS), title))
    for note in told:
        console.print(f"• {note}", highlight=False)
    if not told:
        console.print("Nothing needs attention.")
    loss = float(seen.losses.nanmedian())
    console.print(f"loss {loss:.4g} after {command.steps} steps, {seconds:.1f} s", style="dim")
    if command.out is not None:
        _write(command, task.name, seen, recorder, [str(note) for note in told], summary)
        console.print(f"open [bold]{command.out}[/bold]")


def _started(task: Task, told: str | None) -> Task:
    """The task with other initial weights, ``NAME`` or ``NAME:GAIN``."""
    if told is None:
        return task
    from losslab import layers

    kinds = ("lecun", "xavier", "xavier_uniform", "he", "standard", "orthogonal", "gaussian")
    name, colon, number = told.partition(":")
    if name not in kinds:
        raise unknown("initialisation", name, kinds)
    try:
        values = [float(number)] if colon else []
    except ValueError as error:
        raise LosslabError(f"--init got {told!r}: write NAME or NAME:GAIN, for example he:1.4") from error
    if name == "gaussian" and not values:
        raise LosslabError("--init gaussian needs its standard deviation: write gaussian:0.01")
    return task.replace(model=getattr(layers, name)(*values).on(task.model))


def summarised(seen: SignalTable) -> pd.DataFrame:
    """One row a layer: forward, backward and weight side by side; columns without a number are left out."""
    import pandas as pd

    table = seen.table
    parts = {way: rows.set_index("layer") for way, rows in table.groupby("direction", sort=False)}
    told = parts["forward"].drop(columns="direction")
    if "backward" in parts:
        told["gradient"] = parts["backward"]["std"]
        if "expected_std" in parts["backward"]:
            told["expected_gradient"] = parts["backward"]["expected_std"]
    for column in ("gradient_ratio", "update_ratio"):
        if "weight" in parts and column in parts["weight"]:
            told[column] = parts["weight"][column]
    told = told.reset_index()
    shown = [c for c in COLUMNS if c in told and told[c].notna().any()]
    return pd.concat([told[["layer", "kind"]], told[shown].astype(float)], axis=1)


def _write(
    command: Signals,
    name: str,
    seen: SignalTable,
    recorder: Recorder,
    sentences: list[str],
    summary: pd.DataFrame,
) -> None:
    from losslab import provenance
    from losslab.report import write_page
    from losslab.report.signals import draw_signals

    assert command.out is not None
    members = "one network" if command.seeds == 1 else f"{command.seeds} networks"
    start = "as it starts" if command.seeds == 1 else "as they start"
    when = f"after {command.steps} steps of {command.rule}" if command.steps else start
    settings = {k: v for k, v in asdict(command).items() if v not in (None, ()) and k != "out"}
    write_page(
        Path(command.out),
        f"Signals of {name}",
        f"What flows through {members}, {when}: outputs forward, gradients backward, layer by layer.",
        draw_signals(seen, recorder),
        sentences or ["Nothing: no layer saturates, dies or fades."],
        {"Layer by layer, the median over members": summary.rename(columns=COLUMNS)},
        settings | provenance.machine(),
    )
