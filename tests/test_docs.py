"""The examples of the README run as they stand."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
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


def test_every_command_is_named_and_every_name_is_a_command() -> None:
    from losslab.cli import commands

    named = set(re.findall(r"^losslab (\w+)", README.read_text("utf-8"), re.M))
    there = {n.lower() for n, kind in vars(commands).items() if isinstance(kind, type) and is_dataclass(kind)}
    assert named == there
