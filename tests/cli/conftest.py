"""Each test stands in a folder of its own, with the tasks of its file in ``t.py``."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "t.py").write_text(request.module.TASKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path
