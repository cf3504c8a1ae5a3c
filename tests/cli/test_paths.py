"""``losslab landscape`` and ``losslab connect``: tables, pages, one sentence for every mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.cli.shell import run

from losslab.cli import main
from losslab.engine import checkpoints

TASKS = """
import torch
from losslab import supervised
from losslab.tasks import mlp

x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] * x[:, 1] > 0).long()
good = supervised(mlp(4, 8, 2), (x, y), test=(x, y), name="good")
normalised = supervised(mlp(4, 8, 2, batch_norm=True), (x, y), name="normalised")
wider = supervised(mlp(4, 9, 2), (x, y), name="wider")
wanted = supervised(mlp(4, 8, 1), (x, x[:, :1]), criterion=torch.nn.functional.mse_loss, name="wanted")


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        return x @ torch.linalg.matrix_exp(self.w @ self.w.T) @ self.w


odd = supervised(Odd, (x, y), name="odd")
"""


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("paths")
    (place / "t.py").write_text(TASKS)
    runs = {"good": "4", "normalised": "2", "one": "1", "wanted": "2", "odd": "2"}
    for name, seeds in runs.items():
        task = name if name != "one" else "good"
        main(["train", f"{place}/t.py:{task}", "--seeds", seeds, "--epochs", "2", "--out", f"{place}/{name}"])
    tensors, meta = checkpoints.read(place / "good/population.safetensors")
    for n in tensors:
        if n.startswith("weights/"):
            tensors[n][1] = torch.nan
            tensors[n][3] = tensors[n][2]
    checkpoints.write(place / "lost/population.safetensors", tensors, meta)
    return place


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--members", "0", "1"), "barrier"),
        (("--members", "0", "1", "2"), "member 2, seed 2"),
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


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("landscape {0}/t.py:good --run {0}/good --points 151", "slice.safetensors"),
        (
            "connect {0}/t.py:good --run {0}/good --members 0 1 --method autoneb --steps 500 --plane 3",
            "as-trained/autoneb",
        ),
    ],
)
def test_a_process_killed_in_the_middle_goes_on(capsys, folder, command, part):
    page = folder / "killed.html"
    kept, asked = folder / "killed.html.kept", [*command.format(folder).split(), "--out", str(page)]
    start = [sys.executable, "-c", "from losslab.cli import main; main()", *asked, "--checkpoint-every", "0"]
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(kept.glob(f"{part}*")) and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not page.exists()
    code, _, err = run(capsys, *asked)
    assert (code, "unfinished work" in err) == (2, True)
    code, _, err = run(capsys, *asked, "--seed", "5", "--resume")
    assert (code, "holds other work" in err) == (("connect" in command) * 2, "connect" in command)
    if "connect" in command:
        code, resumed, _ = run(capsys, *asked, "--resume")
        assert code == 0
        page.unlink()
        code, whole, _ = run(capsys, *asked)
        assert _numbers(resumed) == _numbers(whole)
    assert page.exists()
    assert not kept.exists()
    page.unlink()


def _numbers(out: str) -> list[str]:
    """All but the seconds that it took."""
    return [line for line in out.splitlines() if "paths in" not in line]


def test_the_best_finite_members_are_taken_and_named(capsys, folder):
    code, out, _ = run(capsys, "landscape", f"{folder}/t.py:good", "--run", f"{folder}/lost", "--points", "3",
                       "--members", "0", "2")  # fmt: skip
    assert code == 0
    assert "member 2, seed 2" in out
    code, _, err = run(capsys, "connect", f"{folder}/t.py:good", "--run", f"{folder}/lost", "--steps", "2")
    assert code == 2
    assert "2 and 3 have the same weights" in err
    task = (f"{folder}/t.py:good", "--run", f"{folder}/lost", "--random", "1", "--points", "3")
    code, out, _ = run(capsys, "landscape", *task)
    assert code == 0
    assert "lowest training loss" in out
    assert "1 of 4 diverged" in out


def test_regression_without_test_data_has_losses_only(capsys, folder):
    page = folder / "page.html"
    task = (f"{folder}/t.py:wanted", "--run", f"{folder}/wanted")
    code, out, _ = run(capsys, "connect", *task, "--steps", "9", "--plane", "3", "--out", str(page))
    assert code == 0
    assert "highest train loss" in " ".join(out.split()) or "train loss" in out
    assert "ensemble" not in out.lower()
    assert run(capsys, "landscape", *task, "--points", "3")[0] == 0


@pytest.mark.parametrize("method", ["polychain", "autoneb", "dss"])
def test_a_function_without_data_is_connected_too(capsys, folder, method):
    told = f"train double_well --lr 0.01 0.05 --steps 20 --rule gd --out {folder}/well-{method}"
    code, _, _ = run(capsys, *told.split())
    assert code == 0
    task = ("double_well", "--run", f"{folder}/well-{method}", "--members", "0", "1")
    code, out, err = run(capsys, "connect", *task, "--method", method, "--steps", "20")
    assert code == 0, err
    assert "highest loss" in " ".join(out.replace("┃", " ").split())


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
    told = f"{folder}/t.py:good --run {folder}/good --members 0 1 --steps 5 --plane 5"
    task = told.split()
    for bends, named in (("1", ">bend<"), ("3", "farthest point")):
        code, _, _ = run(capsys, "connect", *task, "--bends", bends, "--out", str(page))
        assert code == 0
        assert named.strip("<>") in page.read_text()


def test_what_was_found_is_told_in_numbers(capsys, folder):
    page = folder / "page.html"
    task = (f"{folder}/t.py:good", "--run", f"{folder}/good", "--members", "0", "1", "--plane", "0")
    code, out, _ = run(capsys, "connect", *task, "--method", "autoneb", "--out", str(page), "--steps", "60")
    assert code == 0
    told = " ".join(out.split())
    assert "Networks 0 to 1: straight, the train loss" in told
    assert "Ensembles: all networks along the elastic band together err on" in told
    text = page.read_text()
    assert "What was found" in text
    assert "The elastic band settles" in text
    assert '"frames":[{' in text.replace(" ", "")


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
        ("connect t.py:good --run good --method dss --level nan", "level is nan"),
        ("connect t.py:good --run good --method autoneb --bends 3", "autoneb has none"),
        ("connect t.py:good --run good --method autoneb --lr 0.1", "leave out --lr"),
        ("connect t.py:good --run good --method linear --lr 0.1", "leave out --lr"),
        ("connect t.py:good --run good --lr -1", "lr"),
        ("connect t.py:good --run good --lr nan", "lr"),
        ("connect t.py:good --run good --bends 0", "0 bends"),
        ("connect t.py:good --run good --steps 0", "at least 1"),
        ("connect t.py:good --run good --batch-size 0", "at least 1"),
        ("connect t.py:good --run good --plane 1", "--plane is 1"),
        ("connect t.py:good --run good --members 0 0", "name each once"),
        ("connect t.py:good --run good --members 0 9", "no member 9"),
        ("connect t.py:good --run good --members -1 0", "no member -1"),
        ("connect t.py:good --run good --members 2", "one network"),
        ("connect t.py:good --run good --resume", "without --out"),
        ("connect t.py:good --run good --out good", "a folder"),
        ("connect t.py:good --run good --checkpoint-every -1", "0 or more"),
        ("connect t.py:good --run t.py", "safetensors"),
        ("connect t.py:good --run lost --members 0 1", "member 1 diverged"),
        ("connect t.py:odd --run odd --align --steps 2", "matrix_exp"),
        ("connect t.py:odd --run odd --align --steps 2", "or leave out --align"),
        ("connect t.py:good --run wanted", "trained on"),
        ("landscape t.py:good --run lost --members 0 2 3", "members 0, 2, 3 span no slice"),
        ("landscape t.py:good --run lost --members 0 1", "member 1 diverged"),
        ("landscape t.py:good --run good --random 5", "1 for a line"),
        ("landscape t.py:good --run good --random 0", "1 for a line"),
        ("landscape t.py:good --run good --margin -1", "0 or more"),
        ("landscape t.py:good --run good --margin nan", "0 or more"),
        ("landscape t.py:good --run good --points 100000", "pass fewer"),
        ("landscape t.py:good --run good --out t.py/page.html", "cannot write"),
    ],
)
def test_mistakes_are_one_sentence(capsys, folder, monkeypatch, command, told):
    monkeypatch.chdir(folder)
    code, _, err = run(capsys, *command.split())
    assert code == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1
