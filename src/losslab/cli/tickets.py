"""``losslab tickets``: draws lottery tickets on a task of yours, level by level."""

from __future__ import annotations

import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from losslab.cli.terminal import terminal
from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from losslab.cli.commands import Tickets
    from losslab.tickets import Plan


def tickets(command: Tickets) -> None:
    """Runs the lottery, prints a line a level and the comparisons at the end."""
    from losslab.tasks import load_task
    from losslab.tickets import lottery, speed

    if command.resume and command.out is None:
        raise LosslabError("--resume was given without --out: name the folder of the lottery")
    task = load_task(command.task, folder=command.data)
    plan = plan_of(command)
    console = terminal()
    begun = time.perf_counter()

    def told(line: str) -> None:
        console.print(f"• {line}", highlight=False)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = lottery(task, plan, out=command.out, resume=command.resume, told=told)
    for notice in dict.fromkeys(str(w.message) for w in caught):
        print(f"losslab: {notice}", file=sys.stderr)
    import pandas as pd

    rows = pd.concat([found.compare(k) for k in range(1, len(found.levels))])
    console.print(_printed(rows, f"{task.name}: tickets against the others, {found.score.replace('_', ' ')}"))
    assert found.task.train is not None
    try:
        inputs = found.task.train.head(plan.batch_size).all()[0]
        console.print(f"• The last ticket: {speed(found.ticket(plan.levels), inputs).told}.", highlight=False)
    except (LosslabError, KeyError, TypeError, IndexError):
        console.print("• Compaction is for chains of linear layers; this network is none.")
    console.print(f"{time.perf_counter() - begun:.1f} s", style="dim")
    if command.out is not None:
        console.print(f"written to {command.out}: table.csv, curves.csv, a file a level", style="dim")


def plan_of(command: Tickets) -> Plan:
    """The plan that the options describe."""
    from losslab import layers
    from losslab.rules import make
    from losslab.tickets import Plan, Scope

    rewind: Any = int(command.rewind) if command.rewind.lstrip("-").isdigit() else command.rewind
    if command.init is not None and command.init not in (
        "xavier",
        "he",
        "lecun",
        "xavier_uniform",
        "orthogonal",
    ):
        raise LosslabError(
            f"--init is {command.init!r}: pass xavier, xavier_uniform, he, lecun or orthogonal"
        )
    return Plan(
        criterion=command.criterion,
        scope=Scope(
            rate=command.rate,
            output=command.output_rate,
            together=command.scope == "global",
            units=command.scope == "units",
        ),
        levels=command.levels,
        one_shot=command.one_shot,
        rewind=rewind,
        controls=command.controls,
        control_levels=command.control_levels or None,
        replicates=command.replicates,
        init=None if command.init is None else getattr(layers, command.init)(),
        rule=make(command.rule, lr=command.lr),
        steps=command.steps,
        batch_size=command.batch_size,
        evaluate=command.evaluate,
    )


def _printed(table: pd.DataFrame, title: str) -> Table:
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for column in ("level", "left", "against", "n", "difference", "95 %", "faster", "95 %"):
        shown.add_column(column, justify="left" if column == "against" else "right")
    for row in table.itertuples(index=False):
        shown.add_row(
            str(row.level),
            f"{row.remaining:.2%}",
            str(row.opponent),
            str(row.n),
            f"{row.difference:+.4f}",
            f"{row.low:+.4f} … {row.high:+.4f}",
            f"{row.faster:.2f}x",
            f"{row.faster_low:.2f} … {row.faster_high:.2f}",
        )
    return shown
