"""``losslab curvature``: the tables, the sentences, the page, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.cli.shell import run

TASKS = """
import torch
from torch import nn
from losslab import supervised
from losslab.tasks import Task, mlp

g = torch.Generator().manual_seed(0)
x = torch.randn(80, 6, generator=g)
y = (x[:, 0] > 0).long()
deep = supervised(mlp(6, 8, 2, activation="tanh"), (x, y), name="deep")
line = supervised(lambda: nn.Linear(6, 1, bias=False), (x, x[:, :1]), criterion=nn.MSELoss(), name="line")
own = Task(deep.model, lambda m, b: m(b[0]).square().mean(), (x, y), name="own")
normal = supervised(mlp(6, 8, 2, batch_norm=True), (x, y), name="normal")
whole = Task(deep.model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"), (x, y))
dropped = supervised(mlp(6, 8, 2, dropout=0.5), (x, y), name="dropped")
"""


def test_a_network_as_it_starts(capsys: Any) -> None:
    code, out, err = run(capsys, "curvature", "t.py:deep", "--k", "3", "--lr", "0.1", "--dtype", "float64")
    assert (code, err) == (0, "")
    for told in ("deep: Hessian", "eigenvalue", "gradient norm", "Trace", "learning rate 0.1 is"):
        assert told in out


def test_a_quadratic_tells_its_stability_limit(capsys: Any) -> None:
    import torch

    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)).double()
    limit = 2 / float(torch.linalg.eigvalsh(2 * x.T @ x / 80)[-1])
    _, out, _ = run(capsys, "curvature", "t.py:line", "--k", "1", "--lr", "1.0", "--dtype", "float64")
    assert f"1 is {1 / limit:.2g} times the stability limit 2/lambda_max = {limit:.4g}" in " ".join(
        out.split()
    )


def test_a_trained_member_with_everything(capsys: Any, folder: Path) -> None:
    assert run(capsys, "train", "t.py:deep", "--rule", "sgd", "--lr", "0.1", "0.5", "--out", "r")[0] == 0
    options = ["--run", "r", "--member", "1", "--density", "--layers", "--out", "page.html", "--k", "2"]
    code, out, err = run(capsys, "curvature", "t.py:deep", *options)
    assert (code, err) == (0, "")
    for told in ("Spectral density", "interval", "Layer by layer", "0.weight", "learning rate 0.5 is"):
        assert told in out
    page = (folder / "page.html").read_text("utf-8")
    assert "<title>Hessian of deep</title>" in page
    for told in ("Ends of the spectrum", "Density of all", "Curvature of each layer", "What was found"):
        assert told in page
    _, fresh, _ = run(capsys, "curvature", "t.py:deep", "--k", "2")
    assert fresh.splitlines()[4] != out.splitlines()[4]


@pytest.mark.parametrize(("rule", "units"), [("adam", 38), ("momentum", 3.8)])
def test_a_run_is_held_against_the_limit_of_its_own_rule(capsys: Any, rule: str, units: float) -> None:
    run(capsys, "train", "t.py:deep", "--rule", rule, "--lr", "0.01", "0.02", "--steps", "9", "--out", "r")
    options = ["--run", "r", "--member", "1", "--k", "1", "--examples", "20"]
    code, out, err = run(capsys, "curvature", "t.py:deep", *options)
    told = " ".join(out.split())
    assert (code, err) == (0, "")
    assert f"Trained by {rule} at rate 0.02." in told
    assert f"times its stability limit {units / 0.02:g}" in told
    assert ("D^(-1/2) H D^(-1/2)" in told) == (rule == "adam")


def test_a_rule_without_a_known_limit_says_so(capsys: Any) -> None:
    run(capsys, "train", "t.py:deep", "--rule", "amsgrad", "--steps", "2", "--out", "r")
    _, out, _ = run(capsys, "curvature", "t.py:deep", "--run", "r", "--k", "1", "--examples", "20")
    assert "The stability limit of amsgrad cannot be told" in " ".join(out.split())


@pytest.mark.parametrize("matrix", ["gauss-newton", "fisher"])
def test_other_matrices(capsys: Any, matrix: str) -> None:
    code, out, err = run(capsys, "curvature", "t.py:deep", "--k", "2", "--matrix", matrix, "--examples", "30")
    assert (code, err) == (0, "")
    assert "matrix" in out


def test_batch_norm_and_dropout(capsys: Any) -> None:
    tops = []
    for policy in ("batch", "running", "re-estimate"):
        code, out, _ = run(capsys, "curvature", "t.py:normal", "--k", "1", "--batch-norm", policy)
        assert code == 0
        tops.append(next(line for line in out.splitlines() if "largest" in line))
    assert len(set(tops)) == 3
    code, _, err = run(capsys, "curvature", "t.py:dropped", "--k", "1")
    assert code == 0
    assert "dropout is off" in err


MISTAKES = [
    (["t.py:own", "--matrix", "gauss-newton"], "hides what the network puts out"),
    (["t.py:deep", "--run", "nowhere"], "does not exist"),
    (["t.py:deep", "--k", "0"], "ask for 1 to"),
    (["t.py:deep", "--k", "100000"], "ask for 1 to"),
    (["t.py:deep", "--tol", "2"], "between 0 and 1"),
    (["t.py:deep", "--dtype", "float31"], "no dtype is named"),
    (["t.py:deep", "--examples", "0"], "at least 1"),
    (["t.py:normal", "--matrix", "fisher"], "pass batch_norm='running'"),
    (["t.py:whole"], "not a scalar: take its mean"),
    (["t.py:deep", "--lr", "-1"], "--lr is -1"),
    (["t.py:deep", "--lr", "0"], "--lr is 0"),
    (["t.py:deep", "--lr", "nan"], "--lr is nan"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES)
def test_mistakes_are_one_sentence(capsys: Any, arguments: list[str], told: str) -> None:
    code, _, err = run(capsys, "curvature", *arguments)
    assert code == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_runs_of_other_tasks_and_members(capsys: Any) -> None:
    run(capsys, "train", "t.py:deep", "--out", "r", "--steps", "1")
    for arguments, told in (
        (["t.py:line", "--run", "r"], "the run's networks differ"),
        (["t.py:deep", "--run", "r", "--member", "3"], "members 0 to 0"),
    ):
        code, _, err = run(capsys, "curvature", *arguments)
        assert code == 2
        assert told in err
