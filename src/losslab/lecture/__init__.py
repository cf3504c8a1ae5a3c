"""The lecture: its statements as claims, each with an experiment and a verdict.

A claim (`claim`) holds a statement, the experiment that produces evidence as tables, and a pure function
that judges the tables with the rules of `verdicts` and the mathematics of `statistics`. The claims
themselves lie in one package a section and are listed in `registry`; `runner` runs them one after another
and keeps what is done; `errata` says where the notes are wrong; `figures` is the drawing style they share.
Nothing here knows about pages or commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from losslab.lecture.claim import (
    PROFILES,
    Claim,
    Drawing,
    Finding,
    Lab,
    Result,
    Tables,
    Verdict,
    agreement,
    decided_by,
)
from losslab.lecture.errata import ERRATA, Erratum
from losslab.lecture.registry import claims, select
from losslab.lecture.runner import Event, run

if TYPE_CHECKING:
    CLAIMS: dict[str, Claim]

__all__ = [
    "CLAIMS",
    "ERRATA",
    "PROFILES",
    "Claim",
    "Drawing",
    "Erratum",
    "Event",
    "Finding",
    "Lab",
    "Result",
    "Tables",
    "Verdict",
    "agreement",
    "claims",
    "decided_by",
    "run",
    "select",
]


def __getattr__(name: str) -> dict[str, Claim]:
    # CLAIMS is made on first use: the section packages import this one.
    if name == "CLAIMS":
        return claims()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
