"""``losslab tickets``: draws lottery tickets on a task of yours, level by level."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from losslab.cli.terminal import terminal
from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from losslab.cli.commands import Tickets
    from losslab.layers import Initialisation
    from losslab.tasks import Task
    from losslab.tickets import Lottery, Plan

PAGE = "tickets.html"
LOTTERY = {"levels", "rate", "scope", "criterion", "rewind", "controls", "evaluate"}
"""Settings that instability of new networks does not have."""

INITIAL = ("xavier", "xavier_uniform", "he", "lecun", "orthogonal")


def tickets(command: Tickets) -> None:
    """Runs the lottery: a line a level, the comparisons and the sentences at the end, a page on the way."""
    from losslab.tasks import load_task
    from losslab.tickets import lottery

    if command.resume and command.out is None:
        raise LosslabError("--resume was given without --out: name the folder of the lottery")
    task = load_task(command.task, folder=command.data)
    if command.instability:
        _instability(command, task)
        return
    if command.ticket is not None:
        raise LosslabError("--ticket names the level that --instability is of: pass both")
    plan = plan_of(command, task)
    console = terminal()
    begun = time.perf_counter()
    before = 0 if command.out is None else len(list(command.out.glob("level-*.safetensors")))

    drawn: list[Lottery] = []

    def watch(found: Lottery) -> None:
        drawn[:] = [found]
        console.print(f"• {found.line(len(found.levels) - 1)}", highlight=False)
        if command.out is not None and (len(found.levels) > before or len(found.levels) > plan.levels):
            _write(command, found)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        how: dict[str, Any] = {"out": command.out, "resume": command.resume, "execution": command.execution}
        try:
            found = lottery(task, plan, watch=watch, **how)
        except LosslabError:
            if drawn and len(drawn[0].levels) > 1:  # what has been found is told first
                _tell(drawn[0])
            raise
        finally:
            for notice in dict.fromkeys(str(w.message) for w in caught):
                print(f"losslab: {notice}", file=sys.stderr)
    _tell(found)
    console.print(f"{time.perf_counter() - begun:.1f} s", style="dim")
    if command.out is not None:
        console.print(f"written to {command.out}: table.csv, curves.csv, a file a level", style="dim")
        console.print(f"open [bold]{command.out / PAGE}[/bold]")


def _tell(found: Lottery) -> None:
    """Prints the comparisons and the sentences."""
    import pandas as pd

    from losslab.tickets import comparing

    console = terminal()
    rows = pd.concat([found.compare(k) for k in comparing.levels_of(found.table)])
    console.print(
        _printed(rows, f"{found.task.name}: tickets against the others, {found.score.replace('_', ' ')}")
    )
    for sentence in [*found.sentences(), _compaction(found)]:
        console.print(f"• {sentence}", highlight=False)


def _compaction(found: Lottery) -> str:
    """Whether the last ticket is faster without its dead parts."""
    from losslab.tickets import speed

    assert found.task.train is not None
    try:
        inputs = found.task.train.head(found.plan.batch_size).all()[0]
        return f"The last ticket: {speed(found.ticket(len(found.levels) - 1), inputs).told}."
    except (LosslabError, KeyError, TypeError, IndexError):
        return "Compaction is for chains of linear layers; this network is none."


def _write(command: Tickets, found: Lottery) -> None:
    from losslab import provenance
    from losslab.report.tickets import write_lottery

    assert command.out is not None
    write_lottery(
        command.out / PAGE,
        found.task.name,
        found.table,
        found.curves,
        found.plan.tolerance,
        _settings(command) | provenance.machine(),
    )


def _settings(command: Tickets) -> dict[str, object]:
    return {k: v for k, v in asdict(command).items() if v not in (None, (), False) and k != "out"}


def _instability(command: Tickets, task: Task) -> None:
    """Runs that part at given steps: how high the barrier between them is."""
    from losslab.tickets import stability_sentences, stability_summary

    if command.resume:
        raise LosslabError("--instability has no levels to resume: leave out --resume")
    begun = time.perf_counter()
    found, whose = _parted(command, task)
    shown, told = stability_summary(found), stability_sentences(found)
    console = terminal()
    console.print(_plain(shown, f"{whose}: barriers between runs that part at step k"))
    for sentence in told:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"{time.perf_counter() - begun:.1f} s", style="dim")
    if command.out is not None:
        from losslab import provenance
        from losslab.files import write_atomically
        from losslab.report.tickets import write_instability

        name = "instability" if command.ticket is None else f"instability-{command.ticket:02d}"
        write_atomically(command.out / f"{name}.csv", found.to_csv(index=False).encode())
        page = command.out / f"{name}.html"
        left = LOTTERY if command.ticket is None else ()
        settings = {k: v for k, v in _settings(command).items() if k not in left}
        write_instability(page, whose, found, settings | provenance.machine())
        console.print(f"open [bold]{page}[/bold]")


def _parted(command: Tickets, task: Task) -> tuple[pd.DataFrame, str]:
    """The barriers, of new networks or of a lottery's tickets, and whose they are."""
    from losslab.rules import make
    from losslab.tickets import instability, reopened

    if command.ticket is not None:
        if command.out is None:
            raise LosslabError("--ticket was given without --out: name the folder of the lottery")
        drawn = reopened(task, plan_of(command, task), command.out)
        found = drawn.instability(command.ticket, command.instability, execution=command.execution)
        left = drawn.outcome(command.ticket).rows[0]["remaining"]
        return found, f"{task.name}, tickets of level {command.ticket} with {left:.2%} of the weights"
    found = instability(
        task.replace(model=_initialisation(command.init).on(task.model)) if command.init else task,
        make(command.rule, lr=command.lr),
        at=command.instability,
        steps=command.steps,
        replicates=command.replicates,
        batch_size=command.batch_size,
        execution=command.execution,
    )
    return found, task.name


def plan_of(command: Tickets, task: Task) -> Plan:
    """The plan that the options describe."""
    from losslab.rules import make
    from losslab.tasks import build
    from losslab.tickets import Plan, Scope, prunable

    rewind: Any = int(command.rewind) if command.rewind.lstrip("-").isdigit() else command.rewind
    rates = {}
    if command.conv_rate is not None:
        module = build(task)
        rates = {n: command.conv_rate for n in prunable(module).sizes if module.get_parameter(n).dim() > 2}
        if not rates:
            raise LosslabError(f"--conv-rate was given and {task.name} has no convolutions: leave it out")
    return Plan(
        criterion=command.criterion,
        scope=Scope(
            rate=command.rate,
            output=command.output_rate,
            rates=rates,
            together=command.scope == "global",
            units=command.scope == "units",
        ),
        levels=command.levels,
        one_shot=command.one_shot,
        rewind=rewind,
        controls=command.controls,
        control_levels=command.control_levels or None,
        replicates=command.replicates,
        init=None if command.init is None else _initialisation(command.init),
        rule=make(command.rule, lr=command.lr),
        steps=command.steps,
        batch_size=command.batch_size,
        evaluate=command.evaluate,
    )


def _initialisation(name: str) -> Initialisation:
    from losslab import layers
    from losslab.errors import unknown

    if name not in INITIAL:
        raise unknown("--init", name, INITIAL)
    return getattr(layers, name)()


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


def _plain(table: pd.DataFrame, title: str) -> Table:
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for column in table.columns:
        shown.add_column(str(column).replace("_", " "), justify="right")
    for row in table.itertuples(index=False, name=None):
        shown.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row))
    return shown
