"""The page docs/tickets.md: how statements are judged, and what stands on it."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tests.tickets.planted import planted

PLAN = {
    "replicates": 5, "steps": 50_000, "controls": ["reinit"], "control_levels": [3, 7], "tolerance": 0.002,
    "rule": {"rule": "adam", "lr": 0.0012}, "scope": {"rate": 0.2, "output": None}, "examples": 55_000,
    "init": "xavier()", "batch_size": 60, "evaluate": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def room() -> ModuleType:
    path = Path(__file__).parents[1] / "docs" / "tickets.py"
    spec = importlib.util.spec_from_file_location("docs_tickets", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    ("ends", "stated", "at_least", "word"),
    [
        ((30, 45), 38, False, "agrees"),
        ((10, 30), 38, False, "agrees in direction, **smaller** here"),
        ((40, 50), 38, False, "agrees in direction, **larger** here"),
        ((-5, 45), 38, False, "open: the interval holds no effect"),
        ((-9, -1), 38, False, "**disagrees**"),
        ((0.31, 0.5), 0.3, True, "agrees"),
        ((0.1, 0.5), 0.3, True, "agrees in direction, its size is open"),
        ((0.1, 0.2), 0.3, True, "agrees in direction, **smaller** here"),
        ((0.1, 0.2), None, False, "agrees"),
        ((math.nan, math.nan), 38, False, "open: no interval"),
    ],
)
def test_statements_are_judged(
    ends: tuple[float, float], stated: float | None, at_least: bool, word: str, room: ModuleType
) -> None:
    here = room.Estimate(0.0 if math.isnan(ends[0]) else sum(ends) / 2, *ends)
    assert room.judged(here, 0, stated, at_least) == word


def folder_of(path: Path, levels: int) -> Path:
    arms = {(0, "dense"): 0.975}
    arms |= {(k, "ticket"): 0.98 for k in range(1, levels + 1)}
    arms |= {(k, "reinit"): 0.97 for k in (3, 7) if k <= levels}
    table = planted(arms, stop={"dense": 10_000, "ticket": 6000, "reinit": 15_000})
    path.mkdir()
    table.to_csv(path / "table.csv", index=False)
    table[["level", "arm", "replicate"]].assign(step=0, validation_loss=1.0).to_csv(path / "curves.csv")
    (path / "plan.json").write_text(json.dumps(PLAN))
    return path


def test_the_page(tmp_path: Path, room: ModuleType) -> None:
    told = room.page(room.Found.read(folder_of(tmp_path / "all", 15)))
    for line in (
        "| 38 | 40.00 (40.00 to 40.00) | agrees in direction, **larger** here |",
        "| 2.51 | 2.50 (2.50 to 2.50) | agrees in direction, **smaller** here |",
        "P_m is **not** the paper's at levels 3, 7, 9, 15.",  # the planted output layer loses 20 % too
        "losslab tickets mnist --levels 15 --replicates 5 --controls reinit --control-levels 3 7",
        "| 7 | 55,826 | 20.97 | 21.1 |",
        "least mean of a level, % | 100.00 | agrees |",
        "| more than 0.3 | 0.",
    ):
        assert line in told
    assert "not drawn" not in told
    assert "Conv-2" not in told
    few = room.Found.read(folder_of(tmp_path / "short", 2))
    assert room.page(few).count("not drawn") == 4
    own, _, conv = room.page(room.Found.read(tmp_path / "all"), few).partition("## Conv-2")
    assert own.strip() == told.strip()
    assert "| 64.00 | 97.91 (97.80 to 98.03) | 6,000" in conv  # without the paper's shares, which are LeNet's
    assert "images averaged to 16×16 pixels" in conv


def test_the_paper_s_shares_are_recognised(room: ModuleType) -> None:
    from losslab.tasks import lenet_300_100
    from losslab.tickets import Scope, prunable

    shares = Scope().shares(prunable(lenet_300_100()()), 15)
    table = planted({(k, "ticket"): 0.9 for k in (3, 7, 9, 15)}, n=1)
    table["remaining"] = table.level.map(dict(enumerate(shares)))
    assert "is the paper's at levels 3, 7, 9, 15, digit by digit" in room._shares(
        room.Found(table, table, PLAN)
    )


def test_a_folder_that_is_no_lottery_s(tmp_path: Path, room: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"holds no table\.csv"):
        room.main([str(tmp_path)])
