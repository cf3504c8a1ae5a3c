from __future__ import annotations

import sys
from pathlib import Path

import pytest

from losslab.errors import LosslabError
from losslab.tasks import CATALOGUE, build, check, load_task

GOOD = """
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from losslab.tasks import supervised


@dataclass
class Sizes:  # a dataclass looks its module up while it is made
    inputs: int = 3


task = supervised(lambda: nn.Linear(Sizes().inputs, 2), (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)))


def make():
    return task.replace(name="made")
"""


def importing(lines: str) -> str:
    return GOOD.replace("import torch\n", lines + "import torch\n", 1)


# name: (source, what to ask for, the sentence)
BAD_FILES = {
    "raises": ("x = 1\n\nraise OSError('no luck\\nat all')", "task", r"raised OSError in line 3 \(no luck\)"),
    "raises deeper": ("def f():\n    1 / 0\n\nf()", "task", r"raised ZeroDivisionError in line 2 \(div"),
    "syntax": ("x = 1\nx = = 2\n", "task", r"raised SyntaxError in line 2 \(invalid syntax\): mend the file"),
    "no module": ("import not_there_at_all", "task", "raised ModuleNotFoundError in line 1"),
    "exits": ("import sys\nsys.exit(3)", "task", r"raised SystemExit in line 2 \(3\)"),
    "silent": ("raise ValueError", "task", "raised ValueError in line 1: mend the file"),
    "name": (GOOD, "tsk", "no task in .*mine.py is named 'tsk': did you mean 'task'"),
    "empty name": (GOOD, "", "no task in .*mine.py is named '': choose one of task, make$"),
    "a number": ("task = 3", "task", "task in .* is a int, no Task"),
    "needs arguments": ("def task(a): ...", "task", "task in .* raised TypeError.*: give FILE.py:NAME"),
    "function raises": (
        "def task():\n    raise KeyError('k')", "task", r"raised KeyError in line 2 \('k'\): mend",
    ),
    "function exits": ("def task():\n    raise SystemExit(3)", "task", r"raised SystemExit in line 2 \(3\)"),
    "function returns": ("def task(): return 'x'", "task", "task in .* returned a str, no Task"),
    "its own sentence": (
        "from losslab.errors import LosslabError\ndef task(): raise LosslabError('said already')", "task",
        "^said already$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    source, wanted, message = BAD_FILES[name]
    file = tmp_path / "mine.py"
    file.write_text(source)
    path = list(sys.path)
    with pytest.raises(LosslabError, match=message) as caught:
        load_task(f"{file}:{wanted}")
    assert "\n" not in str(caught.value)
    assert sys.path == path
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "no task is named 'digit': did you mean 'digits'"),
        ("zzzz", "no task is named 'zzzz': choose one of digits, mnist, .*FILE.py:NAME"),
        ("mine.py", "'mine.py' names a file and no task in it: give FILE.py:NAME"),
        ("no/such/file.py:task", "there is no file no/such/file.py: give FILE.py:NAME"),
        (".:task", "there is no file .: give FILE.py:NAME"),
        ("", "no task is named ''"),
    ],
)
def test_bad_specifications(spec: str, message: str) -> None:
    with pytest.raises(LosslabError, match=message):
        load_task(spec)


@pytest.mark.parametrize(("name", "title"), [("task", "task"), ("make", "made")])
def test_a_task_and_a_function_that_returns_one(tmp_path: Path, name: str, title: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(GOOD)
    task = load_task(f"{file}:{name}")
    assert task.name == title
    assert len(task.train) == 4
    check(task, build(task))


def test_a_file_may_be_named_like_a_module_of_pythons(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(GOOD)
    load_task(f"{tmp_path / 'json.py'}:task")
    import json

    assert "losslab" not in str(json.__file__)
    assert json.loads("[1]") == [1]
    assert sys.modules["json"] is json


def test_neighbours_are_found_and_not_confused(tmp_path: Path) -> None:
    titles = []
    path = list(sys.path)
    for folder in ("a", "b"):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "title.py").write_text(f"name = {folder!r}")
        (tmp_path / folder / "parts" / "__init__.py").write_text("from parts.deep import end")
        (tmp_path / folder / "parts" / "deep.py").write_text(f"end = {folder.upper()!r}")
        imports = "from title import name\nimport parts\n"
        (tmp_path / folder / "mine.py").write_text(importing(imports).replace('"made"', "name + parts.end"))
        titles.append(load_task(f"{tmp_path / folder / 'mine.py'}:make").name)
    assert titles == ["aA", "bB"]
    assert sys.path == path
    assert not {"title", "parts", "parts.deep", "mine"} & set(sys.modules)


def test_modules_installed_below_the_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a project with its virtual environment inside: what is imported from there is not forgotten."""
    installed = tmp_path / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "some_installed_part.py").write_text("")
    monkeypatch.syspath_prepend(str(installed))
    (tmp_path / "mine.py").write_text(importing("import some_installed_part\n"))
    try:
        load_task(f"{tmp_path / 'mine.py'}:task")
        assert "some_installed_part" in sys.modules
    finally:
        sys.modules.pop("some_installed_part", None)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in ("mnist", "cifar10")])
def test_the_catalogue(name: str, tmp_path: Path) -> None:
    task = load_task(name, folder=tmp_path)
    assert task.name.startswith(name)
    check(task, build(task))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_folder_reaches_the_image_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(LosslabError, match=f"there is no data folder {tmp_path / 'x'}"):
        load_task(name, folder=tmp_path / "x")
