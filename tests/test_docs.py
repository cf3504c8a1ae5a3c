"""The examples of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from losslab.cli.arguments import COMMANDS, parse

README = Path(__file__).parents[1] / "README.md"


def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    assert len(blocks) >= 7
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert "test_accuracy" in capsys.readouterr().out
    assert len(scope["population"]) == 15  # type: ignore[arg-type]


def test_every_command_is_named_and_every_name_is_a_command() -> None:
    text = README.read_text("utf-8")
    assert set(re.findall(r"^losslab (\w+)", text, re.M)) == set(COMMANDS)
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(COMMANDS)


def test_every_line_for_the_shell_can_be_read() -> None:
    lines = re.findall(r"^losslab (\w+[^#\n]*)", README.read_text("utf-8"), re.M)
    assert len(lines) >= len(COMMANDS)
    for line in lines:
        parse(line.split())
