"""``losslab rules``: the table of update rules, or one rule's page."""

from __future__ import annotations

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from losslab.cli.terminal import terminal
from losslab.rules import page, table


def rules(name: str | None) -> None:
    """Prints the table, or the page of one rule."""
    console = terminal()
    if name is None:
        console.print(_table())
        console.print("losslab rules NAME shows a rule's equation and how others differ.", style="dim")
        return
    told = page(name)
    console.print(Panel(Text(told.equation), title=f"{told.title} ({told.name})", expand=False))
    options = Table("option", "default", title="Defaults", title_justify="left", box=None)
    for option, default in told.defaults.items():
        options.add_row(option, str(default))
    console.print(options)
    if told.variants:
        variants = Table("variant", "what it does", title="Variants", title_justify="left", box=None)
        for variant, what in told.variants.items():
            variants.add_row(variant, what)
        console.print(variants)
    console.print(Text("Differences", style="italic"))
    console.print(Text(told.differences))
    console.print(Text("Source", style="italic"))
    console.print(Text(told.source))


def _table() -> Table:
    shown = Table("rule", "what it is", "variants", "defaults")
    for row in table():
        shown.add_row(row["name"], row["title"], row["variants"], row["defaults"])
    return shown
