"""``losslab lecture``: the claims, one after another, and the report as they finish."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from losslab.cli.terminal import terminal

if TYPE_CHECKING:
    from losslab.cli.commands import Lecture
    from losslab.lecture import Event, Result

STYLES = {"holds": "green", "does not hold": "red", "mixed": "yellow", "undecided": "cyan"}


def lecture(command: Lecture) -> None:
    """Runs the claims asked for; prints each verdict as it comes and the table at the end."""
    import time

    from losslab.lecture import Lab, run, select
    from losslab.report import publisher

    console = terminal()
    claims = select(command.claim, command.section)
    lab = Lab(profile=command.profile, seeds=command.seeds, data=command.data)
    if command.resume and not (command.out / "claims.json").exists():
        console.print(f"[dim]{command.out} holds no run to resume: a new one begins[/dim]")
    begun = time.perf_counter()
    with console.status("") as status:

        def told(event: Event) -> None:
            if event.kind == "start" and event.claim is not None:
                status.update(f"{event.claim.id}  {event.claim.title}")
            elif event.result is not None:
                console.print(_line(event.result, event.kind))
            else:
                console.print(f"[dim]{event.text}[/dim]")

        results = run(claims, lab, command.out, command.resume, publisher(claims), told)
    console.print(_table(results))
    seconds = time.perf_counter() - begun
    console.print(f"{len(results)} claims, {seconds:.0f} s: open [bold]{command.out / 'report.html'}[/bold]")


def _line(result: Result, kind: str) -> str:
    claim = result.claim
    if result.status == "failed":
        return f"[bold red]{claim.id:>4}  failed[/]  {claim.title}: {result.error}"
    style = STYLES.get(str(result.verdict), "white")
    kept = "  [dim](kept)[/dim]" if kind == "kept" else f"  [dim]{result.seconds:.1f} s[/dim]"
    return f"[bold]{claim.id:>4}[/]  [{style}]{result.verdict!s:<13}[/]  {claim.title}{kept}"


def _table(results: list[Result]) -> Table:
    table = Table("claim", "section", "verdict", "estimate", "n", "what the notes say", title_justify="left")
    for result in results:
        verdict = "failed" if result.status == "failed" else str(result.verdict)
        headline = result.findings[0] if result.findings else None
        table.add_row(
            result.claim.id,
            result.claim.section,
            f"[{STYLES.get(verdict, 'red')}]{verdict}[/]",
            "" if headline is None else f"{headline.estimate:.4g}",
            "" if headline is None else str(headline.n),
            result.claim.title,
        )
    return table
