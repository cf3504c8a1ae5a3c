"""Runs claims one after another, keeps what is done, and lets one failure stop nothing else.

The output folder holds ``claims.json`` (the settings and one entry a claim, with a checksum for each table),
``tables/<claim>-<name>.parquet``, ``logs/<claim>.txt`` for a claim that failed, what ``publish`` writes, and
in ``stages`` what long experiments keep so as to be resumed in their midst.
A verdict is always judged on tables as read back from parquet, so a resumed run says what the first one said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from losslab.errors import LosslabError
from losslab.files import write_atomically
from losslab.lecture import registry
from losslab.lecture.claim import Claim, Lab, Result, Tables
from losslab.lecture.tuning import at_edge
from losslab.lecture.verdicts import join_notes
from losslab.provenance import machine, version

if TYPE_CHECKING:
    import pandas as pd

RECORDS = "claims.json"
REPORT = "report.html"
STAGES = "stages"
OWNED = ("tables", "logs", STAGES, REPORT, RECORDS)
"""What a run leaves in its folder, in the order in which it is moved aside for the next run."""


class Event(NamedTuple):
    """Something a user wants to see while claims run.

    ``kind`` is ``"notice"`` (about the folder or a claim), ``"start"``, ``"kept"``, ``"done"`` or
    ``"failed"``; the last three carry the result.
    """

    kind: Literal["notice", "start", "kept", "done", "failed"]
    text: str
    claim: Claim | None = None
    result: Result | None = None


Publish = Callable[[list[Result], Path], None]
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An event callback that does nothing."""


def unpublished(results: list[Result], out: Path) -> None:
    """A publisher that writes no report."""


def run(
    claims: Sequence[Claim],
    lab: Lab,
    out: Path,
    resume: bool = False,
    publish: Publish = unpublished,
    on_event: OnEvent = ignore,
    known: Mapping[str, Claim] | None = None,
) -> list[Result]:
    """Run the claims, writing tables, claims.json and the report after each one.

    Args:
        claims: What to run, in this order.
        lab: The profile, seeds and data of every experiment.
        out: The folder for the results. Without ``resume``, what a previous run left there is moved to
            ``out/previous-<n>`` first, and an event says so.
        resume: Keep the finished claims in ``out``, also those not asked for now; run those again that failed
            or whose tables are missing or damaged.
        publish: Called with all results so far, at the start and after each claim; writes the report.
        on_event: Called as things happen.
        known: Where to look up kept claims that are not in ``claims``; all that are built by default.

    Returns:
        One result a claim, kept ones included, in the order of the notes. A claim that raised has the status
        "failed" and a one-line error.

    Raises:
        LosslabError: ``out`` cannot be written; or, when resuming, it holds something else than a run with
            the same settings.
        KeyboardInterrupt: As it comes; what was done is on disk.
    """
    out = Path(out)
    if not resume:
        _move_aside(out, on_event)
    records = _read_records(out / RECORDS, settings(lab)) if resume else []
    kept, broken = _keep(records, claims, known, out, on_event)
    book = _Book(out, lab, kept, publish)
    book.write()
    staged = dataclasses.replace(lab, folder=out / STAGES)
    for claim in dict.fromkeys([*claims, *broken]):
        if claim.id in kept:
            continue
        on_event(Event("start", claim.title, claim))
        result = _attempt(claim, staged, out)
        book.add(result)
        on_event(Event("done" if result.status == "done" else "failed", result.error, claim, result))
    return book.results()


def settings(lab: Lab) -> dict[str, object]:
    """What must be the same in every part of one run, as JSON values."""
    return {
        "losslab": version("losslab"),
        "torch": version("torch"),
        "profile": lab.profile,
        "seeds": lab.seeds,
        "data": None if lab.data is None else str(lab.data),
    }


@dataclass
class _Book:
    """The results so far and their place on disk."""

    out: Path
    lab: Lab
    kept: Mapping[str, Result]
    publish: Publish

    def __post_init__(self) -> None:
        self.by_id = dict(self.kept)

    def results(self) -> list[Result]:
        return [self.by_id[name] for name in sorted(self.by_id, key=registry.natural)]

    def add(self, result: Result) -> None:
        self.by_id[result.claim.id] = result
        self.write()

    def write(self) -> None:
        content = {"settings": settings(self.lab), "claims": [result.record() for result in self.results()]}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self.out / RECORDS, text.encode())
        self.publish(self.results(), self.out)


