"""Names and short cuts for tests of judges."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from losslab.lecture.claim import Claim, Verdict

HOLDS, MIXED, FAILS, UNDECIDED = Verdict.HOLDS, Verdict.MIXED, Verdict.FAILS, Verdict.UNDECIDED
Tables = dict[str, pd.DataFrame]
Stored = Callable[[Tables], Tables]
Draw = Callable[[Claim, Tables], None]
Races = Callable[..., Tables]


def verdicts(claim: Claim, tables: Tables) -> dict[str, Verdict]:
    return {finding.name: finding.verdict for finding in claim.judge(tables)}


def overall(claim: Claim, tables: Tables) -> Verdict:
    return claim.combine(claim.judge(tables))
