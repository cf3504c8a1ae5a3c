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
main(["lecture", "--out", sys.argv[1], "--claim", *sys.argv[2:]])
"""


def claims(*spans: tuple[int, int]) -> list[str]:
    """C1, C2, ... from the first to the last of each span."""
    return [f"C{k}" for first, last in spans for k in range(first, last + 1)]


GROUPS = {
    "gradient descent and its rules (6.2, 6.3)": (claims((8, 11), (14, 20), (22, 32)), 120),
    "batch norm and initialisation (6.4, 6.5)": (claims((33, 61)), 180),
    "minima, saddles, curvature (6.1 to 6.3)": (claims((1, 4), (12, 13), (21, 21)), 120),
    "landscapes and paths (6.1, 6.6)": (claims((5, 7), (62, 64)), 120),
    "lottery tickets (6.6)": (claims((65, 68)), 90),
}
"""Claims that are run together, and the seconds that they may take."""


def rows() -> list[Row]:
    """Each group in a process of its own, as far as its claims are there."""
    from losslab.lecture import claims as built

    found = []
    for name, (ids, bar) in GROUPS.items():
        there = [one for one in ids if one in built()]
        if there:
            found += measure(name, there, bar)
    return found


def measure(name: str, ids: list[str], bar: float) -> list[Row]:
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
        seconds, peak = child(RUN, str(out), *ids)
        stop.set()
        watcher.join()
        records = json.loads((out / "claims.json").read_text())["claims"]
        size = (out / "report.html").stat().st_size / 2**20
    failed = sum(r["status"] != "done" for r in records)
    found = [
        Row(
            f"{name}: {len(records)} claims, {failed} failed",
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
