"""Files that are whole or refused, and folders in which nothing is lost."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.engine.cases import NAMED, task_of

from losslab import EarlyStopping, LosslabError, Population, TorchRule, train
from losslab.engine import checkpoints
from losslab.rules import Adam

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b/c": torch.tensor([1, -1]), "empty": torch.empty(0, 3),
           "half": torch.ones((), dtype=torch.bfloat16), "nan": torch.tensor([torch.nan, 1.0])}  # fmt: skip
META = {"step": 12, "settings": {"lr": [0.1, 1e-300], "name": "ü"}}


def run(out: Path, **options: Any) -> Population:
    settings = {
        "seeds": 2,
        "steps": 4,
        "batch_size": 6,
        "execution": "stacked",
        "out": out,
        "checkpoint_every": 0,
    }
    rule = options.pop("rule", Adam(lr=[0.01, 0.02]))
    task = options.pop("task", task_of(NAMED["bn1d"]))
    return train(task, rule, **{**settings, **options})


def newest(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


# -- one file ------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.safetensors"
    checkpoints.write(path, TENSORS, META)
    tensors, meta = checkpoints.read(path)
    assert meta == META
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


@given(st.data())
def test_no_flipped_bit_and_no_lost_byte_goes_unseen(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    checkpoints.write(path, TENSORS, META)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
    with contextlib.suppress(LosslabError):
        tensors, meta = checkpoints.read(path)
        assert meta == META  # the bit was in the padding
        torch.testing.assert_close(tensors, TENSORS, rtol=0, atol=0, equal_nan=True)


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(LosslabError, match="does not exist: pass the folder of a saved run"):
        checkpoints.read(tmp_path / "none")
    with pytest.raises(LosslabError, match="is torn or no safetensors file"):
        checkpoints.read(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(LosslabError, match="is torn or no safetensors file"):
        checkpoints.read(tmp_path / "text")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(LosslabError, match="was not written by losslab"):
        checkpoints.read(tmp_path / "foreign")
    save_file({"a": torch.ones(2)}, tmp_path / "copied", {"losslab": json.dumps(META), "digest": "0"})
    with pytest.raises(LosslabError, match="is damaged, its checksum differs"):
        checkpoints.read(tmp_path / "copied")


# -- a folder of checkpoints ---------------------------------------------------------------------------


def test_two_checkpoints_are_kept_and_leftovers_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        (tmp_path / f".{checkpoints.name(step)}.123.tmp").write_bytes(b"half")
        checkpoints.save_step(tmp_path, step, TENSORS, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoints.name(10), checkpoints.name(11)]
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found[1:] == ({"step": 11}, [])
    assert checkpoints.newest(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "flipped"])
def test_a_damaged_newest_checkpoint_falls_back_and_the_run_ends_the_same(
    tmp_path: Path, damage: str
) -> None:
    unbroken, out = run(tmp_path / "unbroken"), tmp_path / "run"
    run(out, steps=3)
    last, content = newest(out)[-1], bytearray(newest(out)[-1].read_bytes())
    if damage == "foreign":
        save_file({"a": torch.ones(2)}, last)
    elif damage == "flipped":
        content[-3] ^= 1
        last.write_bytes(content)
    else:
        last.write_bytes(content[: len(content) // 2 if damage == "torn" else 0])
    (out / "checkpoints" / ".step-000000000004.safetensors.9.tmp").write_bytes(content[:100])
    resumed = run(out, resume=True)
    (notice,) = resumed.notices
    assert str(last) in notice
    assert notice.endswith("an older checkpoint was used")
    assert torch.equal(resumed.points.matrix(), unbroken.points.matrix())
    assert len(newest(out)) == 2
    for path in newest(out):
        path.write_bytes(b"")
    with pytest.raises(LosslabError, match=r"no checkpoint of .* can be used"):
        run(out, resume=True, steps=9)
    assert (out / "population.safetensors").stat().st_size > 1000


def test_a_folder_that_holds_a_run_is_not_taken_for_another(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(LosslabError, match="already holds a run: resume it"):
        run(tmp_path, seeds=[5, 6])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    saved, meta = checkpoints.read(tmp_path / "population.safetensors")
    assert meta["step"] == 4
    assert meta["settings"] == first.settings()
    assert torch.equal(saved["weights/0.weight"], first.points["0.weight"])


@pytest.mark.parametrize("resume", [True, False])
def test_an_outcome_without_checkpoints_is_not_written_over(tmp_path: Path, resume: bool) -> None:
    run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(LosslabError, match="the outcome of a run, and no checkpoint to go on from: pass"):
        run(tmp_path, resume=resume)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"rule": Adam(lr=[0.01, 0.03])}, r"lr was \[0.01, 0.02\], now \[0.01, 0.03\]"),
    ({"rule": "sgd"}, "rule was 'adam', now 'sgd'"),
    ({"seeds": [0, 2]}, r"seeds was \[0, 1\], now \[0, 2\]"),
    ({"batch_size": 7}, "batch_size was 6, now 7"),
    ({"dtype": "float64"}, "dtype was 'float32', now 'float64'"),
    ({"steps": 3}, "steps was 4, now 3"),
    ({"shared_batches": True}, "shared_batches was False, now True"),
    ({"stop": EarlyStopping("test_loss")}, "stop was None, now"),
    ({"task": task_of(NAMED["mlp-relu"])}, "parameters was .*task was 'bn1d', now 'mlp-relu'"),
    ({"task": task_of(NAMED["bn1d"], examples=18)}, "examples was 17, now 18"),
]


@pytest.mark.parametrize(("options", "told"), OTHER, ids=lambda v: v if isinstance(v, str) else "")
def test_a_run_of_other_settings_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        LosslabError, match=f"the saved run has other settings .*{told}.*: use the same, or another"
    ):
        run(tmp_path, resume=True, **options)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_settings_that_print_alike_are_alike(tmp_path: Path) -> None:
    def schedule(step: int) -> float:
        return 0.01 / (1 + step)

    def rule() -> TorchRule:
        return TorchRule(torch.optim.Adam, lr=0.01, betas=(0.8, 0.9))

    task = task_of(NAMED["mlp-relu"])
    options: dict[str, Any] = {"task": task, "record": lambda step: step % 2 == 0, "evaluate": range(0, 9, 2)}
    run(tmp_path / "a", rule=rule(), **options)
    run(tmp_path / "b", rule=Adam(lr=schedule), **options)
    again = {**options, "record": lambda step: step % 2 == 0}
    assert run(tmp_path / "a", rule=rule(), resume=True, **again).step == 4
    assert run(tmp_path / "b", rule=Adam(lr=schedule), resume=True, **again).step == 4


# -- disks ---------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LosslabError, match=r"cannot write .*: check the path, or choose another folder"):
            run(out)
    assert (tmp_path / "file").read_text() == "kept"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a full disk: no file may grow beyond ``size`` bytes (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    unbroken, out = run(tmp_path / "unbroken"), tmp_path / "run"
    run(out, steps=2)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with largest_file(1000), pytest.raises(LosslabError, match=r"cannot write .*File too large"):
        run(out, resume=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    found = checkpoints.newest(out / "checkpoints")
    assert found is not None
    assert found[1]["step"] == 2
    assert torch.equal(run(out, resume=True).points.matrix(), unbroken.points.matrix())
