"""Unfinished work: killed anywhere, gone on with, and the same in the end."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.paths.cases import at, bent, bent_task, trained

from losslab.engine import checkpoints
from losslab.errors import LosslabError
from losslab.paths import (
    Cycle,
    Landscape,
    Path,
    Slopes,
    Work,
    auto_bands,
    connect,
    relax,
    stretched,
    strings,
    train_curves,
)
from losslab.paths.path import packed, settled, unpacked
from losslab.rules import make

PAIRS = [(0, 1), (2, 3)]


class Killed(BaseException):
    """What nobody catches."""


def killer(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The process ends right after so many writes."""
    writes = []

    def write(path: Any, tensors: Any, meta: Any, real: Any = checkpoints.write) -> None:
        real(path, tensors, meta)
        writes.append(path)
        if len(writes) == after:
            raise Killed

    monkeypatch.setattr(checkpoints, "write", write)


def slopes_of() -> Slopes:
    return Slopes(trained().task, 32, seed=1, execution="stacked")


def land_of() -> Landscape:
    return Landscape.of(trained(), execution="stacked")


def curves(out: Any) -> list[torch.Tensor]:
    found = train_curves(slopes_of(), trained().points, PAIRS, bends=2, steps=12, out=out)
    return [t for curve in found for t in (curve.control.matrix(), curve.history)]


def torch_curves(out: Any) -> list[torch.Tensor]:
    found = train_curves(
        slopes_of(), trained().points, PAIRS, rule=torch.optim.Adagrad, kind="bezier", steps=12, out=out
    )
    return [t for curve in found for t in (curve.control.matrix(), curve.history)]


def bands(out: Any) -> list[torch.Tensor]:
    start = stretched(trained().points, PAIRS, 5)
    found = relax(slopes_of(), start, rule=make("momentum", lr=0.05), steps=12, out=out)
    return [t for band in found for t in (band.images.matrix(), band.losses)]


def one_band(out: Any) -> list[torch.Tensor]:
    (found,) = relax(slopes_of(), stretched(trained().points, PAIRS[:1], 5), steps=12, climb=True, out=out)
    return [found.images.matrix(), found.losses]


def growing(out: Any) -> list[torch.Tensor]:
    cycles = [Cycle(5, 0.05)] * 4
    found = auto_bands(
        slopes_of(), land_of(), trained().points, PAIRS, cycles=cycles, looks=(0, 2, 7), out=out
    )
    return [t for path in found for t in (path.frame.matrix(), path["test_loss"], *_stages(path))]


def beads(out: Any) -> list[torch.Tensor]:
    found = strings(
        slopes_of(),
        land_of(),
        trained().points,
        PAIRS,
        level=0.2,
        rule=make("sgd", lr=0.3),
        steps=60,
        out=out,
    )
    return [t for path in found for t in (path.frame.matrix(), path["test_loss"])]


def _stages(path: Path) -> list[torch.Tensor]:
    return [t for stage in path.stages for t in (torch.tensor(stage.step), stage.places, stage.losses)]


@pytest.mark.parametrize("after", [1, 4, 9])
@pytest.mark.parametrize("run", [curves, torch_curves, bands, one_band, growing, beads])
def test_what_was_killed_goes_on_bit_for_bit(tmp_path, run: Callable[[Any], list[torch.Tensor]], after):
    whole, file = run(None), tmp_path / "kept.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, after)
        with pytest.raises(Killed):
            run(Work(file, every=0))
    assert file.exists()
    for a, b in zip(whole, run(file), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["linear", "polychain", "autoneb", "dss"])
def test_finished_paths_are_not_sought_again(tmp_path, method, monkeypatch):
    options = {"points": trained().points, "method": method, "steps": 6}
    first = connect(land_of(), PAIRS, out=tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == [f"{method}-paths.safetensors"]
    monkeypatch.setattr(Landscape, "along", lambda *a: pytest.fail("measured again"))
    monkeypatch.setattr(Landscape, "__call__", lambda *a: pytest.fail("measured again"))
    for a, b in zip(first, connect(land_of(), PAIRS, out=tmp_path, **options), strict=True):
        assert list(a.values) == list(b.values)
        assert (a.method, a.found, a.settled, a.note) == (b.method, b.found, b.settled, b.note)
        assert torch.equal(a.points.matrix(), b.points.matrix())
    with pytest.raises(LosslabError, match="holds other work"):
        connect(land_of(), PAIRS[:1], out=tmp_path, **options)


def test_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / "kept.safetensors"
    curves(file)
    torn = file.read_bytes()
    file.write_bytes(torn[: len(torn) // 2])
    with pytest.raises(LosslabError, match="torn"):
        curves(file)
    with pytest.raises(LosslabError, match="0 or more"):
        Work(file, every=-1)


def test_paths_survive_a_file(tmp_path):
    (path,) = auto_bands(
        Slopes(bent_task()), Landscape(bent_task()), at(*bent.minima), [(0, 1)], cycles=[Cycle(9, 0.01)] * 2,
        looks=(0, 3),
    )  # fmt: skip
    assert [stage.step for stage in path.stages] == [0, 3, 9, 18]
    assert [len(stage.losses) for stage in path.stages][:2] == [5, 5]
    tensors, told = packed([path])
    checkpoints.write(tmp_path / "p.safetensors", tensors, {"paths": told})
    read, meta = checkpoints.read(tmp_path / "p.safetensors")
    (again,) = unpacked(read, meta["paths"], path.frame)
    assert again.summary == path.summary
    assert all(torch.equal(a, b) for a, b in zip(_stages(path), _stages(again), strict=True))


@pytest.mark.parametrize(
    ("course", "wanted"),
    [
        (lambda t, noise: 1 / (1 + t), False),
        (lambda t, noise: 0.3 + torch.exp(-t), True),
        (lambda t, noise: 0.3 + torch.exp(-t) + 0.01 * noise, True),
        (lambda t, noise: 1e-9 * (0.3 + torch.exp(-t) + 0.01 * noise), True),  # whatever the scale
        (lambda t, noise: 1 + 3 * noise, None),  # too noisy to tell
        (lambda t, noise: t[:5], None),
        (lambda t, noise: t / 0, False),
    ],
)
def test_what_counts_as_settled(course, wanted):
    noise = torch.randn(120, generator=torch.Generator().manual_seed(0))
    assert settled(course(torch.arange(120.0), noise)) is wanted


def test_a_diverged_curve_says_when():
    paths = connect(
        land_of(),
        PAIRS[:1],
        points=trained().points,
        method="polychain",
        steps=40,
        rule=make("sgd", lr=1e200),
    )
    assert paths[0].settled is False
    assert "diverged at step" in paths[0].note


def test_a_pair_above_the_level_does_not_stop_the_others():
    points = at(*bent.minima, (0.0, 3.0), (1.0, 0.1))
    task, rule = bent_task(), make("sgd", lr=0.01)
    high, low = strings(Slopes(task), Landscape(task), points, [(0, 2), (1, 3)], level=1.3, rule=rule)
    assert (high.found, low.found) == (False, True)
    assert "above the level" in high.note


def test_long_work_shows_how_far_it_is(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    curves(Work(progress=True))
    growing(Work(progress=True))
    assert "training 2 curves" in shown.getvalue()
    assert "settling 2 bands" in shown.getvalue()
