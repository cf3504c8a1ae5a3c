"""The command line: what it prints and saves, and one sentence for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tests.cli.shell import one_sentence, run

import losslab
from losslab.cli.arguments import COMMANDS, options_of, parse
from losslab.engine import checkpoints

TASKS = """
import torch
from losslab import Task, supervised
from losslab.tasks import mlp

x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] > 0).long()
net = mlp(4, 8, 2)
good = supervised(net, (x, y), test=(x, y), name="good")
recurrent = supervised(lambda: Recurrent(), (x[:, None], y), name="recurrent")
vector = Task(net, lambda m, b: m(b[0]).mean(1), (x, y))
item = Task(net, lambda m, b: m(b[0]).mean().item(), (x, y))
infinite = Task(net, lambda m, b: m(b[0]).mean() * float("inf"), (x, y))
labels = supervised(net, (x, y * 5))
wrong = 3
nan = supervised(net, (x.index_fill(0, torch.tensor([7]), float("nan")), y))
summed = Task(net, lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum"), (x, y))
one_left = supervised(mlp(4, 8, 2, batch_norm=True), (x, y))


def asks(what):
    return what


def made():
    return good


def empty():
    return supervised(net, (x[:0], y[:0]))


def raising():
    return 1 / 0


def interrupted():
    raise KeyboardInterrupt


def returns_wrong():
    return "task"


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(4, 2, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]
"""


@pytest.fixture(autouse=True)
def broken(folder: Path) -> None:
    (folder / "broken.py").write_text("import no_module_of_this_name")
    (folder / "syntax.py").write_text("x = (")


# -- rules ---------------------------------------------------------------------------------------------


def test_the_table_of_rules_and_one_rules_page(capsys: Any) -> None:
    code, out, err = run(capsys, "rules")
    assert (code, err) == (0, "")
    for name in ("gd", "momentum", "adagrad-full", "adamnc"):
        assert f" {name} " in out
    code, out, err = run(capsys, "rules", "ADAM")
    assert (code, err) == (0, "")
    for told in (
        "Adam (adam)",
        "Defaults",
        "beta2",
        "0.999",
        "Variants",
        "kingma-ba",
        "Differences",
        "Source",
    ):
        assert told in out


# -- train ---------------------------------------------------------------------------------------------


def test_a_run_is_printed_saved_and_resumed(capsys: Any, folder: Path) -> None:
    line = [
        "train",
        "t.py:good",
        "--rule",
        "adam",
        "--lr",
        "1e-3",
        "3e-3",
        "--seeds",
        "2",
        "--execution",
        "stacked",
    ]
    code, out, err = run(capsys, *line, "--epochs", "1", "--out", "run")
    assert (code, err) == (0, "")
    for told in ("adam on good", "test loss", "test accuracy", "0.003", "4 members, 2 steps", "saved in run"):
        assert told in out
    tensors, meta = checkpoints.read(Path("run") / "population.safetensors")
    assert tensors["weights/0.weight"].shape == (4, 8, 4)
    assert meta["settings"]["rule"]["lr"] == [1e-3, 1e-3, 3e-3, 3e-3]
    assert meta["settings"]["seeds"] == [0, 1, 0, 1]
    table = pd.read_parquet("run/history.parquet")
    assert table.step.unique().tolist() == [0, 1, 2]
    assert len(table) == 12
    assert run(capsys, *line, "--epochs", "1", "--out", "run", "--resume")[0] == 0
    assert run(capsys, *line, "--epochs", "3", "--out", "run", "--resume")[0] == 0
    assert run(capsys, *line, "--epochs", "3", "--out", "whole")[0] == 0
    resumed, whole = (checkpoints.read(Path(out) / "population.safetensors")[0] for out in ("run", "whole"))
    assert all(torch.equal(resumed[n], whole[n]) for n in whole if not n.startswith("history"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("t.py:made --steps 2", "1 member, 2 steps"),
        ("t.py:good --rule newton --steps 1 --hyper damping=0.1", "newton on good"),
        ("t.py:good --steps 2 --lr 0.1 0.2 --hyper weight_decay=0,0.1 decay=decoupled", "4 members"),
        ("t.py:good --steps 1 --lr 0.1 0.2 --seeds 25", "0 of 25 diverged"),
        (
            "t.py:good --rule torch.SGD --lr 0.1 --hyper nesterov=true momentum=0.9 --steps 2",
            "torch.SGD on good",
        ),
        ("t.py:good --steps 30 --patience 1 --lr 2 --dtype float64", "stopped at step"),
        (
            "t.py:good --steps 2 --shared-batches --drop-last --batch-size 7 --memory 0.1 --threads 1",
            "2 steps",
        ),
        ("digits --steps 1 --batch-size 10", "1 member, 1 step in"),
    ],
)
def test_trainings(capsys: Any, line: str, told: str) -> None:
    code, out, err = run(capsys, "train", *line.split())
    assert (code, err) == (0, "")
    assert told in out


def test_a_fallback_is_told_in_one_line(capsys: Any) -> None:
    code, out, err = run(capsys, "train", "t.py:recurrent", "--seeds", "2", "--steps", "1")
    assert code == 0
    assert err.count("\n") == 1
    assert err.startswith("losslab: the members are trained one by one")
    assert "recurrent" in out


MISTAKES = {
    "rules adm": "no rule is named 'adm': did you mean 'adam'",
    "train t.py:good --rule adm": "no rule is named 'adm': did you mean 'adam'",
    "train t.py:good --rule torch.Adm": "no torch.optim class is named 'Adm': did you mean 'Adam'",
    "train t.py:good --rule torch.SparseAdam": "torch.SparseAdam cannot take this step (RuntimeError: Sparse",
    "train t.py:good --rule torch.Adam --hyper momentum=0.9": "torch.Adam was refused its arguments",
    "train t.py:good --hyper beta=0.9": "no option of adam is named 'beta': did you mean",
    "train t.py:good --hyper variant=lectur": "no variant of adam is named 'lectur': did you mean 'lecture'",
    "train t.py:good --hyper beta1": "write NAME=VALUE",
    "train t.py:good --hyper beta1=abc": "beta1 is 'abc', no number",
    "train t.py:good --hyper beta1=1": "beta1 is 1, it must be at least 0 and below 1",
    "train t.py:good --hyper lr=0.1 --lr 0.1": "give it once",
    "train t.py:good --lr -1": "lr is -1, it must be at least 0",
    "train t.py:good --seeds 0": "--seeds is 0: pass at least 1",
    "train t.py:good --epochs 1 --steps 2": "both of steps= and epochs= given",
    "train t.py:good --epochs nan": "epochs is nan",
    "train t.py:good --steps -1": "steps is -1",
    "train t.py:good --batch-size 0": "batch_size is 0: pass at least 1",
    "train t.py:good --dtype int8": "no dtype is named 'int8'",
    "train t.py:good --device gpu": "device 'gpu' cannot be used",
    "train t.py:good --lr": "--lr was given no value: write --lr VALUE",
    "lecture --claim": "--claim was given no value: write --claim VALUE",
    "train t.py:good --threads 0": "--threads is 0",
    "train t.py:good --patience 0": "patience is 0",
    "train t.py:recurrent --patience 1": "early stopping needs evaluations and there are none",
    "train t.py:recurrent --execution stacked --seeds 2": "cannot be run as one program",
    "train t.py:good --resume": "--resume was given without --out",
    "train t.py": "names a file and no task in it",
    "train none.py:good": "there is no file none.py",
    "train t.py:god": "no task in t.py is named 'god': did you mean 'good'",
    "train t.py:wrong": "wrong in t.py is a int, no Task",
    "train t.py:returns_wrong": "returned a str, no Task",
    "train t.py:raising": "raised ZeroDivisionError in line",
    "train broken.py:x": "raised ModuleNotFoundError in line 1",
    "train syntax.py:x": "raised SyntaxError in line 1",
    "train digts": "no task is named 'digts': did you mean 'digits'",
    "train mnist --data nowhere": "there is no data folder nowhere",
    "train t.py:vector": "the loss of 'task' has shape (34,), not a scalar",
    "train t.py:item": "the loss of 'task' is a float, not a tensor",
    "train t.py:infinite": "not a finite number",
    "train t.py:empty": "the data are empty",
    "train t.py:labels": "the labels of 'task' run from 0 to 5 and the model has 2 outputs",
    "train t.py:nan": "data[0] holds nan in example 7; mend the data",
    "train t.py:summed": "so it is a sum: return the mean",
    "train t.py:one_left --batch-size 13 --epochs 1": "last batch has 1 example and there the loss fails (",
    "train t.py:asks": "asks in t.py raised TypeError",
    "train t.py:good --out t.py": "cannot write t.py",
    "train t.py:good --out t.py/below": "cannot write t.py/below",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(capsys: Any, folder: Path, line: str) -> None:
    code, out, err = run(capsys, *line.split())
    assert MISTAKES[line] in one_sentence(code, err)
    assert out == ""
    assert sorted(p.name for p in folder.iterdir()) == ["broken.py", "syntax.py", "t.py"]
    assert (folder / "t.py").read_text() == TASKS


def test_mistakes_with_a_saved_run(capsys: Any, folder: Path) -> None:
    line = ["train", "t.py:good", "--steps", "3", "--out", "run", "--checkpoint-every", "0"]
    assert run(capsys, *line)[0] == 0
    before = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}
    for extra, told in (
        ([], "run already holds a run: resume it"),
        (["--resume", "--lr", "0.5"], "the saved run has other settings (lr was 0.001, now 0.5)"),
        (["--resume", "--seeds", "2"], "seeds was [0], now [0, 1]"),
    ):
        code, _, err = run(capsys, *line, *extra)
        assert told in one_sentence(code, err)
    assert {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()} == before
    last, first = sorted((folder / "run" / "checkpoints").iterdir(), reverse=True)
    last.write_bytes(last.read_bytes()[:99])
    code, out, err = run(capsys, *line, "--resume")
    assert code == 0
    assert "saved in run" in out
    assert err.count("\n") == 1
    assert "an older checkpoint was used" in err
    for path in (last, first):
        save_file({"a": torch.ones(1)}, path)
    code, _, err = run(capsys, *line, "--resume")
    assert "was not written by losslab" in one_sentence(code, err)


UNREADABLE = {
    "train": "losslab train was given no TASK: write losslab train TASK, then the options",
    "trian t.py:good": "no command is named 'trian': did you mean 'train'",
    "train t.py:good --epoch 1": "no option of losslab train is named '--epoch': did you mean '--epochs'",
    "train t.py:good --lr a": "--lr got 'a': give a number",
    "train t.py:good --steps a": "--steps got 'a': give a whole number",
    "train t.py:good --steps 1.5": "--steps got '1.5': give a whole number",
    "train t.py:good --epochs": "--epochs was given no value",
    "train t.py:good --drop-last=yes": "--drop-last takes no value",
    "train t.py:good --execution fast": "no value of --execution is named 'fast'",
    "train t.py:good more": "losslab train got 'more', which belongs to no option",
    "landscape t.py:good": "losslab landscape was given no --run",
    "lecture C1": "losslab lecture got 'C1', which belongs to no option",
    "lecture --claim C99 --claim C1": "no claim is named 'C99'",
    "signals t.py:good --out .": "--out is ., a folder: name a file in it",
    "signals t.py:good --out t.py/page.html": "t.py is a file): choose another place for the page",
}


@pytest.mark.parametrize("line", UNREADABLE)
def test_a_line_that_cannot_be_read_is_one_sentence(capsys: Any, line: str) -> None:
    code, out, err = run(capsys, *line.split())
    assert UNREADABLE[line] in one_sentence(code, err)
    assert out == ""


@pytest.mark.parametrize(
    "line",
    [
        "train t.py:good --lr 0.1 --steps 3 --lr 0.2 --steps 1",
        "train --lr 0.1 0.2 t.py:good --steps 1",
        "train --steps=1 --lr=0.1 --lr=2e-1 t.py:good",
        "train t.py:good --lr 0.1 0.2 --batch_size 9 --steps 1",
    ],
)
def test_ways_to_write_the_same_line(line: str) -> None:
    command = parse(line.split())
    assert (command.task, command.lr, command.steps) == ("t.py:good", (0.1, 0.2), 1)


def test_repeated_claims_add_up() -> None:
    assert parse(["lecture", "--claim", "C1", "--claim", "C2", "C3"]).claim == ("C1", "C2", "C3")


def test_help_and_version(capsys: Any) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(f"• {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, err = run(capsys, name, "--help")
        assert (code, err) == (0, "")
        assert all(option.name in out for option in options_of(name))
        assert "None" not in out
    assert run(capsys, "--version") == (0, f"losslab {losslab.__version__}\n", "")


def test_an_interrupted_run_says_how_to_go_on(capsys: Any) -> None:
    code, _, err = run(capsys, "train", "t.py:interrupted")
    assert code == 130
    assert err == "losslab: stopped\n"
    code, _, err = run(capsys, "train", "t.py:interrupted", "--out", "run")
    assert code == 130
    assert err == "losslab: stopped; what was finished is kept, add --resume to go on\n"


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", "from losslab.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )


def test_from_a_real_shell() -> None:
    done = shell("train", "t.py:good", "--lr", "1e-3", "3e-3", "--epochs", "1", "--out", "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 members, 2 steps" in done.stdout
    done = shell("rules", "adm")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no rule is named 'adm'" in one_sentence(done.returncode, done.stderr)
