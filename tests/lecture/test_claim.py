"""The lab, the ways to combine findings, the registry, and the errata."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from losslab.errors import LosslabError
from losslab.lecture.claim import Claim, Finding, Lab, Result, Verdict, agreement, decided_by
from losslab.lecture.errata import ERRATA
from losslab.lecture.registry import select

HOLDS, MIXED, FAILS, UNDECIDED = Verdict.HOLDS, Verdict.MIXED, Verdict.FAILS, Verdict.UNDECIDED


def finding(name: str, verdict: Verdict, estimate: float = 1.0) -> Finding:
    return Finding(name, verdict, estimate, (0.5, float("inf")), np.int64(7), "a test", "≥ 1")  # type: ignore[arg-type]


def claim(name: str, section: str, combine: Callable = agreement, errata: tuple[str, ...] = ()) -> Claim:
    evidence = {"t": pd.DataFrame({"x": [1.0]})}
    return Claim(
        name,
        section,
        f"title of {name}",
        "statement",
        "source",
        lambda lab: evidence,
        lambda tables: [],
        combine=combine,
        errata=errata,
    )


KNOWN = {
    name: claim(name, section) for name, section in {"C8": "6.2", "C16": "6.2.3", "C28": "6.3.3"}.items()
}


@pytest.mark.parametrize(
    ("profile", "seeds", "picked", "replicates"),
    [
        ("quick", None, (1, 1, 1), 1),
        ("full", None, (1, 2, 2), 2),
        ("paper", None, (1, 2, 3), 3),
        ("paper", 9, (1, 2, 3), 9),
    ],
)
def test_lab_picks_by_profile(
    profile: str, seeds: int | None, picked: tuple[int, ...], replicates: int
) -> None:
    lab = Lab(profile, seeds)
    assert (lab.pick(1), lab.pick(1, 2), lab.pick(1, 2, 3)) == picked
    assert lab.replicates(1, 2, 3) == replicates
    assert Lab(profile).pick(0, 0, 0) == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"profile": "ful"}, "no profile is named 'ful': did you mean 'full'?"),
        ({"seeds": 0}, "seeds is 0"),
        ({"data": Path("/nowhere/at/all")}, "the data folder /nowhere/at/all does not exist"),
    ],
)
def test_lab_refuses(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(LosslabError, match=re.escape(sentence)):
        Lab(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdicts", "overall"),
    [
        ([HOLDS], HOLDS),
        ([HOLDS, HOLDS], HOLDS),
        ([FAILS, FAILS], FAILS),
        ([UNDECIDED, UNDECIDED], UNDECIDED),
        ([HOLDS, UNDECIDED], UNDECIDED),
        ([HOLDS, FAILS], MIXED),
        ([HOLDS, MIXED], MIXED),
        ([MIXED, MIXED], MIXED),
        ([FAILS, UNDECIDED], MIXED),
        ([HOLDS, FAILS, UNDECIDED], MIXED),
    ],
)
def test_agreement(verdicts: list[Verdict], overall: Verdict) -> None:
    findings = [finding(str(index), verdict) for index, verdict in enumerate(verdicts)]
    assert agreement(findings) is overall
    assert agreement(findings[::-1]) is overall


def test_decided_by_looks_at_the_named_findings_only() -> None:
    findings = [finding("control", FAILS), finding("effect", HOLDS), finding("size", UNDECIDED)]
    assert decided_by("effect")(findings) is HOLDS
    assert decided_by("effect", "size")(findings) is UNDECIDED
    with pytest.raises(LosslabError, match="no finding is named efect"):
        decided_by("efect")(findings)


def test_record_is_strict_json_with_the_headline_first() -> None:
    findings = [finding("a", HOLDS, float("nan")), finding("b", FAILS)]
    result = Result(claim("C16", "6.2.3", errata=("E7",)), "quick", MIXED, findings, seconds=1.2)
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["id"] == "C16"
    assert record["verdict"] == "mixed"
    assert [record[key] for key in ("estimate", "interval", "n", "test", "threshold")] == [
        "nan",
        [0.5, "inf"],
        7,
        "a test",
        "≥ 1",
    ]
    assert [entry["verdict"] for entry in record["findings"]] == ["holds", "does not hold"]
    assert record["errata"] == [json.loads(json.dumps(ERRATA["E7"].record()))]
    assert float(record["interval"][1]) == float("inf")
    assert Result(claim("C1", "6.1"), "quick", status="failed").record()["estimate"] is None


@pytest.mark.parametrize(
    ("ids", "sections", "selected"),
    [
        ([], [], ["C8", "C16", "C28"]),
        (["c16"], [], ["C16"]),
        ([], ["6.2"], ["C8", "C16"]),
        ([], ["6.2.3"], ["C16"]),
        ([], ["§6.3"], ["C28"]),
        ([], ["6"], ["C8", "C16", "C28"]),
        (["C28"], ["6.2.3"], ["C16", "C28"]),
    ],
)
def test_select(ids: list[str], sections: list[str], selected: list[str]) -> None:
    assert [chosen.id for chosen in select(ids, sections, KNOWN)] == selected


@pytest.mark.parametrize(
    ("ids", "sections", "sentence"),
    [
        (["C17"], [], "no claim is named 'C17': did you mean"),
        ([], ["6.4"], "no section is named '6.4': did you mean"),
        ([], ["6.20"], "no section is named '6.20'"),
    ],
)
def test_select_names_the_nearest(ids: list[str], sections: list[str], sentence: str) -> None:
    with pytest.raises(LosslabError, match=re.escape(sentence)):
        select(ids, sections, KNOWN)


def test_every_erratum_is_there_and_says_something() -> None:
    assert list(ERRATA) == [f"E{number}" for number in range(1, 45)]
    for name, erratum in ERRATA.items():
        assert erratum.id == name
        assert all((erratum.where, erratum.printed, erratum.correct))
        assert erratum.printed != erratum.correct
        assert all(re.fullmatch(r"C([1-9]|[1-5]\d|6[0-8])", number) for number in erratum.claims)


@pytest.mark.parametrize(
    ("profile", "paper", "settings"),
    [("paper", False, "full"), ("paper", True, "paper"), ("full", False, "full"), ("quick", True, "quick")],
)
def test_a_result_tells_whose_settings_it_ran(profile: str, paper: bool, settings: str) -> None:
    ran = Result(replace(KNOWN["C8"], paper=paper), profile)
    assert (ran.record()["profile"], ran.record()["settings"]) == (profile, settings)
