"""``losslab tickets``: a line a level, the comparisons, resuming, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.cli import shell

SHORT = ("--levels", "1", "--replicates", "2", "--steps", "6", "--evaluate", "3", "--batch-size", "10")
TASKS = """
import torch
from losslab import supervised
from losslab.tasks import conv2, mlp

g = torch.Generator().manual_seed(0)
x = torch.randn(80, 6, generator=g)
small = supervised(mlp(6, 8, 4, 2), (x, (x[:, 0] > 0).long()), (x, (x[:, 0] > 0).long()), name="small")
other = supervised(mlp(6, 7, 2), (x, (x[:, 0] > 0).long()), (x, (x[:, 0] > 0).long()), name="small")
images = supervised(conv2(1, 4), (torch.randn(40, 1, 4, 4), torch.arange(40) % 3), name="images")
"""


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    return shell.run(capsys, "tickets", *arguments)


def short(*arguments: str) -> list[str]:
    """Options for a small lottery, with some of them changed or added: none may be given twice."""
    pairs = zip(SHORT[::2], SHORT[1::2], strict=True)
    return [*(part for pair in pairs if pair[0] not in arguments for part in pair), *arguments]


def test_it_prints_levels_and_comparisons_and_goes_on(capsys: Any, folder: Path) -> None:
    code, out, err = run(capsys, "t.py:small", *SHORT, "--out", "o", "--init", "xavier")
    assert code == 0, err
    for word in ("level 0: 100.00%", "level 1:", "reinit", "random", "dense", "The last ticket"):
        assert word in out
    assert sorted(p.name for p in (folder / "o").iterdir())[0] == "curves.csv"
    assert "What was found" in (folder / "o" / "tickets.html").read_text("utf-8")
    assert run(capsys, "t.py:small", *SHORT, "--out", "o", "--init", "xavier")[0] == 2
    longer = [*SHORT[2:], "--levels", "2", "--out", "o", "--resume", "--init", "xavier"]
    code, out, err = run(capsys, "t.py:small", *longer)
    assert code == 0, err
    assert "level 2" in out


def test_the_page_is_there_after_every_level(
    capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from losslab.report import tickets as pages

    seen = []
    original = pages.write_lottery

    def write(path: Path, name: str, table: Any, *rest: Any) -> None:
        seen.append(int(table.level.max()))
        original(path, name, table, *rest)

    monkeypatch.setattr(pages, "write_lottery", write)
    assert run(capsys, "t.py:small", *SHORT, "--out", "o")[0] == 0
    assert seen == [0, 1]
    longer = [*SHORT[2:], "--levels", "2", "--out", "o", "--resume"]
    assert run(capsys, "t.py:small", *longer)[0] == 0
    assert seen == [0, 1, 2]  # levels that are only read again do not write it again


def test_convolutions_have_a_rate_of_their_own(capsys: Any, folder: Path) -> None:
    import pandas as pd

    tiny = short("--replicates", "1", "--conv-rate", "0.5", "--controls", "reinit", "--out", "o")
    code, out, err = run(capsys, "t.py:images", *tiny)
    assert code == 0, err
    assert "this network is none" in out
    kept = pd.read_csv(folder / "o" / "table.csv").kept.iloc[-1]
    assert kept == (576 + 36_864) // 2 + 2 * 52_429 + 2304


def test_instability_prints_and_writes(capsys: Any, folder: Path) -> None:
    arguments = ("--instability", "0", "4", "--steps", "6", "--replicates", "2", "--batch-size", "10")
    code, out, err = run(capsys, "t.py:small", *arguments, "--out", "i", "--init", "he")
    assert code == 0, err
    assert "error barrier" in out
    assert "Mean error barriers: " in out
    assert {p.name for p in (folder / "i").iterdir()} == {"instability.csv", "instability.html"}


def test_instability_of_the_tickets_of_a_folder(capsys: Any, folder: Path) -> None:
    assert run(capsys, "t.py:small", *SHORT, "--out", "o")[0] == 0
    kept = {p.name: p.read_bytes() for p in (folder / "o").iterdir()}
    asked = ("--out", "o", "--instability", "0", "6", "--ticket", "1")
    code, out, err = run(capsys, "t.py:small", *SHORT, *asked)
    assert code == 0, err
    assert "small, tickets of level 1 with 80.68%" in out
    assert "Mean error barriers: " in out
    made = {p.name: p.read_bytes() for p in (folder / "o").iterdir()}
    assert {n: b for n, b in made.items() if n in kept} == kept
    assert set(made) - set(kept) == {"instability-01.csv", "instability-01.html"}


def test_what_was_found_before_a_level_is_refused_is_told(
    capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from losslab import tickets
    from losslab.errors import LosslabError

    original = tickets.lottery

    def refused(task: Any, plan: Any, watch: Any, **more: Any) -> Any:
        original(task, plan, watch=watch, **more)
        raise LosslabError("this level would leave '4.weight' without weights: prune fewer levels")

    monkeypatch.setattr(tickets, "lottery", refused)
    code, out, err = run(capsys, "t.py:small", *SHORT)
    assert (code, err.count("\n")) == (2, 1)
    assert "tickets against the others" in out
    assert "The last ticket" in out


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
        (("--rate", "nan"), "rate is nan"),
        (("--rate", "0"), "rate is 0"),
        (("--output-rate", "1"), "output is 1"),
        (("--conv-rate", "0.1"), "no convolutions"),
        (("--scope", "units", "--rate", "0.9"), "without units"),
        (("--scope", "global", "--output-rate", "0.1"), "ranked together"),
        (("--rewind", "-1"), "rewind step is -1"),
        (("--rewind", "soon"), "rewind point"),
        (("--control-levels", "2"), "control_levels names 2"),
        (("--lr", "nan"), "lr is nan"),
        (("--rule", "adm"), "rule"),
        (("--levels", "0"), "levels is 0"),
        (("--replicates", "0"), "replicates is 0"),
        (("--steps", "0"), "steps is 0"),
        (("--evaluate", "0"), "evaluate is 0"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--out", "t.py"), "cannot write"),
        (("--instability", "7"), "copied at"),
        (("--instability", "0", "--steps", "0"), "copied at"),
        (("--instability", "0", "--resume", "--out", "o"), "--resume"),
        (("--instability", "0", "--replicates", "0"), "replicates"),
        (("--instability", "0", "--ticket", "1"), "--ticket was given without --out"),
        (("--instability", "0", "--ticket", "1", "--out", "empty"), "holds no finished level"),
        (("--ticket", "1"), "pass both"),
        (("--levels", "60"), "would prune nothing"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], told: str, capsys: Any) -> None:
    code, _, err = run(capsys, "t.py:small", *short(*arguments))
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


def test_a_folder_of_another_lottery_is_refused(capsys: Any, folder: Path) -> None:
    assert run(capsys, "t.py:small", *SHORT, "--out", "o", "--controls", "reinit")[0] == 0
    again = [*SHORT, "--out", "o", "--resume", "--controls", "reinit"]
    changes = {"scope": ("--rate", "0.3"), "rewind": ("--rewind", "2"), "rule": ("--lr", "0.1")}
    for name, change in changes.items():
        code, _, err = run(capsys, "t.py:small", *again, *change)
        assert code == 2
        assert f"differs in {name}" in err
    code, _, err = run(capsys, "t.py:other", *again)
    assert (code, err.count("\n")) == (2, 1)
    assert "differs in parameters" in err
    torn = folder / "o" / "level-01.safetensors"
    torn.write_bytes(torn.read_bytes()[:-20])
    code, _, err = run(capsys, "t.py:small", *again)
    assert (code, err.count("\n")) == (2, 1)
    assert "torn" in err


def test_tasks_that_have_no_lottery(capsys: Any) -> None:
    code, _, err = run(capsys, "rosenbrock", *SHORT)
    assert (code, err.count("\n")) == (2, 1)
    assert "no data" in err
