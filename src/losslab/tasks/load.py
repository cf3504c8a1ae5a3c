"""Tasks from the user's own files."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType

from losslab.errors import LosslabError, unknown
from losslab.tasks.catalogue import CATALOGUE
from losslab.tasks.task import Task

_HOW = "give FILE.py:NAME, where NAME is a Task or a function without arguments that returns one"


def load_task(spec: str, folder: str | Path | None = None) -> Task:
    """The task that a specification names.

    Args:
        spec: ``FILE.py:NAME``, where NAME is a :class:`Task` in the file, or a function without arguments
            that returns one; or a name of :data:`losslab.tasks.CATALOGUE`.
        folder: Where the catalogue's image data are; the Hugging Face hub if None.

    Raises:
        LosslabError: If the specification names nothing, the file is missing or raises, or what it names is
            not a task.

    Example:
        >>> load_task("rosenbrock").name
        'rosenbrock'
    """
    path, colon, name = spec.rpartition(":")
    if not colon:
        if spec.endswith(".py"):
            raise LosslabError(f"{spec!r} names a file and no task in it: {_HOW}")
        if spec not in CATALOGUE:
            raise unknown("task", spec, [*CATALOGUE, "FILE.py:NAME"])
        maker = CATALOGUE[spec]
        wants_folder = "folder" in inspect.signature(maker).parameters
        return maker(folder=folder) if wants_folder else maker()
    file = Path(path).expanduser()
    if not file.is_file():
        raise LosslabError(f"there is no file {file}: {_HOW}")
    with _importable(file.resolve().parent):
        module = _execute(file)
        return _task(module, name, file)


def _execute(file: Path) -> ModuleType:
    """Run the file as a module of a name that no import can clash with."""
    name = f"losslab task file {file.resolve()}"
    # The suffix of the file does not matter: a loader is given by hand.
    loader = importlib.machinery.SourceFileLoader(name, str(file.resolve()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up there
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise LosslabError(f"{file} raised {_told(error, file)}: mend the file") from error
    return module


def _task(module: ModuleType, name: str, file: Path) -> Task:
    if not hasattr(module, name):
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        made = [
            key
            for key, v in own.items()
            if isinstance(v, FunctionType) and v.__module__ == module.__name__ and not _asks(v)
        ]
        names = [key for key, value in own.items() if isinstance(value, Task)] + made
        raise unknown(f"task in {file}", name, names)
    found = getattr(module, name)
    if isinstance(found, Task):
        return found
    if not callable(found):
        raise LosslabError(f"{name} in {file} is a {type(found).__name__}, no Task: {_HOW}")
    try:
        task = found()
    except LosslabError:
        raise
    except (Exception, SystemExit) as error:  # the user's code
        todo = _HOW if _asks(found) else "mend the function"
        raise LosslabError(f"{name} in {file} raised {_told(error, file)}: {todo}") from error
    if not isinstance(task, Task):
        raise LosslabError(f"{name} in {file} returned a {type(task).__name__}, no Task: {_HOW}")
    return task


def _asks(function: Callable[..., object]) -> bool:
    """Whether a function cannot be called without arguments."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return True
    return False


def _told(error: BaseException, file: Path) -> str:
    """The exception's kind and message, and the last line of the file that it passed."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == file.resolve()
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    message = error.msg if isinstance(error, SyntaxError) else str(error).strip()
    where = f" in line {line}" if line is not None else ""
    return f"{type(error).__name__}{where}" + (f" ({message.splitlines()[0]})" if message else "")


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours, then forget them: the next file may have others of the same name."""
    entry = str(folder)
    if entry in sys.path:
        yield
        return
    before = set(sys.modules)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)
        for name in set(sys.modules) - before:
            origin = Path(getattr(sys.modules[name], "__file__", None) or "/")
            top = folder / name.partition(".")[0]
            if origin == top.with_suffix(".py") or origin.is_relative_to(top):
                del sys.modules[name]
