"""The examples of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    assert len(blocks) >= 3
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert "test_accuracy" in capsys.readouterr().out
    assert len(scope["population"]) == 15  # type: ignore[arg-type]


def test_every_command_named_exists() -> None:
    from losslab.cli import commands

    named = set(re.findall(r"^losslab (\w+)", README.read_text("utf-8"), re.M))
    assert named == {"lecture", "train", "rules"}
    assert named == {name.lower() for name in ("Lecture", "Train", "Rules") if hasattr(commands, name)}
