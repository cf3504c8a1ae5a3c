"""Running claims: what is written, what survives failure, interruption, damage and a second run."""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pandas as pd
import pytest

from losslab.errors import LosslabError
from losslab.lecture.claim import Claim, Lab, Result, Tables, Verdict
from losslab.lecture.runner import Event, run
from losslab.lecture.verdicts import bound


class Experiment:
    """An experiment that counts how often it runs and can be told to raise."""

    def __init__(self, value: float = 2.0) -> None:
        self.runs, self.value = 0, value
        self.error: BaseException | None = None

    def __call__(self, lab: Lab) -> Tables:
        self.runs += 1
        if self.error is not None:
            raise self.error
        return {
            "values": pd.DataFrame({"x": [self.value, float("nan"), float("inf")]}),
            "names": pd.DataFrame({"rule": ["adam", "sgd"], "steps": [3, 4]}),
        }


def judge(tables: Tables) -> list:
    value = float(tables["values"]["x"].iloc[0])
    return [bound("x", value, (value, value), 3, "the first value", at_least=1.0)]


def toy(name: str, experiment: Callable[[Lab], Tables], judge: Callable = judge) -> Claim:
    return Claim(name, "6.2", f"title of {name}", "statement", "source", experiment, judge)


def records(out: Path) -> dict[str, dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((out / "claims.json").read_text("utf-8"), parse_constant=refuse)
    return {entry["id"]: entry for entry in content["claims"]}


@pytest.fixture
def experiments() -> list[Experiment]:
    return [Experiment(2.0), Experiment(0.5), Experiment(3.0)]


@pytest.fixture
def claims(experiments: list[Experiment]) -> list[Claim]:
    return [toy(name, experiment) for name, experiment in zip(("C8", "C9", "C10"), experiments, strict=True)]


def test_everything_is_on_disk_after_each_claim(tmp_path: Path, claims: list[Claim]) -> None:
    events: list[Event] = []
    published: list[list[str]] = []

    def publish(results: list[Result], out: Path) -> None:
        published.append([result.claim.id for result in results])
        assert list(records(out)) == published[-1]
        for entry in records(out).values():
            for name in entry["tables"]:
                pd.read_parquet(out / "tables" / f"{entry['id']}-{name}.parquet")

    results = run(claims, Lab(), tmp_path / "new" / "out", publish=publish, on_event=events.append)
    assert published == [[], ["C8"], ["C8", "C9"], ["C8", "C9", "C10"]]
    assert [result.verdict for result in results] == [Verdict.HOLDS, Verdict.FAILS, Verdict.HOLDS]
    assert [(event.kind, event.claim and event.claim.id) for event in events] == [
        (kind, name) for name in ("C8", "C9", "C10") for kind in ("start", "done")
    ]
    entry = records(tmp_path / "new" / "out")["C9"]
    assert (entry["verdict"], entry["estimate"], entry["interval"]) == ("does not hold", 0.5, [0.5, 0.5])
    assert entry["provenance"]["profile"] == "quick"
    assert {"losslab", "torch", "numpy", "python", "threads", "revision", "seeds"} <= set(entry["provenance"])
    assert not list((tmp_path / "new" / "out").rglob("*.tmp"))


def test_a_claim_that_raises_stops_no_other(
    tmp_path: Path, claims: list[Claim], experiments: list[Experiment]
) -> None:
    experiments[0].error = RuntimeError("no\n  labels")
    events: list[Event] = []
    results = run(claims, Lab(), tmp_path, on_event=events.append)
    assert [result.status for result in results] == ["failed", "done", "done"]
    assert (results[0].error, results[0].verdict) == ("RuntimeError: no labels", None)
    assert records(tmp_path)["C8"]["error"] == "RuntimeError: no labels"
    log = (tmp_path / "logs" / "C8.txt").read_text("utf-8")
    assert "Traceback" in log
    assert "in __call__" in log
    assert [event.kind for event in events][:2] == ["start", "failed"]


@pytest.mark.parametrize(
    ("judge", "error"),
    [
        (lambda tables: [], "C8 gave no finding: its judge must return at least one"),
        (lambda tables: tables["absent"], "KeyError: 'absent'"),
    ],
)
def test_a_judge_that_fails_leaves_the_evidence(tmp_path: Path, judge: Callable, error: str) -> None:
    (result,) = run([toy("C8", Experiment(), judge)], Lab(), tmp_path)
    assert (result.status, result.error) == ("failed", error)
    assert pd.read_parquet(tmp_path / "tables" / "C8-values.parquet")["x"].iloc[0] == 2.0
    assert set(records(tmp_path)["C8"]["tables"]) == {"values", "names"}


@pytest.mark.parametrize("edge", [True, False])
def test_a_rate_at_the_edge_of_its_grid_is_told(tmp_path: Path, edge: bool) -> None:
    def experiment(lab: Lab) -> Tables:
        tuning = pd.DataFrame({"arm": ["adam", "sgd"], "lr": [0.1, 0.2], "at_edge": [edge, False]})
        return {"values": pd.DataFrame({"x": [2.0]}), "tuning": tuning}

    run([toy("C8", experiment)], Lab(), tmp_path)
    note = records(tmp_path)["C8"]["findings"][0]["note"]
    assert note == ("a tuned rate lay at the edge of its grid: tuning (adam)" if edge else "")


def test_a_table_that_parquet_cannot_hold_is_a_failure(tmp_path: Path) -> None:
    broken = toy("C8", lambda lab: {"t": pd.DataFrame({"x": [object()]})})
    (result,) = run([broken], Lab(), tmp_path)
    assert result.status == "failed"
    assert "\n" not in result.error


def test_resume_keeps_what_is_done_and_reruns_what_failed(
    tmp_path: Path, claims: list[Claim], experiments: list[Experiment]
) -> None:
    experiments[1].error = RuntimeError("once")
    before = run(claims, Lab(), tmp_path)
    experiments[1].error = None
    events: list[Event] = []
    after = run(claims, Lab(), tmp_path, resume=True, on_event=events.append)
    assert [experiment.runs for experiment in experiments] == [1, 2, 1]
    assert [event.kind for event in events] == ["kept", "kept", "start", "done"]
    assert [result.status for result in after] == ["done"] * 3
    for old, new in ((before[0], after[0]), (before[2], after[2])):
        assert new.findings == old.findings
        assert new.record() == old.record()
        for name, table in old.tables.items():
            pd.testing.assert_frame_equal(table, new.tables[name])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        lambda path: path.write_bytes(b""),
    ],
    ids=["missing", "torn", "altered", "empty"],
)
def test_resume_reruns_a_claim_whose_table_is_damaged(
    tmp_path: Path, claims: list[Claim], experiments: list[Experiment], damage: Callable[[Path], None]
) -> None:
    run(claims, Lab(), tmp_path)
    damage(tmp_path / "tables" / "C9-values.parquet")
    events: list[Event] = []
    results = run(claims, Lab(), tmp_path, resume=True, on_event=events.append)
    assert [experiment.runs for experiment in experiments] == [1, 2, 1]
    assert [result.status for result in results] == ["done"] * 3
    (notice,) = [event for event in events if event.kind == "notice"]
    assert "C9 runs again" in notice.text
    assert "C9-values.parquet" in notice.text


