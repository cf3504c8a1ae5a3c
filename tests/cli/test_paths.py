"""``losslab landscape`` and ``losslab connect``: tables, pages, one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from losslab.cli import main

TASKS = """
import torch
from losslab import supervised
from losslab.tasks import mlp

x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] * x[:, 1] > 0).long()
good = supervised(mlp(4, 8, 2), (x, y), test=(x, y), name="good")
normalised = supervised(mlp(4, 8, 2, batch_norm=True), (x, y), name="normalised")
wider = supervised(mlp(4, 9, 2), (x, y), name="wider")
"""


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("paths")
    (place / "t.py").write_text(TASKS)
    for name, seeds in (("good", "4"), ("normalised", "2"), ("one", "1")):
        task = name if name != "one" else "good"
        main(["train", f"{place}/t.py:{task}", "--seeds", seeds, "--epochs", "2", "--out", f"{place}/{name}"])
    return place


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        main([*arguments])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--members", "0", "1"), "barrier"),
        ((), "checkpoint 2"),
        (("--random", "1"), "random direction 1"),
        (("--members", "3", "--random", "2", "--normalise", "layer"), "random direction 2"),
    ],
)
def test_landscape_prints_and_writes(capsys, folder, options, told):
    page = folder / "page.html"
    task = (f"{folder}/t.py:good", "--run", f"{folder}/good", "--points", "5")
    code, out, _ = run(capsys, "landscape", *task, *options, "--out", str(page))
    assert code == 0
    assert told in out
    assert "Landscape of good" in page.read_text()
    assert "https://" not in page.read_text().split("<main>")[1].split("</main>")[0]


def test_landscape_goes_on_from_what_was_kept(capsys, folder):
    task = (f"{folder}/t.py:good", "--run", f"{folder}/good", "--points", "4")
    for _ in range(2):
        code, out, _ = run(capsys, "landscape", *task, "--keep", f"{folder}/kept.safetensors")
        assert code == 0
        assert "16 points" in out
    code, _, err = run(capsys, "landscape", *task, "--margin", "0.5", "--keep", f"{folder}/kept.safetensors")
    assert code == 2
    assert "another grid" in err


@pytest.mark.parametrize("method", ["polychain", "bezier", "autoneb", "dss", "linear"])
def test_connect_prints_and_writes(capsys, folder, method):
    page = folder / "page.html"
    task = (f"{folder}/t.py:good", "--run", f"{folder}/good", "--members", "0", "2", "3")
    code, out, _ = run(capsys, "connect", *task, "--method", method, "--steps", "20", "--out", str(page))
    assert code == 0
    assert "0 to 2" in out
    assert method in out
    assert "3 pairs" in out
    assert "What was measured" in page.read_text()


def test_connect_draws_the_plane_of_the_bend(capsys, folder):
    page = folder / "page.html"
    told = f"{folder}/t.py:good --run {folder}/good --members 0 1 --steps 5 --plane"
    task = told.split()
    code, _, _ = run(capsys, "connect", *task, "--out", str(page))
    assert code == 0
    assert "the bend" in page.read_text()
    code, _, err = run(capsys, "connect", *task, "--bends", "2", "--out", str(page))
    assert code == 2
    assert "one bend" in err


def test_connect_aligned_networks_with_batch_norm(capsys, folder):
    page = folder / "page.html"
    task = (f"{folder}/t.py:normalised", "--run", f"{folder}/normalised", "--steps", "5", "--lr", "0.01")
    code, out, _ = run(capsys, "connect", *task, "--align", "--out", str(page))
    assert code == 0
    assert "aligned linear" in out
    assert "Units of network 1 matched with those of 0" in page.read_text()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("landscape t.py:good --run nowhere", "does not exist"),
        ("landscape t.py:wider --run good", "trained on"),
        ("landscape t.py:good --run good --members 9", "no member 9"),
        ("landscape t.py:good --run good --members 0 1 --random 2", "one member"),
        ("landscape t.py:good --run good --members 0 1 2 3", "two for a line"),
        ("landscape t.py:good --run good --points 1", "at least 2"),
        ("connect t.py:good --run one", "one network"),
        ("connect t.py:good --run good --level 0.1", "--method dss"),
        ("connect t.py:good --run good --method dss --level 0.001", "above the level"),
        ("connect t.py:good --run good --method autoneb --lr 0.1", "leave out --lr"),
    ],
)
def test_mistakes_are_one_sentence(capsys, folder, monkeypatch, command, told):
    monkeypatch.chdir(folder)
    code, _, err = run(capsys, *command.split())
    assert code == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1
