"""Where and how the commands print."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd


def terminal() -> Console:
    """Standard output; into a file or a pipe, wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def counted(number: int, what: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "member"), counted(3, "member")
        ('1 member', '3 members')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def printed(frame: pd.DataFrame, title: str, keys: int | None = None) -> Group:
    """A table for the terminal: words to the left, numbers to the right in four digits, NaN left out.

    Where it is wider than the terminal it comes in parts, so that no number is cut.

    Args:
        frame: What is shown.
        title: Above it.
        keys: So many first columns tell the rows apart, and stand in every part; by default those of words.
    """
    import pandas as pd

    words = [not pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns]
    keys = [*words, False].index(False) if keys is None else keys
    names = [str(name).replace("_", " ") for name in frame.columns]
    rows = [
        ["" if v != v else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
        for row in frame.itertuples(index=False, name=None)
    ]
    cells = [max([0, *(len(row[k]) for row in rows)]) for k in range(len(names))]
    broken = [max(c, *map(len, name.split(" "))) for c, name in zip(cells, names, strict=True)]
    room = terminal().width - 1
    parts: list[list[int]] = [[]]
    for k in range(keys, len(names)):
        if parts[-1] and sum(broken[i] + 3 for i in [*range(keys), *parts[-1], k]) > room:
            parts.append([])
        parts[-1].append(k)
    tables = []
    for number, part in enumerate(parts):
        table = Table(title="" if number else title, title_justify="left")
        chosen = [*range(keys), *part]
        # Left to itself, rich cuts numbers before it breaks headings.
        tight = sum(max(cells[k], len(names[k])) + 3 for k in chosen) > room
        for k in chosen:
            table.add_column(
                names[k],
                justify="left" if words[k] else "right",
                no_wrap=words[k] and not tight,
                overflow="fold",
                width=broken[k] if tight and sum(broken[i] + 3 for i in chosen) <= room else None,
            )
        for row in rows:
            table.add_row(*(row[k] for k in chosen))
        tables.append(table)
    return Group(*tables)


@contextlib.contextmanager
def notices() -> Iterator[None]:
    """Prints each warning of the library's, and of torch's for users, once, as a line without its place."""
    from losslab.engine import ExecutionNotice

    told: set[str] = set()
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, UserWarning):
            shown(message, category, *place, **more)
        elif str(message) not in told:
            told.add(str(message))
            print(f"losslab: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ExecutionNotice)
        warnings.showwarning = show
        yield
