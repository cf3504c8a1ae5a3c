"""What ARCHITECTURE.md promises: the direction of imports, cheap imports, files of readable size."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "losslab"
ORDER = ("errors", "files", "provenance", "tasks", "layers", "rules", "engine")
INSTRUMENTS = ("signals", "curvature", "paths", "tickets")
ROOMS = {name: level for level, name in enumerate(ORDER)}
ROOMS |= dict.fromkeys(INSTRUMENTS, len(ORDER))
ROOMS |= {name: len(ORDER) + 1 + k for k, name in enumerate(("lecture", "report", "cli"))}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("losslab.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imported_rooms(path) - {room}:
        assert ROOMS[other] < ROOMS[room], f"{room} imports {other}"
    assert not ({"tasks", "rules"} <= imported_rooms(path) | {room} and room in ("tasks", "rules"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if len(node.body) > 1 and ast.get_docstring(node) else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < 60, node.name


def test_import_brings_no_heavy_library() -> None:
    heavy = ("pandas", "scipy", "sklearn", "plotly", "pyarrow", "datasets", "rich", "jinja2", "tyro")
    code = f"import sys, losslab; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
