"""What the tests of these claims share: evidence as a later run reads it, and figures that can be read."""

from __future__ import annotations

import io
from collections.abc import Callable

import pandas as pd
import pytest

from losslab.lecture.claim import Claim
from losslab.lecture.section_6_3.adam_race import MEASURES

Tables = dict[str, pd.DataFrame]


def through_parquet(tables: Tables) -> Tables:
    read = {}
    for name, table in tables.items():
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        read[name] = pd.read_parquet(buffer)
    return read


def check_figures(claim: Claim, tables: Tables) -> None:
    drawings = claim.figures(through_parquet(tables))
    assert 1 <= len(drawings) <= 3
    for drawing in drawings:
        assert drawing.caption
        assert drawing.figure.layout.xaxis.title.text
        assert drawing.figure.layout.yaxis.title.text
        for trace in drawing.figure.data:
            assert trace.x is None or 0 < len(trace.x) <= 2000


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
def stored() -> Callable[[Tables], Tables]:
    return through_parquet


@pytest.fixture(scope="session")
def draw() -> Callable[[Claim, Tables], None]:
    return check_figures


@pytest.fixture(scope="session")
def races() -> Callable[..., Tables]:
    return planted_races
