"""Tape, table, vmap and loop: each gives every member the loss, gradient and buffers it has alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.cases import CASES, LOOP, NAMED, TABLE, TAPE, VMAP, Case, by, classified, nothing, stand
from torch import Tensor

from losslab.engine import Points
from losslab.engine.backends import BACKENDS, Backend, Stand
from losslab.engine.execution import Execution
from losslab.engine.hessian import BatchCurvature
from losslab.engine.template import Template
from losslab.tasks import lenet_300_100, mlp
from losslab.tasks.nest import map_nest

every_case = pytest.mark.parametrize("case", CASES, ids=str)
batches = pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])


def close(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def backend(name: str, case: Case) -> Backend:
    return BACKENDS[name](Template(case.make().double()), draws=case.draws)


def alone(case: Case, at: Stand, i: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers after of one member, by an ordinary module and ordinary autograd."""
    if case.draws:  # masks come from the member's own stream: the loop with one member stands in
        one = at.rows(slice(i, i + 1)).sheltered()
        losses, grads = backend(LOOP, case).gradients(case.loss, one)
        return losses[0], {n: g[0] for n, g in grads.items()}, {n: b[0] for n, b in one.buffers.items()}
    module = Points(at.weights, at.buffers).load_into(case.make().double(), i).train()
    loss = case.loss(module, map_nest(lambda t: t[i], at.batch) if at.private else at.batch)
    loss.backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in module.named_parameters()
        if p.requires_grad
    }
    buffers = {n: t.detach() for n, t in [*module.named_buffers(), *module.named_parameters()]}
    return loss.detach(), grads, {n: buffers[n] for n in at.buffers}


def attempts(case: Case, private: bool) -> list[tuple[str, Stand, Tensor, dict[str, Tensor]]]:
    """What each backend that runs the case gives; one that must run it and does not raises."""
    found = []
    for name in BACKENDS:
        at = stand(case, private)
        try:
            losses, grads = backend(name, case).gradients(case.loss, at)
        except Exception:
            if name in case.backends:
                raise
        else:
            found.append((name, at, losses, dict(grads)))
    return found


@every_case
@batches
def test_each_member_has_the_loss_gradient_and_buffers_it_has_alone(case: Case, private: bool) -> None:
    at = stand(case, private)
    wanted = [alone(case, at, i) for i in range(at.members)]
    for name, moved, losses, grads in attempts(case, private):
        assert list(grads) == list(moved.weights), name
        for i, (loss, gradient, buffers) in enumerate(wanted):
            close(losses[i], loss)
            close({n: g[i] for n, g in grads.items()}, gradient)
            close({n: b[i] for n, b in moved.buffers.items()}, buffers)


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "noise"], ids=str)  # draws in evaluation too
def test_evaluation_equals_each_member_alone_and_leaves_no_trace(case: Case) -> None:
    at = stand(case, private=False)
    kept = copy.deepcopy(at)
    for name in case.backends:
        execution = Execution(backend(name, case), chunk=2)
        with torch.no_grad():
            values = execution.run(lambda m, b: {"loss": case.loss(m, b)}, at, training=False)["loss"]
        for i in range(at.members):
            module = Points(at.weights, at.buffers).load_into(case.make().double(), i).eval()
            close(values[i], case.loss(module, at.batch).detach())
    close(at.buffers, kept.buffers, 0.0)
    close(at.weights, kept.weights, 0.0)


