"""Long work: what is done is kept in a file, a killed run goes on from there, a live line says how far."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from losslab.engine import checkpoints
from losslab.engine.progress import Bar
from losslab.errors import LosslabError


class Work:
    """Where long work keeps what is done, and whether it shows how far it is.

    Whatever takes ``out=`` takes one of these, or just the path. If the file exists and is of the same work,
    the rest is done, and the result is that of an unbroken run: bit for bit where the execution is fixed
    (``execution="stacked"`` or ``"loop"``), since ``"auto"`` times the two and may choose otherwise.

    Args:
        path: A file; a folder for work of several parts. None keeps nothing.
        every: Seconds between two writes.
        progress: A live line: True, False, or None for one where standard error is a terminal.
    """

    def __init__(
        self, path: str | Path | None = None, every: float = 30.0, progress: bool | None = False
    ) -> None:
        if not every >= 0:
            raise LosslabError(f"{every} seconds between two writes were asked for: pass 0 or more")
        self.path, self.every, self.progress = None if path is None else Path(path), every, progress

    @classmethod
    def of(cls, out: Out) -> Work:
        """Work from what was passed as ``out=``."""
        return out if isinstance(out, Work) else cls(out)

    def part(self, name: str) -> Work:
        """A part of this work, with a file (or a folder) of its own."""
        return Work(None if self.path is None else self.path / name, self.every, self.progress)

    def begin(self, asked: Mapping[str, Any], label: str = "", total: int = 0, members: int = 1) -> Kept:
        """Opens what is kept.

        Args:
            asked: What identifies the work.
            label: What the live line says; none without a label.
            total: Steps in all.
            members: How many things move.

        Raises:
            LosslabError: The file is damaged, or of other work.
        """
        return Kept(self, asked, label, total, members)


Out = str | Path | Work | None


class Kept:
    """What is kept of one piece of work; a context, in which the live line shows.

    Attributes:
        tensors: What the file held when it was opened, or nothing.
        meta: The same of numbers and names.
    """

    def __init__(self, work: Work, asked: Mapping[str, Any], label: str, total: int, members: int) -> None:
        self._path, self._every = work.path, work.every
        self._asked = json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(asked, default=_plain)))
        self._held: tuple[Mapping[str, Tensor], dict[str, Any]] = {}, {}
        self._written = time.monotonic()
        self.tensors: dict[str, Tensor] = {}
        self.meta: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            self.tensors, self.meta = checkpoints.read(self._path)
            saved = self.meta.get("asked", {})
            odd = [name for name in self._asked if saved.get(name) != self._asked[name]]
            if odd:
                raise LosslabError(
                    f"{self._path} holds other work (its {odd[0]} differs): use another file, or delete it"
                )
        start = int(self.meta.get("step", 0))
        show = work.progress if label else False
        self._bar = Bar(total, members, start, show, label)

    def due(self) -> bool:
        """Whether it is time to write."""
        return self._path is not None and time.monotonic() - self._written >= self._every

    def write(self, tensors: Mapping[str, Tensor], **meta: Any) -> None:
        """Keeps this, and what is held beside it, in place of what was kept before."""
        if self._path is not None:
            outer, told = self._held
            checkpoints.write(self._path, {**outer, **tensors}, {"asked": self._asked, **told, **meta})
            self._written = time.monotonic()

    def hold(self, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """What every write is to have beside its own: of the rounds around an inner loop."""
        self._held = tensors, meta

    def forget(self) -> None:
        """Goes on as if nothing had been kept: the inner loop that it was of is over."""
        self.tensors, self.meta = {}, {}

    def tell(self, step: int, losses: Any) -> None:
        """Draws the live line, if it is time to."""
        if self._bar.due():
            known = np.asarray(losses, dtype=np.float64)
            alive = np.isfinite(known)
            self._bar.update(
                step, float(known[alive].max()) if alive.any() else float("nan"), int(alive.sum())
            )

    def __enter__(self) -> Kept:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)


def _plain(value: Any) -> Any:
    """What JSON has no form for: rules tell their settings, the rest its name."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    describe = getattr(value, "describe", None)
    return describe() if callable(describe) else repr(value)


__all__ = ["Kept", "Out", "Work"]
