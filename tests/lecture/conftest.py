"""What the tests of the claims share: evidence as a later run reads it, verdicts on it, readable figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import pandas as pd
import pytest

from losslab.lecture.claim import Claim, Tables


def through_parquet(tables: Tables) -> dict[str, pd.DataFrame]:
    read = {}
    for name, table in tables.items():
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        read[name] = pd.read_parquet(io.BytesIO(buffer.getvalue()))
    return read


def check_figures(claim: Claim, tables: Tables) -> None:
    drawings = claim.figures(through_parquet(tables))
    assert len(drawings) <= 3
    assert drawings or claim.id == "C15"  # two formulas: the numbers say it all
    for drawing in drawings:
        assert drawing.caption
        assert drawing.figure.layout.xaxis.title.text
        assert drawing.figure.layout.yaxis.title.text
        assert all(trace.x is None or 0 < len(trace.x) <= 2000 for trace in drawing.figure.data)


def verdicts_of(claim: Claim, tables: Tables) -> Mapping[str, str]:
    """Finding -> verdict, and the overall one under ``"all"``; fails where figures cannot be read."""
    check_figures(claim, tables)
    findings = claim.judge(through_parquet(tables))
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: str(finding.verdict) for finding in findings} | {
        "all": str(claim.combine(findings))
    }


@pytest.fixture(scope="session")
def stored() -> Callable[[Tables], dict[str, pd.DataFrame]]:
    return through_parquet


@pytest.fixture(scope="session")
def draw() -> Callable[[Claim, Tables], None]:
    return check_figures


@pytest.fixture(scope="session")
def verdicts() -> Callable[[Claim, Tables], Mapping[str, str]]:
    return verdicts_of