def test_the_network_is_in_the_mode_it_is_asked_for() -> None:
    case = NAMED["bn1d"]
    at = stand(case, private=False)
    modes = []

    def loss(model: Any, batch: Any) -> Tensor:
        modes.append(model.training)
        return case.loss(model, batch)

    how = backend(LOOP, case)
    how.gradients(loss, at.sheltered())
    how.run(loss, at.sheltered(), training=False)
    assert modes == [True] * 3 + [False] * 3


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != VMAP])  # torch's vmap raises a RuntimeError
@pytest.mark.parametrize("ignore", [-100, 0, 2])
@pytest.mark.parametrize("wrong", [3, -5])
def test_a_label_outside_of_the_outputs_is_an_index_error(name: str, ignore: int, wrong: int) -> None:
    case = Case("", mlp(4, 6, 3), NAMED["mlp-relu"].batch, by(F.cross_entropy, ignore_index=ignore))
    at = stand(case, private=True)
    at.batch[1][1, 2] = wrong
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        backend(name, case).gradients(case.loss, at)


def test_dropout_masks_are_the_members_own() -> None:
    case = NAMED["dropout"]
    at = stand(case, private=False)
    how = backend(TABLE, case)
    losses, _ = how.gradients(case.loss, at)
    again, _ = how.gradients(case.loss, at)
    other = Stand(at.weights, at.buffers, at.batch, False, at.keys + 1)
    assert torch.equal(losses, again)
    assert not torch.isclose(losses, how.gradients(case.loss, other)[0]).any()
    twins = Stand({n: w[[0, 0]] for n, w in at.weights.items()}, {}, at.batch, False, at.keys[:2])
    first, second = how.gradients(case.loss, twins)[0]
    assert not torch.isclose(first, second)


@pytest.mark.parametrize("name", [TAPE, TABLE])
@pytest.mark.parametrize("examples", [60, 400])
@batches
def test_large_layers_in_float32_equal_float64(name: str, examples: int, private: bool) -> None:
    layers = lenet_300_100() if examples == 60 else mlp(784, 300, 10)
    case = Case("", layers, lambda g, n: classified(784, classes=10)(g, examples), NAMED["mlp-relu"].loss)
    at = stand(case, private, members=2, dtype=torch.float32)
    losses, grads = BACKENDS[name](Template(case.make()), draws=False).gradients(case.loss, at)
    wanted, exact = backend(LOOP, case).gradients(case.loss, at.to(torch.float64))
    close(losses.double(), wanted, 1e-6)
    for n, g in exact.items():
        assert float((grads[n].double() - g).norm() / g.norm()) < 2e-6


SMOOTH = ["mlp-tanh", "linear-mse", "wide-mse", "bn1d", "ln", "conv1d", "attention", "scalar", "tied",
          "weights-only", "ignored", "bce", "frozen"]  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_the_hessian_equals_autograd_on_the_module_alone(name: str) -> None:
    case = NAMED[name]
    at = stand(case, private=case.batch is not nothing, members=2)
    kept = copy.deepcopy(at)
    for way in case.backends:
        found = BatchCurvature(Execution(backend(way, case), 2), case.loss, at).hessian()
        for i in range(2):
            close(found[i], hessian(case, at, i), 1e-8)
    close(at.buffers, kept.buffers, 0.0)


def hessian(case: Case, at: Stand, i: int) -> Tensor:
    """Of one member, by torch.autograd.functional on the flat vector of its weights."""
    module = Points(at.weights, at.buffers).load_into(case.make().double(), i).train()
    batch = map_nest(lambda t: t[i], at.batch) if at.private else at.batch
    shapes = {n: w.shape[1:] for n, w in at.weights.items()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes.values()])
        given = {n: p.view(s) for p, (n, s) in zip(parts, shapes.items(), strict=True)}
        held = copy.deepcopy(module)
        return torch.func.functional_call(
            _Loss(held, case, batch), {f"held.{n}": p for n, p in given.items()}
        )

    flat = torch.cat([w[i].flatten() for w in at.weights.values()])
    return torch.autograd.functional.hessian(loss, flat)


class _Loss(torch.nn.Module):
    def __init__(self, held: torch.nn.Module, case: Case, batch: Any) -> None:
        super().__init__()
        self.held, self.case, self.batch = held, case, batch

    def forward(self) -> Tensor:
        return self.case.loss(self.held, self.batch)
