"""Where and how the commands print."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


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


def printed(frame: pd.DataFrame, title: str) -> Table:
    """A table for the terminal: words to the left, numbers to the right in four digits, NaN left out."""
    import pandas as pd
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        words = not pd.api.types.is_numeric_dtype(frame[column])
        table.add_column(str(column).replace("_", " "), justify="left" if words else "right", no_wrap=words)
    for row in frame.itertuples(index=False, name=None):
        table.add_row(*("" if v != v else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    return table


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
