"""``losslab tickets``: a line a level, the comparisons, resuming, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from losslab.cli import main

SHORT = ("--levels", "1", "--replicates", "2", "--steps", "6", "--evaluate", "3", "--batch-size", "10")
TASKS = """
import torch
from losslab import supervised
from losslab.tasks import mlp

g = torch.Generator().manual_seed(0)
x = torch.randn(80, 6, generator=g)
small = supervised(mlp(6, 8, 4, 2), (x, (x[:, 0] > 0).long()), (x, (x[:, 0] > 0).long()), name="small")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "t.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    try:
        main(["tickets", *arguments])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_it_prints_levels_and_comparisons_and_goes_on(capsys: Any, folder: Path) -> None:
    code, out, err = run(capsys, "t.py:small", *SHORT, "--out", "o", "--init", "xavier")
    assert code == 0, err
    for word in ("level 0: 100.00%", "level 1:", "reinit", "random", "dense", "The last ticket"):
        assert word in out
    assert sorted(p.name for p in (folder / "o").iterdir())[0] == "curves.csv"
    assert run(capsys, "t.py:small", *SHORT, "--out", "o", "--init", "xavier")[0] == 2
    longer = [*SHORT[2:], "--levels", "2", "--out", "o", "--resume", "--init", "xavier"]
    code, out, err = run(capsys, "t.py:small", *longer)
    assert code == 0, err
    assert "level 2" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--rate", "1.5"), "rate is 1.5"),
        (("--rewind", "9"), "rewind step is 9"),
        (("--controls", "luck"), "control"),
        (("--resume",), "--out"),
        (("--init", "zero"), "--init"),
        (("--criterion", "size"), "criterion"),
        (("--rate", "0.9", "--levels", "9"), "without weights"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], told: str, capsys: Any) -> None:
    code, _, err = run(capsys, "t.py:small", *SHORT, *arguments)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
