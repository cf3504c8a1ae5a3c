"""Tables in the terminal: whole at every width."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from rich.console import Console

from losslab.cli import terminal
from losslab.cli.terminal import printed

FRAME = pd.DataFrame(
    {
        "layer": ["encoder.0.weight", "encoder.0.bias"],
        "largest_eigenvalue": [8.3451234e-05, -2.8752e-06],
        "its_error": [3.1e-08, float("nan")],
        "trace": [-0.00074612, 1234.567],
        "low": [0.1, 0.2],
        "examples": [64, 8],
        "settled": ["yes", "unclear"],
    }
)
CELLS = {
    "8.345e-05",
    "-2.875e-06",
    "3.1e-08",
    "-0.0007461",
    "1235",
    "0.1",
    "0.2",
    "64",
    "8",
    "yes",
    "unclear",
}
HEADINGS = {"largest", "eigenvalue", "its", "error", "trace", "low", "examples", "settled"}
TASKS = ""


def shown(monkeypatch: pytest.MonkeyPatch, width: int, keys: int | None = None) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    monkeypatch.setattr(terminal, "terminal", lambda: console)
    console.print(printed(FRAME, "What was measured", keys))
    return console.export_text()


@pytest.mark.parametrize("width", [40, 50, 60, 70, 80, 100, 140])
def test_no_number_and_no_heading_is_cut(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    text = shown(monkeypatch, width)
    assert "…" not in text
    assert set(text.split()) >= CELLS | HEADINGS
    assert max(map(len, text.splitlines())) <= width
    assert text.count("What was measured") == 1


def test_parts_repeat_what_tells_the_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 140).count("encoder.0.bias") == 1
    narrow = shown(monkeypatch, 50)
    assert narrow.count("encoder.0.bias") == narrow.count("layer") > 1
    assert shown(monkeypatch, 50, keys=0).count("encoder.0.bias") == 1
