"""``losslab signals``: the table, the sentences, the page, and one sentence for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.cli import shell

TASKS = """
import torch
from torch import nn
from losslab import supervised
from losslab.tasks import mlp

x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] > 0).long()
deep = supervised(mlp(6, 12, 12, 12, 2, activation="tanh"), (x, y), name="deep")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
        nn.init.constant_(self.a.bias, -100.0)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.encoder.layers[0](x[:, None]).mean(1))


nested = supervised(Nested, (x, y), name="nested")
dead = supervised(Net, (x, y), name="dead")
"""


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    return shell.run(capsys, "signals", *arguments)


def test_networks_as_they_start(capsys: Any) -> None:
    code, out, err = run(capsys, "t.py:deep", "--seeds", "2", "--init", "lecun")
    assert (code, err) == (0, "")
    for told in ("deep: 2 members, step 0", "Tanh", "theory", "saturated", "Nothing needs attention."):
        assert told in out
    assert "update" not in out


def test_training_is_looked_at_and_drawn(capsys: Any, folder: Path) -> None:
    options = ["--steps", "30", "--rule", "adam", "--lr", "0.01", "--batch-size", "20", "--out", "page.html"]
    code, out, err = run(capsys, "t.py:deep", *options)
    assert (code, err) == (0, "")
    assert "after 30 steps" in out
    assert "update" in out
    page = (folder / "page.html").read_text("utf-8")
    assert "<title>Signals of deep</title>" in page
    for told in (
        "Signals by depth",
        "Gradients by depth",
        "Layer Jacobians",
        "Signals through training",
        "Update-to-weight ratio",
        "Layer by layer, the median over members",
        "<dt>rule</dt><dd>adam</dd>",
    ):
        assert told in page
    assert not re.findall(r'(?:src|href)="(?!data:)(?!#)', page.partition("<noscript>")[0])
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page)
    assert len(figures) >= 7
    assert all(json.loads(figure)["data"] for figure in figures)


def test_a_sentence_says_what_is_wrong(capsys: Any) -> None:
    code, out, _ = run(capsys, "t.py:dead", "--layers", "a", "relu()")
    assert code == 0
    assert "relu() (relu)" not in out
    assert "• relu(): 100 % of its units are at zero for every example" in out


def test_names_of_layers_are_whole(capsys: Any) -> None:
    code, out, _ = run(capsys, "t.py:nested", "--steps", "2")
    assert code == 0
    assert "encoder.layers.0.self_attn" in out
    assert "encoder.layers.0.dropout1" in out
    assert "…" not in out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("t.py:shallow", "no task in t.py is named 'shallow'"),
        ("t.py:deep --layers 00", "no layer is named '00'"),
        ("t.py:deep --init xaver", "did you mean 'xavier'"),
        ("t.py:deep --init he:much", "write NAME or NAME:GAIN"),
        ("t.py:deep --init gaussian", "needs its standard deviation"),
        ("t.py:deep --rule adm", "no rule is named 'adm'"),
        ("t.py:deep --steps -1", "steps is -1"),
    ],
)
def test_errors(capsys: Any, line: str, told: str) -> None:
    code, _, err = run(capsys, *line.split())
    assert code == 2
    assert told in err
    assert "Traceback" not in err
