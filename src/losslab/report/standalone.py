"""One self-contained page for one instrument: sentences, figures, a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from losslab.files import write_atomically
from losslab.lecture import numbers
from losslab.lecture.claim import Drawing
from losslab.report.parts import embed, environment, shell

if TYPE_CHECKING:
    import pandas as pd


def write_page(
    path: Path,
    title: str,
    lead: str,
    drawings: Sequence[Drawing],
    sentences: Sequence[str] = (),
    tables: Mapping[str, pd.DataFrame] | None = None,
    facts: Mapping[str, object] | None = None,
    heading: str = "What needs attention",
) -> None:
    """Writes a page that needs no network, in the report's style.

    Args:
        path: The file; it is replaced in one piece.
        title: A few words.
        lead: One sentence below the title.
        drawings: Figures with their captions.
        sentences: What to know first, one paragraph each.
        tables: Caption -> table; numbers are written for readers, NaN is left empty.
        facts: What is told at the end: settings, versions.
        heading: Above the sentences.

    Raises:
        LosslabError: The file cannot be written.
    """
    page = (
        environment()
        .get_template("standalone.html.jinja")
        .render(
            title=title,
            lead=lead,
            heading=heading,
            sentences=list(sentences),
            drawings=[embed(drawing) for drawing in drawings],
            tables={caption: _cells(table) for caption, table in (tables or {}).items()},
            facts={name: str(value) for name, value in (facts or {}).items()},
            **shell(),
        )
    )
    write_atomically(path, page.encode())


def _cells(table: pd.DataFrame) -> Mapping[str, object]:
    rows = [[_written(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return {"columns": [str(column).replace("_", " ") for column in table.columns], "rows": rows}


def _written(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else numbers.number(value)