def _attempt(claim: Claim, lab: Lab, out: Path) -> Result:
    """Run one claim; whatever it raises becomes a failed result with a log, whatever it made is kept."""
    result = Result(claim, lab.profile, provenance=settings(lab) | machine())
    contents: dict[str, bytes] = {}
    start = time.perf_counter()
    try:
        contents = {name: _to_parquet(table) for name, table in claim.experiment(lab).items()}
        _judge(result, contents)
    except Exception as error:
        result.status, result.error = "failed", _one_line(error)
        write_atomically(out / "logs" / f"{claim.id}.txt", traceback.format_exc().encode())
    result.seconds = round(time.perf_counter() - start, 3)
    for name, content in contents.items():
        write_atomically(_table_path(out, claim.id, name), content)
        result.checksums[name] = _checksum(content)
    return result


def _judge(result: Result, contents: Mapping[str, bytes]) -> None:
    import pandas as pd

    tables: Tables = {name: pd.read_parquet(io.BytesIO(content)) for name, content in contents.items()}
    findings = result.claim.judge(tables)
    if not findings:
        raise LosslabError(f"{result.claim.id} gave no finding: its judge must return at least one")
    if edges := at_edge(tables):
        findings = [dataclasses.replace(findings[0], note=join_notes(findings[0].note, edges)), *findings[1:]]
    result.tables, result.findings = tables, findings
    result.verdict = result.claim.combine(findings)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, LosslabError) else f"{type(error).__name__}: {text}"


def _to_parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()


def _table_path(out: Path, claim_id: str, name: str) -> Path:
    return out / "tables" / f"{claim_id}-{name}.parquet"


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _keep(
    records: list[dict[str, Any]],
    claims: Sequence[Claim],
    known: Mapping[str, Claim] | None,
    out: Path,
    on_event: OnEvent,
) -> tuple[dict[str, Result], list[Claim]]:
    """The results to take over from a previous run, and the claims whose results are damaged."""
    asked = {claim.id: claim for claim in claims}
    foreign = {record["id"] for record in records} - set(asked)
    catalogue = dict(registry.claims() if foreign and known is None else known or {}) | asked
    kept: dict[str, Result] = {}
    broken: list[Claim] = []
    for record in records:
        claim = catalogue.get(record["id"])
        if claim is None:
            raise LosslabError(
                f"{out / RECORDS} holds {record['id']}, no claim of this version: choose another --out"
            )
        if record["status"] != "done" and claim.id in asked:
            continue
        try:
            kept[claim.id] = _reload(record, claim, out)
        except Exception as error:  # whatever is wrong with a kept result, running the claim again mends it
            broken.append(claim)
            on_event(Event("notice", f"{claim.id} runs again: {_one_line(error)}", claim))
        else:
            on_event(Event("kept", claim.title, claim, kept[claim.id]))
    return kept, broken


def _reload(record: dict[str, Any], claim: Claim, out: Path) -> Result:
    result = Result(
        claim,
        record["profile"],
        seconds=record["seconds"],
        status=record["status"],
        error=record["error"],
        provenance=record["provenance"],
        checksums=record["tables"],
    )
    if result.status == "done":
        _judge(
            result, {name: _read_table(out, claim.id, name, record["tables"]) for name in record["tables"]}
        )
    return result


def _read_table(out: Path, claim_id: str, name: str, checksums: Mapping[str, str]) -> bytes:
    path = _table_path(out, claim_id, name)
    content = path.read_bytes() if path.is_file() else b""
    if _checksum(content) != checksums[name]:
        raise LosslabError(f"{path} is {'damaged' if content else 'missing'}")
    return content


def _read_records(path: Path, wanted: Mapping[str, object]) -> list[dict[str, Any]]:
    """The entries of a claims.json made with the wanted settings; none when there is no such file."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_bytes())
        made_with, records = dict(content["settings"]), list(content["claims"])
        if not all({"id", "status"} <= set(record) for record in records):
            raise ValueError("an entry has no id or no status")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LosslabError(
            f"{path} is not a file of this laboratory ({_one_line(error)}): "
            "choose another --out, or run without --resume, which moves it aside"
        ) from error
    differ = [key for key in wanted if made_with.get(key) != wanted[key]]
    if differ:
        was = ", ".join(f"{key} {made_with.get(key)}" for key in differ)
        now = ", ".join(f"{key} {wanted[key]}" for key in differ)
        raise LosslabError(
            f"{path} was made with {was}, and this run has {now}: "
            "resume with the same settings, or choose another --out"
        )
    return records


def _move_aside(out: Path, on_event: OnEvent) -> None:
    """Move what a previous run left to the first free ``previous-<n>``; each entry moves by one rename."""
    left = [name for name in OWNED if (out / name).exists()]
    if not left:
        return
    number = 1
    while (out / f"previous-{number}").exists():
        number += 1
    target = out / f"previous-{number}"
    try:
        target.mkdir()
        for name in left:
            os.replace(out / name, target / name)
    except OSError as error:
        raise LosslabError(
            f"cannot move the previous results in {out} ({error.strerror}): choose another --out, or --resume"
        ) from error
    on_event(Event("notice", f"the previous results are now in {target}"))