def test_resume_with_other_claims_keeps_all(
    tmp_path: Path, claims: list[Claim], experiments: list[Experiment]
) -> None:
    experiments[0].error = RuntimeError("always")
    run(claims[:2], Lab(), tmp_path)
    known = {claim.id: claim for claim in claims}
    results = run(claims[2:], Lab(), tmp_path, resume=True, known=known)
    assert [(result.claim.id, result.status) for result in results] == [
        ("C8", "failed"),
        ("C9", "done"),
        ("C10", "done"),
    ]
    assert list(records(tmp_path)) == ["C8", "C9", "C10"]
    assert [experiment.runs for experiment in experiments] == [1, 1, 1]
    # one that is damaged runs again even if it was not asked for, so that nothing is lost
    (tmp_path / "tables" / "C9-names.parquet").unlink()
    run(claims[2:], Lab(), tmp_path, resume=True, known=known)
    assert [experiment.runs for experiment in experiments] == [1, 2, 1]


def test_resume_refuses_other_settings(tmp_path: Path, claims: list[Claim]) -> None:
    run(claims[:1], Lab(), tmp_path)
    before = (tmp_path / "claims.json").read_bytes()
    with pytest.raises(
        LosslabError, match="made with profile quick, seeds None, and this run has profile full, seeds 3"
    ):
        run(claims, Lab("full", seeds=3), tmp_path, resume=True)
    assert (tmp_path / "claims.json").read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"claims": []}', '{"settings": {}, "claims": [{"id": 1}]}']
)
def test_resume_refuses_a_foreign_file(tmp_path: Path, claims: list[Claim], content: str) -> None:
    (tmp_path / "claims.json").write_text(content)
    with pytest.raises(LosslabError, match=r"is not a file of this laboratory .* run without --resume"):
        run(claims, Lab(), tmp_path, resume=True)
    assert (tmp_path / "claims.json").read_text() == content


def test_resume_refuses_a_claim_it_does_not_know(tmp_path: Path, claims: list[Claim]) -> None:
    run(claims[:2], Lab(), tmp_path)
    with pytest.raises(LosslabError, match="holds C9, no claim of this version"):
        run(claims[:1], Lab(), tmp_path, resume=True, known={})


def test_resume_of_nothing_is_a_first_run(tmp_path: Path, claims: list[Claim]) -> None:
    assert len(run(claims, Lab(), tmp_path / "new", resume=True)) == 3


