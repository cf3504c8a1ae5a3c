"""Stacks of weights, the module that stands in for them, and the line that tells of progress."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from tests.engine.cases import CASES, NAMED, Case, stand
from torch import nn

from losslab import LosslabError, Points
from losslab.engine.backends import BACKENDS
from losslab.engine.execution import Execution
from losslab.engine.hessian import BatchCurvature
from losslab.engine.history import History
from losslab.engine.progress import Bar
from losslab.engine.template import Template


def points(case: Case) -> Points:
    at = stand(case, private=False)
    return Points(at.weights, at.buffers)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_points_come_from_modules_and_go_back_into_them(case: Case) -> None:
    modules = [case.make() for _ in range(3)]
    found = Points.from_modules(modules)
    assert found.members == 3
    assert found.parameters == sum(p.numel() for p in modules[0].parameters() if p.requires_grad)
    for i, module in enumerate(modules):
        copy = found.load_into(case.make(), i)
        for name, tensor in module.state_dict().items():
            assert torch.equal(copy.state_dict()[name], tensor)
        flat = [p.detach().flatten() for p in module.parameters() if p.requires_grad]
        assert torch.equal(found.matrix()[i], torch.cat(flat))
    again = found.at(found.matrix())
    assert all(torch.equal(again[n], found[n]) for n in found.weights)
    for name in found:
        found[name].zero_()
    assert any(bool(p.any()) for p in modules[0].parameters())


def test_points_of_two_architectures_do_not_stack() -> None:
    with pytest.raises(
        LosslabError, match="module 1 differs from module 0 at 'weight': stack modules of one"
    ):
        Points.from_modules([nn.Linear(2, 3), nn.Linear(3, 3)])
    with pytest.raises(LosslabError, match="no module was given"):
        Points.from_modules([])
    with pytest.raises(LosslabError, match=r"coordinates of shape \(2, 5\), wanted \[points, 9\]"):
        Points.from_modules([nn.Linear(2, 3)]).at(torch.ones(2, 5))


def test_points_are_picked_copied_and_converted() -> None:
    found = points(NAMED["bn1d"])
    some = found.select([2, 0, 2])
    assert torch.equal(some["0.weight"], found["0.weight"][[2, 0, 2]])
    some["0.weight"].zero_()
    assert bool(found["0.weight"].any())
    short = found.to(dtype=torch.bfloat16)
    assert short["0.weight"].dtype == torch.bfloat16
    assert short["1.num_batches_tracked"].dtype == torch.int64
    assert len(found) == len(list(found)) == len(found.weights) + len(found.buffers)
    moved = found.at(torch.zeros(2, found.parameters, dtype=torch.float64))
    assert torch.equal(moved["1.running_var"], found["1.running_var"][[0, 0]])


@pytest.mark.parametrize("name", ["lstm", "tied", "bn1d"])
def test_the_template_is_a_copy_that_is_put_back_after_an_error(name: str) -> None:
    case = NAMED[name]
    module = case.make().double().eval()
    template, found = Template(module), points(case)
    values: dict[str, Any] = {n: t[1] for n, t in found.items()}
    batch = case.batch(torch.Generator().manual_seed(0), 4)
    x = batch[0].double()
    with template.holding(values, training=False) as held:
        inside = held(x)
    assert torch.equal(inside, found.load_into(case.make().double(), 1).eval()(x))
    with pytest.raises(KeyError), template.holding({}, training=True):
        pass
    assert torch.equal(template.module.eval()(x), module(x))


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    at = stand(NAMED["mlp-identity"], private=False, members=2)
    template = Template(NAMED["mlp-identity"].make().double())
    for name in ("table", "vmap", "loop"):
        way = Execution(BACKENDS[name](template, draws=False), 2)
        found = BatchCurvature(way, lambda m, b: m[2].bias.sum(), at).hessian()
        assert found.shape == (2, 51, 51)
        assert not found.any()


def test_a_history_is_kept_as_tensors() -> None:
    history = History(3)
    assert History.from_tensors(3, history.tensors()).tensors()["steps"].tolist() == []
    history.add(4, {"loss": torch.tensor([1.0, torch.inf])}, torch.tensor([0, 2]))
    history.add(1, {"loss": torch.ones(3), "b": torch.zeros(3)}, torch.arange(3))
    again = History.from_tensors(3, history.tensors())
    assert again.columns == ["loss", "b"]
    table = again.table(2, {"seed": [5, 6, 7]})
    assert table.equals(history.table(2, {"seed": [5, 6, 7]}))
    assert table.step.tolist() == [1, 1, 1, 4, 4, 4]
    assert table.epoch.tolist() == [0.5] * 3 + [2.0] * 3
    assert table.loss.tolist()[3:6:2] == [1.0, float("inf")]
    assert table.loss.isna().sum() == 1


def test_progress_is_told_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for show, quiet in ((None, True), (False, True), (True, False)):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        with Bar(10, 3, show=show) as bar:
            bar.drawn = bar.begun = 0.0
            if bar.due():
                bar.update(4, 0.25, 2)
        assert (stream.getvalue() == "") is quiet
        assert quiet or ("4/10" in stream.getvalue() and "2/3 alive" in stream.getvalue())
