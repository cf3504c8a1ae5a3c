"""losslab smoothness: what it prints, says and draws."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from tests.cli.shell import one_sentence, run

from losslab.cli import main
from losslab.cli.commands import Smoothness
from losslab.cli.smoothness import arms_of, left_out, probed, probes_of, sentences, shown_rows
from losslab.layers.batchnorm import is_batchnorm
from losslab.report.smoothness import draw_smoothness
from losslab.tasks import digits_task, mlp

TASKS = """
from torch import nn
from losslab.tasks import digits_task, mlp
plain = digits_task(mlp(64, 6, 10))
normalised = digits_task(mlp(64, 6, 10, batch_norm=True))
alone = digits_task(mlp(64, 10))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.block(x.reshape(-1, 8, 8)).mean(1))


transformer = digits_task(Transformer)


class Kink(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(0 * x).sub(self.layer.bias).abs().sqrt()


kink = digits_task(Kink)
"""


@pytest.fixture(scope="module")
def summary():
    command = Smoothness("digits", compare="batchnorm", steps=6, every=3, lr=0.1, seeds=2, examples=40)
    return probed(arms_of(digits_task(mlp(64, 6, 10)), "batchnorm"), command), command


def test_command_prints_and_writes_a_page(tmp_path, capsys):
    page = tmp_path / "page.html"
    options = ["--steps", 4, "--every", 2, "--examples", 30, "--seeds", 2, "--lr", 0.1]
    main([str(a) for a in ["smoothness", "t.py:plain", "--compare", "batchnorm", *options, "--out", page]])
    told = capsys.readouterr().out
    for words in ("standard", "batch norm", "effective", "With batch norm the loss varies"):
        assert words in told
    html = page.read_text("utf-8")
    assert "Smoothness of digits" in html
    assert len(re.findall("<figure>", html)) == 5
    assert "http://" not in html.split("<script>")[0]


def test_one_network_alone(capsys):
    main(["smoothness", "t.py:normalised", "--steps", "0", "--seeds", "1", "--examples", "30"])
    told = capsys.readouterr().out
    assert "running" in told
    assert "With batch norm" not in told


def test_arms_hold_batch_norm_or_not():
    for given in (False, True):
        arms = arms_of(digits_task(mlp(64, 6, 10, batch_norm=given)), "batchnorm")
        assert list(arms) == ["standard", "batch norm"]
        found = [any(map(is_batchnorm, task.model().modules())) for task in arms.values()]
        assert found == [False, True]


@pytest.mark.parametrize("name", ["alone", "transformer"])
def test_a_network_without_a_place_for_batch_norm_is_not_compared_with_itself(capsys, name):
    code, _, err = run(capsys, "smoothness", f"t.py:{name}", "--compare", "batchnorm", "--steps", "0")
    assert "has no place for batch norm" in one_sentence(code, err)


def test_a_gradient_that_is_not_finite_is_told(capsys):
    code, out, _ = run(capsys, "smoothness", "t.py:kink", "--steps", "0", "--examples", "30")
    assert code == 0
    assert "the loss is 2.3 and its gradient is not finite" in out
    assert "nan" not in out


def test_probes_and_rows(summary):
    rows, _ = summary
    assert rows.groupby("arm", sort=False)["updates"].unique().map(list).to_dict() == {
        "standard": [0, 3, 6],
        "batch norm": [0, 3, 6],
    }
    shown = shown_rows(rows)
    assert shown["arm"].tolist() == ["standard"] * 3 + ["batch norm"] * 3
    mine = rows.query("arm == 'standard' and updates == 3 and kind == 'relative'")
    assert shown.loc[1, "relative"] == mine["variation"].median()
    assert shown["running"].isna().tolist() == [True] * 3 + [False] * 3


def test_rows_that_are_left_out_are_told(summary):
    rows, command = summary
    assert left_out(rows, shown_rows(rows), command) == []
    gone = rows[(rows["arm"] == "batch norm") | (rows["updates"] < 3)]
    (told,) = left_out(gone, shown_rows(gone), command)
    assert told.startswith("standard: all 2 members diverged before update 3")
    never = rows.assign(loss=rows["loss"].where(rows["arm"] == "batch norm"))
    assert "not finite before the first update" in left_out(never, shown_rows(never), command)[0]
    assert not any(told.startswith("standard") for told in sentences(never, command))
    later = [rows.assign(updates=rows["updates"] + 6 * k) for k in range(4)]
    many = pd.concat(later).drop_duplicates(["arm", "updates", "member", "mode", "kind"])
    told = left_out(many, shown_rows(many), dataclasses.replace(command, steps=24))
    assert told == ["The table has 6 of the 9 probes, spread over training; the figures (--out) draw all."]
    assert probes_of(dataclasses.replace(command, steps=7)) == [0, 3, 6, 7]


def test_sentences_follow_the_numbers(summary):
    rows, command = summary
    at = rows["arm"] == "standard"
    rows = rows.assign(variation=np.where(at, 1.0, np.where(rows["kind"] == "raw", 0.25, 2.0)), beta=4.0)
    told = " ".join(sentences(rows, command))
    assert "varies 4 times less along raw steps, and 2 times more along steps relative" in told
    assert "above 0.5 may overshoot" in told
    assert "diverged" not in told
    lost = rows.assign(loss=rows["loss"].where(~(at & (rows["member"] == 1) & (rows["updates"] > 0))))
    assert "standard: 1 of 2 members diverged" in " ".join(sentences(lost, command))
    alike = " ".join(sentences(rows.assign(variation=1.0), command))
    assert "varies about as much along raw steps, and about as much along steps relative" in alike
    zero = rows.assign(variation=np.where(at, 0.0, 1.0))
    assert "by 1 instead of 0" in " ".join(sentences(zero, command))


def test_figures_leave_out_what_is_not_finite(summary):
    rows, _ = summary
    lost = rows.copy()
    lost.loc[(lost["arm"] == "standard") & (lost["updates"] > 0), ["loss", "low", "high", "beta"]] = np.inf
    for drawing in (*draw_smoothness(rows), *draw_smoothness(lost)):
        assert drawing.caption
        for trace in drawing.figure.data:
            assert np.isfinite(pd.Series(trace.y, dtype=float)).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--every", "0"], "--every is 0"),
        (["--raw", "-1"], "--raw is -1: pass a length above 0"),
        (["--rule", "sdg"], "no rule is named"),
    ],
)
def test_mistakes_are_one_sentence(capsys, options, told):
    code, _, err = run(capsys, "smoothness", "t.py:plain", *options)
    assert told in one_sentence(code, err)
