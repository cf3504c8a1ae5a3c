"""Renders results to report.html."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from losslab.files import write_atomically
from losslab.lecture.claim import Claim, Result, Verdict
from losslab.lecture.errata import ERRATA
from losslab.lecture.registry import natural
from losslab.lecture.runner import REPORT
from losslab.report.parts import embed, environment, shell

if TYPE_CHECKING:
    from jinja2 import Environment

Fragments = MutableMapping[tuple[str, str, float], str]
"""Rendered sections, by the claim's id, status and seconds."""


class Badge(NamedTuple):
    """How an outcome looks: its CSS class, its sign and its words."""

    style: str
    sign: str
    words: str


BADGES = {
    Verdict.HOLDS: Badge("holds", "✓", "holds"),
    Verdict.MIXED: Badge("mixed", "◐", "mixed"),
    Verdict.FAILS: Badge("fails", "✗", "does not hold"),
    Verdict.UNDECIDED: Badge("undecided", "?", "undecided"),
}
FAILED = Badge("failed", "!", "failed to run")
PENDING = Badge("pending", "…", "not run yet")


def write_report(
    results: Sequence[Result],
    path: Path,
    pending: Iterable[Claim] = (),
    fragments: Fragments | None = None,
) -> None:
    """Write one self-contained page: the verdict table, then a section for each result.

    Args:
        results: What is done, failed ones included.
        path: The file; it is replaced in one piece.
        pending: Claims that have not run yet; the table lists them as such.
        fragments: Where to keep rendered sections between calls, so that a page which grows by one claim
            costs the rendering of one claim.

    Raises:
        LosslabError: The file cannot be written.
    """
    fragments = {} if fragments is None else fragments
    for result in results:
        key = _key(result)
        if key not in fragments:
            fragments[key] = _section(result)
    rows: list[Result | Claim] = sorted([*results, *pending], key=lambda row: natural(_claim(row).id))
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            rows=rows,
            results=results,
            sections=[fragments[_key(row)] for row in rows if isinstance(row, Result)],
            counts=_counts(rows),
            provenance=_provenance(results),
            **shell(),
        )
    )
    write_atomically(path, page.encode())


def publisher(claims: Sequence[Claim]) -> Callable[[list[Result], Path], None]:
    """The callback for `losslab.lecture.run` that keeps ``out/report.html`` up to date.

    Args:
        claims: What was asked for; those without a result are listed as not run yet.
    """
    fragments: Fragments = {}

    def publish(results: list[Result], out: Path) -> None:
        done = {result.claim.id for result in results}
        pending = [claim for claim in claims if claim.id not in done]
        write_report(results, out / REPORT, pending, fragments)

    return publish


def badge(row: Result | Claim) -> Badge:
    """How the outcome of a result, or of a claim that has none yet, looks."""
    if isinstance(row, Claim):
        return PENDING
    return FAILED if row.verdict is None else BADGES[row.verdict]


def _counts(rows: Iterable[Result | Claim]) -> dict[Badge, int]:
    counts = Counter(badge(row) for row in rows)
    return {kind: counts[kind] for kind in (*BADGES.values(), FAILED, PENDING) if counts[kind]}


def _claim(row: Result | Claim) -> Claim:
    return row if isinstance(row, Claim) else row.claim


def _key(result: Result) -> tuple[str, str, float]:
    return result.claim.id, result.status, result.seconds


def _section(result: Result) -> str:
    drawings, trouble = _drawings(result)
    return (
        _environment()
        .get_template("claim.html.jinja")
        .render(
            result=result,
            claim=result.claim,
            errata=[ERRATA[name] for name in result.claim.errata],
            drawings=drawings,
            trouble=trouble,
        )
    )


def _drawings(result: Result) -> tuple[list[Mapping[str, object]], str]:
    """The figures as what the page needs of them, and why there are none if drawing raised."""
    if result.verdict is None:
        return [], ""
    try:
        return [embed(drawing) for drawing in result.claim.figures(result.tables)], ""
    except Exception as error:  # the numbers stand without their picture, and the page says what went wrong
        return [], f"{type(error).__name__}: {error}"


def _provenance(results: Sequence[Result]) -> dict[str, str]:
    """Each setting with the values it had in this run; usually one."""
    seen: dict[str, list[str]] = {}
    for result in results:
        for name, value in result.provenance.items():
            values = seen.setdefault(name, [])
            if value is not None and str(value) not in values:
                values.append(str(value))
    if "started" in seen:
        seen["started"] = [min(seen["started"])]
    return {name: ", ".join(values) for name, values in seen.items() if values}


@cache
def _environment() -> Environment:
    made = environment().overlay()
    made.filters = {
        **made.filters,
        "badge": badge,
        "claim": _claim,
        "verdict_badge": BADGES.__getitem__,
    }
    return made
