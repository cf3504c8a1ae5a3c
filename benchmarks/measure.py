"""How things are timed here, and how the results are printed."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure and the bar it has to meet.

    Attributes:
        what: The case.
        figure: The measured number, formatted.
        bar: What is wanted, in words; empty where there is none.
        met: Whether it is; None where there is no bar.
    """

    what: str
    figure: str
    bar: str = ""
    met: bool | None = None


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median seconds a call of each contender; A, B, C, A, B, C, ... so that a slow minute hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


# Not getrusage: its peak survives exec, so a child would be told the size of the process it was forked from.
_PEAK = (
    "\nprint('peak', [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
)


def child(code: str, *arguments: str) -> tuple[float, float]:
    """Runs Python code in a fresh process: wall seconds and peak resident MiB (Linux)."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code + _PEAK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the measured process ended with {done.returncode}: {done.stderr[-2000:]}")
    return seconds, int(done.stdout.rsplit("peak", 1)[1]) / 1024
