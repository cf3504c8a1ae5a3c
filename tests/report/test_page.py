"""The page: complete, self-contained, escaped, cheap to rewrite, and drawn by a browser without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from losslab.errors import LosslabError
from losslab.lecture import figures
from losslab.lecture.claim import Claim, Drawing, Lab, Tables, no_figures
from losslab.lecture.errata import ERRATA
from losslab.lecture.runner import run
from losslab.lecture.verdicts import bound
from losslab.report import publisher, write_report
from losslab.report.parts import typeset

VALUES = {"C8": 2.0, "C9": 0.5, "C10": float("nan")}


def draw(tables: Tables) -> list[Drawing]:
    drawn = figures.figure("Loss </script> & more", "step", "loss", log_y=True)
    figures.lines(drawn, tables["curve"], "step", "loss")
    return [Drawing(drawn, "A falling curve.")]


def toy(name: str, figures: Callable[[Tables], list[Drawing]] = draw, statement: str = "It falls.") -> Claim:
    def experiment(lab: Lab) -> Tables:
        if name not in VALUES:
            raise RuntimeError("no <labels>")
        step = np.arange(1, 10_001)
        return {
            "curve": pd.DataFrame({"step": step, "loss": 1 / step}),
            "value": pd.DataFrame({"x": [VALUES[name]]}),
        }

    def judge(tables: Tables) -> list:
        value = float(tables["value"]["x"].iloc[0])
        return [
            bound("speed-up", value, (value, value + 1), 12, "ratio of medians", at_least=1.7, note="why so"),
            bound("control", 0.1, (0.0, 0.2), 9, "share", at_most=0.3),
        ]

    return Claim(
        name,
        "6.3",
        f"Title of {name}",
        statement,
        "Notes §6.3",
        experiment,
        judge,
        figures=figures,
        caveats=("Only on digits.",),
        errata=("E7",) if name == "C8" else (),
    )


@pytest.fixture
def claims() -> list[Claim]:
    return [toy("C8"), toy("C9"), toy("C10")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("lecture")
    asked = [toy(name) for name in ("C8", "C9", "C10", "C11")]
    run(asked, Lab(), out, publish=publisher([*asked, toy("C12")]))
    return (out / "report.html").read_text("utf-8")


class Rows(HTMLParser):
    """The text of each row of the verdict table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[str] = []
        self.open = False
        self.feed(page[page.index('<table class="stack verdicts">') : page.index("</table>")])

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, text: str) -> None:
        if self.rows:
            self.rows[-1] += " " + text.strip() if text.strip() else ""


def test_the_page_opens_with_every_verdict_in_the_order_of_the_notes(page: str) -> None:
    header, *rows = Rows(page).rows
    assert header.split() == ["Claim", "Statement", "Verdict", "Estimate", "n", "Test", "Time"]
    expected = [
        ["C8", "It falls.", "holds", "2 [2, 3]", "12", "≥ 1.7"],
        ["C9", "mixed", "0.5 [0.5, 1.5]", "first of 2 findings"],
        ["C10", "undecided", "–"],
        ["C11", "failed to run", "RuntimeError: no <labels>"],
        ["C12", "not run yet"],
    ]
    assert len(rows) == len(expected)
    for row, parts in zip(rows, expected, strict=True):
        for part in parts:
            assert part in row
    assert page.index("C8") < page.index('<section class="claim" id="C8"')


def test_counts_give_every_outcome_the_same_line(page: str) -> None:
    counts = re.findall(r'<li class="(\w+)"><strong>(\d+)</strong>', page)
    assert counts == [("holds", "1"), ("mixed", "1"), ("undecided", "1"), ("failed", "1"), ("pending", "1")]


def test_each_row_leads_to_a_section(page: str) -> None:
    targets = set(re.findall(r'<a href="#([^"]+)">', page))
    assert targets == {"C8", "C9", "C10", "C11", "verdicts"}
    for target in targets:
        assert page.count(f'id="{target}"') == 1


def test_a_section_says_how_it_was_tested_and_what_limits_it(page: str) -> None:
    section = page[page.index('id="C8"') : page.index('id="C9"')]
    for part in ("Notes §6.3", "speed-up", "why so", "control", "≥ 1.7", "≤ 0.3", "ratio of medians"):
        assert part in section
    for part in ("Only on digits.", "A falling curve.", "quick profile"):
        assert part in section
    assert str(typeset(ERRATA["E7"].printed)) in section
    assert str(typeset(ERRATA["E7"].correct)) in section
    assert "Erratum" not in page[page.index('id="C9"') : page.index('id="C10"')]
    assert "no &lt;labels&gt;" in page[page.index('id="C11"') :]


