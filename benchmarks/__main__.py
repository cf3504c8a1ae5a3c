"""``python -m benchmarks [SUITE ...] [--data DIR]`` prints the table of figures."""

from __future__ import annotations

import argparse
import os
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import adapters, curvature, lecture, normalisation, paths, populations, startup, tickets
from benchmarks.measure import Row
from losslab.engine.compiled import machine_code

SUITES = ("populations", "normalisation", "curvature", "paths", "tickets", "adapters", "startup", "lecture")
LONG = ("curvature-resnet",)


def main() -> None:
    """Runs the suites asked for; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"of {', '.join(SUITES)}, all by default; {', '.join(LONG)} too",
    )
    parser.add_argument(
        "--data", default=None, help="folder with mnist/; without it LeNet gets noise of that shape"
    )
    options = parser.parse_args()
    if wrong := set(options.suites) - {*SUITES, *LONG}:
        parser.error(f"no suite is named {', '.join(sorted(wrong))}: choose of {', '.join(SUITES + LONG)}")
    suites = {
        "populations": lambda: populations.rows(options.data),
        "normalisation": lambda: normalisation.rows(options.data),
        "curvature": lambda: curvature.rows(options.data),
        "curvature-resnet": lambda: curvature.residual_rows(options.data),
        "paths": lambda: paths.rows(options.data),
        "tickets": lambda: tickets.rows(options.data),
        "adapters": adapters.rows,
        "startup": startup.rows,
        "lecture": lecture.rows,
    }
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {'with' if machine_code() else 'without'} machine code; "
        "medians over interleaved rounds"
    )
    missed = 0
    for name in options.suites or SUITES:
        found = suites[name]()
        missed += sum(row.met is False for row in found)
        console.print(_table(name, found))
    sys.exit(1 if missed else 0)


def _table(name: str, found: list[Row]) -> Table:
    table = Table("case", "measured", "wanted", "", title=name, title_justify="left")
    for row in found:
        verdict = "" if row.met is None else "[green]met[/]" if row.met else "[red]missed[/]"
        table.add_row(row.what, row.figure, row.bar, verdict)
    return table


if __name__ == "__main__":
    main()
