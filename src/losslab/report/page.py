"""Renders results to report.html."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup, escape

from losslab.files import write_atomically
from losslab.lecture import numbers
from losslab.lecture.claim import Claim, Drawing, Result, Verdict
from losslab.lecture.errata import ERRATA
from losslab.lecture.figures import template, thin
from losslab.lecture.registry import natural
from losslab.lecture.runner import REPORT

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent

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
            templates=_script_json({"light": template(), "dark": template(dark=True)}),
            css=(HERE / "report.css").read_text("utf-8"),
            js=(HERE / "report.js").read_text("utf-8"),
            plotly=_plotly(),
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


_INDEX = re.compile(r"((?:(?<![^\W\d_])[A-Za-z]|[Α-Ωα-ω])\u0302?|\))_(\{[^{}]+\}|[^\W_]+)")
_EXPONENT = re.compile(r"\^(\{[^{}]+\}|\([^()]+\)|[^\W_]+)")


def typeset(text: str) -> Markup:
    """Plain text as HTML in which ``x_t``, ``c_{i,0}`` and ``β^t`` have their indices and exponents raised.

    Only a single or Greek letter, or a bracket, takes an index: names such as ``step_size`` stay as they are.

    Example:
        >>> print(typeset("x_{t+1} < λ_i^2 for step_size"))
        x<sub>t+1</sub> &lt; λ<sub>i</sub><sup>2</sup> for step_size
    """
    marked = _INDEX.sub(lambda found: f"{found[1]}<sub>{found[2].strip('{}')}</sub>", escape(text))
    return Markup(_EXPONENT.sub(lambda found: f"<sup>{found[1].strip('{}()')}</sup>", marked))


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
        return [_embed(drawing) for drawing in result.claim.figures(result.tables)], ""
    except Exception as error:  # the numbers stand without their picture, and the page says what went wrong
        return [], f"{type(error).__name__}: {error}"


def _embed(drawing: Drawing) -> Mapping[str, object]:
    figure = thin(drawing.figure)
    title = figure.layout.title.text or ""
    figure.update_layout(template=None, title=None)  # the page has the title as text and the template once
    height = figure.layout.height or 380
    return {
        "title": title,
        "caption": drawing.caption,
        "height": height,
        "json": _script_json(figure),
    }


def _script_json(content: object) -> str:
    """JSON that is safe inside a script element."""
    import plotly.io

    if isinstance(content, dict):
        text = json.dumps({name: value.to_plotly_json() for name, value in content.items()})
    else:
        text = plotly.io.to_json(content, validate=False)
    return text.replace("<", "\\u003c")


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
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": numbers.number,
        "duration": numbers.duration,
        "badge": badge,
        "typeset": typeset,
        "claim": _claim,
        "verdict_badge": BADGES.__getitem__,
    }
    environment.globals["interval"] = numbers.interval
    return environment


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