def test_the_page_needs_no_network(page: str) -> None:
    without_library = re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)
    assert len(without_library) < len(page) / 10
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:|//)""", without_library)
    assert "default-src 'none'" in page
    assert page.count("plotly.js v") == 1


def test_figures_are_thinned_json_without_a_template(page: str) -> None:
    scripts = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    assert len(scripts) == 3
    figure = json.loads(scripts[0])
    assert not figure["layout"]["template"]
    assert not figure["layout"]["title"]
    assert len(scripts[0]) < 5000 * 16 * 1.5
    templates = json.loads(re.search(r'id="templates"[^>]*>(.*?)</script>', page, flags=re.DOTALL)[1])  # type: ignore[index]
    assert templates["light"]["layout"]["font"]["color"] != templates["dark"]["layout"]["font"]["color"]


def test_text_of_claims_is_escaped(tmp_path: Path) -> None:
    results = run([toy("C8", statement="<img src=x onerror=alert(1)> & x_t")], Lab(), tmp_path)
    write_report(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<img" not in page.replace("plotly", "")[: page.index("<script>/**")]
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; x<sub>t</sub>" in page
    assert "Loss &lt;/script&gt; &amp; more" in page


def test_a_page_says_where_a_profile_has_no_settings_of_its_own(tmp_path: Path) -> None:
    found = run([toy("C8"), replace(toy("C9"), paper=True)], Lab("paper"), tmp_path)
    write_report(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    first, second = page[page.index('id="C8"') :].split('id="C9"')
    assert "paper profile, which has no settings of its own here: the full ones" in first
    assert "paper profile ·" in second


def test_a_figure_that_raises_spoils_nothing_else(tmp_path: Path) -> None:
    def broken(tables: Tables) -> list[Drawing]:
        raise KeyError("absent")

    run([toy("C8", broken), toy("C9")], Lab(), tmp_path, publish=publisher([]))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "The figures could not be drawn" in page
    assert "KeyError" in page
    assert page.count('<div class="plot"') == 1


def test_a_growing_page_draws_each_claim_once(tmp_path: Path) -> None:
    drawn: list[float] = []

    def counted(tables: Tables) -> list[Drawing]:
        drawn.append(float(tables["value"]["x"].iloc[0]))
        return draw(tables)

    claims = [toy("C8", counted), toy("C9", counted)]
    run(claims, Lab(), tmp_path, publish=publisher(claims))
    assert drawn == [2.0, 0.5]


def test_a_resumed_run_draws_the_same_page(tmp_path: Path, claims: list[Claim]) -> None:
    run(claims, Lab(), tmp_path, publish=publisher(claims))
    first = (tmp_path / "report.html").read_text("utf-8")
    run(claims, Lab(), tmp_path, resume=True, publish=publisher(claims))
    assert (tmp_path / "report.html").read_text("utf-8") == first


def test_a_page_without_results_is_a_page(tmp_path: Path) -> None:
    write_report([], tmp_path / "report.html", pending=[toy("C8", no_figures)])
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "0 of 1 claims" in page
    assert page.rstrip().endswith("</html>")


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LosslabError, match="cannot write"):
        write_report([], tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("x_t", "x<sub>t</sub>"),
        ("c_{i,0} < 1", "c<sub>i,0</sub> &lt; 1"),
        ("(1 − ηλ_i)^t", "(1 − ηλ<sub>i</sub>)<sup>t</sup>"),
        ("λ_i^2", "λ<sub>i</sub><sup>2</sup>"),
        ("t^(−1/2)", "t<sup>−1/2</sup>"),
        ("step_size and lr_decay", "step_size and lr_decay"),
    ],
)
def test_typeset(text: str, html: str) -> None:
    assert str(typeset(text)) == html


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


PROBE = """<script>setTimeout(() => {
  const fits = document.documentElement.scrollWidth <= innerWidth;
  const figures = document.querySelectorAll(".js-plotly-plot").length;
  document.title = `${figures} figures, ${fits ? "fits" : "too wide"}`;
}, 1500)</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_a_browser_draws_the_figures_and_a_narrow_page_does_not_scroll_sideways(
    tmp_path: Path, page: str
) -> None:
    (tmp_path / "probe.html").write_text(page.replace("</body>", PROBE), "utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-quic --disable-sync "
    options += "--disable-background-networking --disable-component-update --enable-logging=stderr "
    options += f"--user-data-dir={tmp_path / 'profile'} --window-size=500,9000 --virtual-time-budget=4000"
    command = [str(CHROMIUM), *options.split(), "--dump-dom", (tmp_path / "probe.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>3 figures, fits</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