def test_a_claim_finds_its_stages_again_when_it_is_resumed(tmp_path: Path) -> None:
    found: list[list[str]] = []

    def experiment(lab: Lab) -> Tables:
        assert lab.folder is not None
        lab.folder.mkdir(parents=True, exist_ok=True)
        found.append([path.name for path in lab.folder.iterdir()])
        (lab.folder / "half").touch()
        if len(found) == 1:
            raise RuntimeError("killed")
        return {"values": pd.DataFrame({"x": [2.0]})}

    for resume in (False, True, False):
        run([toy("C8", experiment)], Lab(), tmp_path, resume=resume)
    assert found == [[], ["half"], []]  # a new run begins anew


def test_a_second_run_moves_the_first_aside(tmp_path: Path, claims: list[Claim]) -> None:
    def publish(results: list[Result], out: Path) -> None:
        (out / "report.html").write_text(str(len(results)))

    (tmp_path / "mine.txt").write_text("not of the laboratory")
    run(claims[:2], Lab(), tmp_path, publish=publish)
    first = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    events: list[Event] = []
    run(claims[:1], Lab("full"), tmp_path, publish=publish, on_event=events.append)
    moved = {path.name: path.read_bytes() for path in (tmp_path / "previous-1").rglob("*") if path.is_file()}
    assert moved == {name: content for name, content in first.items() if name != "mine.txt"}
    assert events[0].kind == "notice"
    assert str(tmp_path / "previous-1") in events[0].text
    assert list(records(tmp_path)) == ["C8"]
    assert [path.name for path in (tmp_path / "tables").iterdir() if "C9" in path.name] == []
    run(claims[:1], Lab(), tmp_path, publish=publish)
    assert (tmp_path / "previous-2" / "claims.json").exists()
    assert (tmp_path / "mine.txt").exists()


def test_an_interrupt_keeps_what_is_done(
    tmp_path: Path, claims: list[Claim], experiments: list[Experiment]
) -> None:
    experiments[1].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(claims, Lab(), tmp_path)
    assert list(records(tmp_path)) == ["C8"]
    experiments[1].error = None
    run(claims, Lab(), tmp_path, resume=True)
    assert [experiment.runs for experiment in experiments] == [1, 2, 1]


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_runs(
    tmp_path: Path, claims: list[Claim], experiments: list[Experiment]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LosslabError, match="cannot write"):
        run(claims, Lab(), tmp_path / "file" / "out")
    assert [experiment.runs for experiment in experiments] == [0, 0, 0]


def test_a_full_disk_is_an_error_that_loses_nothing(
    tmp_path: Path, claims: list[Claim], experiments: list[Experiment]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = toy("C9", lambda lab: {"values": pd.DataFrame({"x": pd.Series(range(300_000)) ** 0.5})})
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (200_000, limits[1])
    )  # writing past it fails as a full disk does
    try:
        with pytest.raises(LosslabError, match=r"cannot write .*C9-values.parquet"):
            run([claims[0], big, claims[2]], Lab(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(records(tmp_path)) == ["C8"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert [result.status for result in run([claims[0], big], Lab(), tmp_path, resume=True)] == [
        "done",
        "done",
    ]
    assert experiments[0].runs == 1


SCRIPT = dedent("""
    import sys, time
    from pathlib import Path
    import pandas as pd
    from losslab.lecture.claim import Claim, Lab
    from losslab.lecture.runner import run
    from losslab.lecture.verdicts import bound

    def claim(name, wait):
        def experiment(lab):
            with open(FOLDER / "runs.txt", "a") as file:
                file.write(name + " ")
            time.sleep(wait if __name__ == "__main__" else 0)
            return {"t": pd.DataFrame({"x": [1.0]})}
        def judge(tables):
            return [bound("x", 1.0, (1.0, 1.0), 1, "one", at_least=1.0)]
        return Claim(name, "6.2", name, "statement", "source", experiment, judge)

    FOLDER = Path(__file__).parent
    CLAIMS = [claim("C8", 0), claim("C9", 60)]
    if __name__ == "__main__":
        run(CLAIMS, Lab(), FOLDER / "out")
""")


def test_a_killed_run_resumes_with_the_finished_claims(tmp_path: Path) -> None:
    script = tmp_path / "lecture.py"
    script.write_text(SCRIPT)
    source = str(Path(__file__).parents[2] / "src")
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": source})
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "runs.txt").exists() and "C9" in (tmp_path / "runs.txt").read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(records(tmp_path / "out")) == ["C8"]
    claims = runpy.run_path(str(script))["CLAIMS"]
    results = run(claims, Lab(), tmp_path / "out", resume=True)
    assert [result.status for result in results] == ["done", "done"]
    assert (tmp_path / "runs.txt").read_text().split() == ["C8", "C9", "C9"]
