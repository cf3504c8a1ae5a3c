"""The lecture's wall time, its memory, and how soon the first verdict can be read."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.measure import Row, child

RUN = """
import sys
from losslab.cli import main
main(["lecture", "--out", sys.argv[1], "--section", *sys.argv[2:]])
"""
BARS = {("6.2", "6.3"): 120, ("6.4", "6.5"): 180}
"""Sections, and the seconds that their claims may take."""


def rows() -> list[Row]:
    """Each group of sections in a process of its own."""
    return [row for sections, bar in BARS.items() for row in measure(sections, bar)]


def measure(sections: tuple[str, ...], bar: float) -> list[Row]:
    """One quick run in a fresh process, watched from outside."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report"
        begun = time.perf_counter()
        first: list[float] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set() and not first:
                if _verdicts(out / "claims.json") and (out / "report.html").exists():
                    first.append(time.perf_counter() - begun)
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        seconds, peak = child(RUN, str(out), *sections)
        stop.set()
        watcher.join()
        records = json.loads((out / "claims.json").read_text())["claims"]
        size = (out / "report.html").stat().st_size / 2**20
    failed = sum(r["status"] != "done" for r in records)
    found = [
        Row(
            f"losslab lecture, quick, {' and '.join(sections)}: {len(records)} claims, {failed} failed",
            f"{seconds:.0f} s",
            f"<= {bar:g} s",
            seconds <= bar and not failed,
        ),
        Row("  first verdict readable", f"{first[0]:.1f} s", "<= 30 s", first[0] <= 30),
        Row("  peak memory", f"{peak / 1024:.2f} GiB", "<= 2 GiB", peak <= 2048),
        Row("  report.html", f"{size:.1f} MiB"),
    ]
    slowest = sorted(records, key=lambda r: -r["seconds"])[:5]
    return found + [Row(f"  slowest: {r['id']}", f"{r['seconds']:.1f} s") for r in slowest]


def _verdicts(path: Path) -> int:
    try:
        return sum(r["status"] == "done" for r in json.loads(path.read_text())["claims"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
