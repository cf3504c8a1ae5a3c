"""Running a command within the test's process."""

from __future__ import annotations

from typing import Any

from losslab.cli import main


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of one command."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def one_sentence(code: int, err: str) -> str:
    """The sentence of a mistake, which is all that it prints."""
    assert code == 2
    assert err.startswith("losslab: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def refused(capsys: Any, line: str, told: str) -> None:
    """Asserts that a line is answered by one sentence which holds ``told``."""
    code, _, err = run(capsys, *line.split())
    assert told in one_sentence(code, err)
