"""Tables of lotteries of one's choice."""

from __future__ import annotations

import numpy as np
import pandas as pd


def planted(
    accuracy: dict[tuple[int, str], float],
    stop: dict[str, int] | None = None,
    n: int = 5,
    spread: float = 0.001,
    seed: int = 0,
) -> pd.DataFrame:
    """A table with mean accuracies by (level, arm) and early-stop steps by arm; 20 % go a level."""
    noise, rows = np.random.default_rng(seed), []
    for (level, arm), mean in accuracy.items():
        for i in range(n):
            share = 0.8**level
            row = {"level": level, "arm": arm, "replicate": i, "stop_step": (stop or {}).get(arm, 400)}
            row |= {"test_accuracy": mean + spread * noise.standard_normal(), "test_loss": 1 - mean}
            row |= {"validation_loss": 0.1, "final_validation_loss": 0.2, "diverged": -1}
            row |= {"final_train_accuracy": 1.0, "kept": round(266_200 * share), "of": 266_200}
            rows.append(row | {"remaining": round(266_200 * share) / 266_200})
    return pd.DataFrame(rows)


def looked(table: pd.DataFrame) -> pd.DataFrame:
    """Validation curves to go with it."""
    places = table[["level", "arm", "replicate"]].to_dict("records")
    return pd.DataFrame(
        [
            place | {"step": step, "validation_loss": 1 / (1 + step)}
            for place in places
            for step in (0, 100, 200)
        ]
    )
