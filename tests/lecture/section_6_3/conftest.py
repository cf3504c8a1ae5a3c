"""Planted evidence for the claims that compare rules on a task."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from losslab.lecture.section_6_3.adam_race import MEASURES

Tables = dict[str, pd.DataFrame]


def planted_races(losses: dict[str, float], networks: tuple[str, ...], seeds: int = 10) -> Tables:
    """Runs whose final losses are given, with a little noise that the arms of a seed share."""
    shared = {"data": "digits", "least": 10, "note": "small"}
    rows = [
        {"arm": arm, "tuned": tuned, "lr": 0.1, "seed": seed, "epoch": epoch, "network": network, **shared}
        | {"train_loss": (3.0 - epoch + loss) * (1 + seed / 1000)}
        for arm, loss in losses.items()
        for tuned in MEASURES
        for seed in range(seeds)
        for epoch in (0.0, 1.0, 2.0, 3.0)
        for network in networks
    ]
    tuning = [
        {"arm": arm, "tuned": tuned, "lr": 0.1, "score": loss, "at_edge": False, "network": network}
        for arm, loss in losses.items()
        for tuned in MEASURES
        for network in networks
    ]
    return {"runs": pd.DataFrame(rows), "tuning": pd.DataFrame(tuning)}


@pytest.fixture(scope="session")
def races() -> Callable[..., Tables]:
    return planted_races
