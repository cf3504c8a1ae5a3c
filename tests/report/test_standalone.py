"""The page of a single instrument: self-contained, escaped, and complete without a figure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from losslab.errors import LosslabError
from losslab.lecture.claim import Drawing
from losslab.lecture.figures import figure, lines
from losslab.report import write_page


def test_everything_is_there_and_escaped(tmp_path: Path) -> None:
    table = pd.DataFrame({"layer": ["a</b>", "c"], "mean_size": [1.5, float("nan")], "count": [3, 4]})
    drawn = figure("Growth </script>", "x", "y")
    lines(drawn, table, "layer", "count")
    write_page(
        tmp_path / "page.html",
        "Signals <of> all",
        "What x_t does.",
        [Drawing(drawn, "A caption.")],
        ["Look & see."],
        {"Numbers": table},
        {"torch": "2.x"},
    )
    page = (tmp_path / "page.html").read_text("utf-8")
    for told in (
        "<h1>Signals &lt;of&gt; all</h1>",
        "What x<sub>t</sub> does.",
        "Look &amp; see.",
        "A caption.",
        "<caption>Numbers</caption>",
        '<th scope="row">a&lt;/b&gt;</th>',
        '<td data-label="mean size"><div>1.5</div></td>',
        '<td data-label="mean size"></td>',
        "<dt>torch</dt><dd>2.x</dd>",
        "<h3>Growth &lt;/script&gt;</h3>",
        'addEventListener("beforeprint"',
    ):
        assert told in page
    assert "Growth </script>" not in page


def test_without_figures_tables_or_facts(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "Empty", "Nothing.", [])
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "Provenance" not in page
    assert "What needs attention" not in page
    with pytest.raises(LosslabError):
        write_page(tmp_path / "page.html" / "below", "Empty", "Nothing.", [])
