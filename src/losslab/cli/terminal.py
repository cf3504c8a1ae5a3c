"""Where the commands print."""

from __future__ import annotations

from rich.console import Console


def terminal() -> Console:
    """Standard output; into a file or a pipe, wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
