"""A claim: a statement of the lecture, the experiment that tests it, the rule that judges the evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from losslab.errors import LosslabError, unknown

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

T = TypeVar("T")

Tables: TypeAlias = Mapping[str, "pd.DataFrame"]
"""The evidence of a claim: named tables that survive a parquet round trip."""

PROFILES = ("quick", "full", "paper")


class Verdict(StrEnum):
    """What the evidence says about a statement."""

    HOLDS = "holds"
    MIXED = "mixed"
    FAILS = "does not hold"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Finding:
    """One judged sub-statement.

    Attributes:
        name: What was judged, in a few words.
        verdict: The outcome.
        estimate: The statistic the verdict rests on.
        interval: Its 95 % interval, or the range of the errors for an identity; both NaN where there is none.
        n: The number of independent runs, instances or points behind the estimate.
        test: How the statistic was obtained.
        threshold: What it had to meet.
        note: What else a reader must know.
    """

    name: str
    verdict: Verdict
    estimate: float
    interval: tuple[float, float]
    n: int
    test: str
    threshold: str
    note: str = ""


class Drawing(NamedTuple):
    """A figure and the sentence below it."""

    figure: Figure
    caption: str


def quiet(message: str) -> None:
    """A progress callback that says nothing."""


@dataclass(frozen=True)
class Lab:
    """What an experiment may use: how much work to do, which data, and where to report progress.

    Attributes:
        profile: ``"quick"`` (minutes), ``"full"`` (all replicates) or ``"paper"`` (the papers' own settings).
        seeds: The number of replicates, where the user asked for one.
        data: A folder with the data sets that are not embedded.
        progress: Called with a short text as the experiment goes on.
        folder: Where a long experiment keeps what it has done, so that a resumed run goes on from there.

    Raises:
        LosslabError: Unknown profile, fewer than one seed, or a data folder that does not exist.

    Example:
        >>> Lab("full").pick(10, 50), Lab("paper").pick(10, 50), Lab("full").pick(10)
        (50, 50, 10)
        >>> Lab(seeds=3).replicates(10)
        3
    """

    profile: str = "quick"
    seeds: int | None = None
    data: Path | None = None
    progress: Callable[[str], None] = quiet
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise unknown("profile", self.profile, PROFILES)
        if self.seeds is not None and not 1 <= self.seeds <= 1000:
            # Searches for rates use the seeds from 1000 on.
            raise LosslabError(f"seeds is {self.seeds}, an experiment takes 1 to 1000: change seeds")
        if self.data is not None and not Path(self.data).is_dir():
            raise LosslabError(
                f"the data folder {self.data} does not exist: pass the one that holds the data sets, or none"
            )

    def pick(self, quick: T, full: T | None = None, paper: T | None = None) -> T:
        """The setting for this profile; ``full`` defaults to ``quick``, ``paper`` to ``full``."""
        full = quick if full is None else full
        paper = full if paper is None else paper
        return {"quick": quick, "full": full, "paper": paper}[self.profile]

    def replicates(self, quick: int, full: int | None = None, paper: int | None = None) -> int:
        """The number of seeds for this profile, unless the user set it."""
        return self.pick(quick, full, paper) if self.seeds is None else self.seeds


def agreement(findings: Sequence[Finding]) -> Verdict:
    """The overall verdict when every finding counts.

    All hold: holds. All fail: does not hold. Some undecided and the rest hold: undecided. Otherwise mixed.
    """
    verdicts = {finding.verdict for finding in findings}
    if len(verdicts) == 1:
        return verdicts.pop()
    return Verdict.UNDECIDED if verdicts == {Verdict.HOLDS, Verdict.UNDECIDED} else Verdict.MIXED


def decided_by(*names: str) -> Callable[[Sequence[Finding]], Verdict]:
    """The overall verdict when only the named findings count; the others are controls or context."""

    def combine(findings: Sequence[Finding]) -> Verdict:
        deciding = [finding for finding in findings if finding.name in names]
        missing = set(names) - {finding.name for finding in deciding}
        if missing:
            raise LosslabError(
                f"no finding is named {', '.join(sorted(missing))}: decided_by needs names that judge gives"
            )
        return agreement(deciding)

    return combine


def all_but(*names: str) -> Callable[[Sequence[Finding]], Verdict]:
    """The overall verdict when every finding counts except the named ones, which are context."""
    return lambda findings: agreement([finding for finding in findings if finding.name not in names])


def no_figures(tables: Tables) -> list[Drawing]:
    """For a claim whose numbers say it all."""
    return []


@dataclass(frozen=True)
class Claim:
    """A statement with its source, an experiment, and a rule that turns evidence into a verdict.

    Attributes:
        id: ``"C16"``.
        section: The notes' section, ``"6.2.3"``.
        title: A few words.
        statement: What the notes say, in our own words.
        source: The section of the notes, and the paper where there is one.
        experiment: Runs and returns the evidence; it gives no verdict.
        judge: Evidence to findings, a pure function; the first finding is the headline.
        figures: Evidence to drawings, a pure function.
        combine: Findings to the overall verdict.
        caveats: What limits the result.
        errata: The errata of the notes that concern the statement, ``("E7",)``.
        paper: Whether the paper profile has settings of its own here; else it runs the full ones.
    """

    id: str
    section: str
    title: str
    statement: str
    source: str
    experiment: Callable[[Lab], Tables]
    judge: Callable[[Tables], list[Finding]]
    figures: Callable[[Tables], list[Drawing]] = no_figures
    combine: Callable[[Sequence[Finding]], Verdict] = agreement
    caveats: tuple[str, ...] = ()
    errata: tuple[str, ...] = ()
    paper: bool = False


@dataclass
class Result:
    """What came of running a claim.

    Attributes:
        claim: The claim.
        profile: The profile it ran with.
        verdict: The overall verdict; None when the claim failed to run.
        findings: The judged sub-statements, the headline first.
        tables: The evidence.
        seconds: Wall time of the experiment and its judgement.
        status: ``"done"`` or ``"failed"``.
        error: One line that says why it failed.
        provenance: Versions, threads, settings, revision and time.
        checksums: The SHA-256 of each table's file, by name.
    """

    claim: Claim
    profile: str
    verdict: Verdict | None = None
    findings: list[Finding] = field(default_factory=list)
    tables: Tables = field(default_factory=dict)
    seconds: float = 0.0
    status: str = "done"
    error: str = ""
    provenance: Mapping[str, object] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """The profile whose settings were used, which is not the one asked for where a paper has none."""
        return "full" if self.profile == "paper" and not self.claim.paper else self.profile

    def record(self) -> dict[str, object]:
        """The entry of claims.json, strict JSON: non-finite numbers are the strings "nan", "inf", "-inf".

        ``float(entry)`` reads a number back whichever form it has. The five fields ``estimate``,
        ``interval``, ``n``, ``test`` and ``threshold`` are those of the headline, null when the claim failed.
        """
        from losslab.lecture.errata import ERRATA

        findings = [_finding_record(finding) for finding in self.findings]
        headline = findings[0] if findings else {}
        claim = self.claim
        return {
            "id": claim.id,
            "section": claim.section,
            "title": claim.title,
            "statement": claim.statement,
            "source": claim.source,
            "profile": self.profile,
            "settings": self.settings,
            "status": self.status,
            "error": self.error,
            "verdict": None if self.verdict is None else str(self.verdict),
            **{key: headline.get(key) for key in ("estimate", "interval", "n", "test", "threshold")},
            "findings": findings,
            "seconds": self.seconds,
            "caveats": list(claim.caveats),
            "errata": [ERRATA[name].record() for name in claim.errata],
            "provenance": dict(self.provenance),
            "tables": self.checksums,
        }


def _finding_record(finding: Finding) -> dict[str, object]:
    return {
        "name": finding.name,
        "verdict": str(finding.verdict),
        "estimate": _number(finding.estimate),
        "interval": [_number(end) for end in finding.interval],
        "n": int(finding.n),
        "test": finding.test,
        "threshold": finding.threshold,
        "note": finding.note,
    }


def _number(value: float) -> float | str:
    value = float(value)
    return value if abs(value) < float("inf") else str(value)
