"""The page of a lottery: of a finished one, of one on its way, and of an instability analysis."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from tests.tickets.planted import looked, planted

from losslab.report.tickets import compared, draw_lottery, leveled, write_instability, write_lottery

ARMS = {(0, "dense"): 0.97}
ARMS |= {
    (k, arm): 0.97 - 0.02 * (arm != "ticket") for k in range(1, 9) for arm in ("ticket", "reinit", "random")
}
TABLE = planted(ARMS, stop={"ticket": 200, "reinit": 800})
TABLE = TABLE[(TABLE.arm != "random") | (TABLE.level == 7)]


def test_what_is_drawn() -> None:
    score, stop, levels, one = draw_lottery(TABLE, looked(TABLE))
    for drawing in (score, stop):
        figure = drawing.figure
        assert [t.name for t in figure.data if t.mode == "lines+markers"] == [
            "tickets", "re-initialised", "random masks",
        ]  # fmt: skip
        left, right = figure.layout.xaxis.range
        assert figure.layout.xaxis.type == "log"
        assert left > math.log10(100) > math.log10(100 * 0.8**8) > right  # from the whole network down
        tickets = next(t for t in figure.data if t.name == "tickets")
        assert len(tickets.x) == 9  # the dense network is the first
    assert stop.figure.layout.yaxis.type == "log"
    assert next(t for t in score.figure.data if t.name == "random masks").error_y.array is not None
    assert levels.figure.data[0].name == "100.0 %"
    assert len(levels.figure.data) == 5
    assert one.figure.layout.title.text == "Validation loss with 21.0 % of the weights"
    assert {t.name for t in one.figure.data} == {"tickets", "re-initialised", "random masks", "dense"}


def test_tables_for_readers() -> None:
    rows = leveled(TABLE, 0.002)
    assert rows[rows.networks == "tickets"].verdict.tolist() == ["winning ticket"] * 8
    assert rows.weights[0] == "266 200"
    told = compared(TABLE)
    assert told[(told.level == 7) & (told.against == "random masks")]["points"].item().startswith("+")
    assert (told[told.against == "re-initialised"]["times as early"] == "4.00").all()


def test_a_page_for_every_state(tmp_path: Path) -> None:
    page = tmp_path / "tickets.html"
    lost = TABLE.assign(test_accuracy=math.nan, diverged=3)
    plain = TABLE[TABLE.arm.isin(["dense", "ticket"])].drop(columns="test_accuracy")
    for table in (TABLE[TABLE.level == 0], TABLE[TABLE.level <= 1], planted(ARMS, n=1), plain, lost, TABLE):
        write_lottery(page, "small", table, looked(table), 0.002, {"steps": 3})
        text = page.read_text("utf-8")
        assert "What was found" in text
        assert "Level by level" in text
    for told in (
        "Winning tickets at 80.0 %",
        "winning ticket</div>",
        "21.0 % of the weights",
        "<dt>steps</dt>",
    ):
        assert told in text


def test_the_page_of_an_instability_analysis(tmp_path: Path) -> None:
    rows = [
        {
            "k": k,
            "replicate": i,
            "measure": m,
            "instability": height,
            "where": 0.5,
            "first": 0.1,
            "second": 0.1,
        }
        | {"stable": m == "error" and height < 0.02}
        for k, height in ((0, 0.3), (100, 0.001))
        for m in ("error", "loss")
        for i in range(3)
    ]
    found = pd.DataFrame(rows)
    write_instability(tmp_path / "a.html", "small", found, {})
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "Stable from step 100, where every pair" in text
    write_instability(tmp_path / "a.html", "small", found[found.measure == "loss"], {})
    assert "no accuracy" in (tmp_path / "a.html").read_text("utf-8")
