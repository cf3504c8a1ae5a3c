"""What every page is made of: templates, figures as JSON, and text with indices."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from losslab.lecture import numbers
from losslab.lecture.claim import Drawing
from losslab.lecture.figures import template, thin

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent

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


def embed(drawing: Drawing) -> Mapping[str, object]:
    """A figure as what the page needs of it; the figure loses its title and its template."""
    figure = thin(drawing.figure)
    title = figure.layout.title.text or ""
    figure.update_layout(template=None, title=None)  # the page has the title as text and the template once
    height = figure.layout.height or 380
    return {
        "title": title,
        "caption": drawing.caption,
        "height": height,
        "json": script_json(figure),
    }


def script_json(content: object) -> str:
    """JSON that is safe inside a script element."""
    import plotly.io

    if isinstance(content, dict):
        text = json.dumps({name: value.to_plotly_json() for name, value in content.items()})
    else:
        text = plotly.io.to_json(content, validate=False)
    return text.replace("<", "\\u003c")


def shell() -> dict[str, str]:
    """What the frame of every page is filled with: styles, scripts, the figures' templates."""
    return {
        "templates": script_json({"light": template(), "dark": template(dark=True)}),
        "css": (HERE / "report.css").read_text("utf-8"),
        "js": (HERE / "report.js").read_text("utf-8"),
        "plotly": _plotly(),
    }


@cache
def environment() -> Environment:
    """The templates beside this file; what is missing raises."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": numbers.number, "duration": numbers.duration, "typeset": typeset}
    made.globals["interval"] = numbers.interval
    return made


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
