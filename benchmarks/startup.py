"""What ``import losslab`` costs beyond ``import torch``."""

from __future__ import annotations

import statistics

from benchmarks.measure import Row, child


def rows(rounds: int = 7) -> list[Row]:
    """Interleaved fresh processes."""
    times: dict[str, list[float]] = {"torch": [], "losslab": []}
    for _ in range(rounds):
        for name, seconds in times.items():
            seconds.append(child(f"import torch, {name}")[0])
    cost = statistics.median(times["losslab"]) - statistics.median(times["torch"])
    return [Row("import losslab beyond import torch", f"{cost:.2f} s", "<= 0.3 s", cost <= 0.3)]
