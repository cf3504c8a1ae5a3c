"""Machine code for chains: the numbers of the operations, for any sizes, and only where it is meant to be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.cases import Case, stand
from torch import nn

from losslab import train
from losslab.engine import compiled
from losslab.engine.backends import Stand
from losslab.engine.chain import Chain
from losslab.engine.measured import Measured
from losslab.engine.template import Template
from losslab.tasks import Supervised, digits_task, mlp

ENTROPY = Supervised(F.cross_entropy)

pytestmark = pytest.mark.skipif(compiled.machine_code() is None, reason="needs numba and vectors of 512 bits")


def chain_of(case: Case, at: Stand) -> Chain:
    found = Chain.of(Template(case.make()), case.loss, at.weights)
    assert found is not None
    return found


def copied(at: Stand, dtype: torch.dtype) -> Stand:
    return dataclasses.replace(at, buffers={n: b.clone() for n, b in at.buffers.items()}).to(dtype)


def compare(case: Case, at: Stand) -> bool:
    """Machine code in float32 against operations in float64; whether there was machine code for it."""
    chain, wide, mine = chain_of(case, at), copied(at, torch.float64), copied(at, torch.float32)
    if chain.compiled is None:
        return False
    x, y = mine.batch
    members = mine.members
    if not mine.private:
        x, y = x.expand(members, *x.shape), y.expand(members, *y.shape)
    told = chain.compiled(mine.weights, mine.buffers, x, y)
    if told is None:
        return False
    losses, gradients = chain.gradients(wide.weights, wide.buffers, wide.batch, wide.private)
    torch.testing.assert_close(told[0].double(), losses, rtol=1e-5, atol=1e-5)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, g in gradients.items():
        assert told[1][name].is_contiguous()
        assert float((told[1][name].double() - g).abs().max()) <= 1e-5 * (largest + 1e-3)
    for name, moved in wide.buffers.items():
        torch.testing.assert_close(mine.buffers[name].double(), moved.double(), rtol=1e-5, atol=1e-6)
    return True


def case_of(make: Any, inputs: tuple[int, ...], classes: int, examples: int) -> Case:
    def batch(g: torch.Generator, n: int) -> Any:
        return torch.randn(examples, *inputs, generator=g), torch.randint(classes, (examples,), generator=g)

    return Case("machine", make, batch, ENTROPY)


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    members=st.integers(1, 5),
    examples=st.integers(2, 70),
    private=st.booleans(),
    normed=st.booleans(),
)
def test_any_sizes_give_the_numbers_of_the_operations(
    widths: list[int], members: int, examples: int, private: bool, normed: bool
) -> None:
    case = case_of(mlp(*widths, batch_norm=normed), (widths[0],), widths[-1], max(examples, 8 * normed))
    assert compare(case, stand(case, private, members, torch.float32))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("examples", [2, 16, 60, 256])
def test_threads_share_the_members_and_change_nothing(threads: int, examples: int) -> None:
    case = case_of(mlp(64, 100, 33, 10, batch_norm=True), (64,), 10, examples)
    at, before = stand(case, True, 7, torch.float32), torch.get_num_threads()
    told = []
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            mine = copied(at, torch.float32)
            told.append(chain_of(case, at).gradients(mine.weights, mine.buffers, mine.batch, True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(told[0][0], told[1][0])
    assert all(torch.equal(told[0][1][n], told[1][1][n]) for n in at.weights)
    alone = at.rows(slice(3, 4))
    found = chain_of(case, at).gradients(alone.weights, alone.buffers, alone.batch, True)
    assert all(torch.equal(found[1][n][0], told[0][1][n][3]) for n in at.weights)


def sequence(*layers: nn.Module) -> Any:
    return lambda: nn.Sequential(*layers)


KNOWN = {
    "no bias": (sequence(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)), (4,)),
    "wide": (sequence(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 3)), (784,)),
    "linear": (sequence(nn.Linear(4, 6), nn.Linear(6, 3)), (4,)),
    "images": (sequence(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (1, 2, 2)),
    "ReLU last": (sequence(nn.Linear(4, 3), nn.ReLU()), (4,)),
    "batch norm last": (sequence(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3)), (4,)),
}
UNKNOWN = {
    "tanh": (sequence(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "batch norm first": (sequence(nn.BatchNorm1d(4), nn.Linear(4, 3)), (4,)),
    "batch norm after ReLU": (
        sequence(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 3)), (4,)),
    "no affine": (sequence(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)), (4,)),
    "two ReLU": (sequence(nn.Linear(4, 3), nn.ReLU(), nn.ReLU()), (4,)),
    "large": (sequence(nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 3)), (600,)),
}  # fmt: skip


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_it_is_for_these_chains_and_no_others(name: str, private: bool) -> None:
    case = case_of(*{**KNOWN, **UNKNOWN}[name], 3, 12)
    assert compare(case, stand(case, private, 3, torch.float32)) is (name in KNOWN)


def strided(at: Stand) -> Stand:
    at.weights["0.weight"] = at.weights["0.weight"].transpose(1, 2).contiguous().transpose(1, 2)
    return at


def labelled(label: int) -> Any:
    def change(at: Stand) -> Stand:
        at.batch[1].view(-1)[-1] = label
        return at

    return change


@pytest.mark.parametrize(
    "change",
    [strided, labelled(-100), labelled(3), lambda at: at.to(torch.float64)],
    ids=["strides", "ignored", "beyond", "double"],
)
def test_what_it_does_not_take_is_left_untouched(change: Any) -> None:
    case = case_of(mlp(4, 6, 3, batch_norm=True), (4,), 3, 12)
    at = change(stand(case, True, 3, torch.float32))
    before = {n: b.clone() for n, b in at.buffers.items()}
    chain = chain_of(case, at)
    assert chain.compiled is not None
    assert chain.compiled(at.weights, at.buffers, *at.batch) is None
    assert all(torch.equal(before[n], b) for n, b in at.buffers.items())


def test_not_a_number_stays_with_its_member() -> None:
    case = case_of(mlp(4, 6, 3, batch_norm=True), (4,), 3, 12)
    at = stand(case, False, 3, torch.float32)
    at.weights["0.weight"][1, 2, 3] = torch.nan
    losses, gradients = chain_of(case, at).gradients(at.weights, at.buffers, at.batch, False)
    assert losses.isfinite().tolist() == [True, False, True]
    for g in gradients.values():
        assert g[[0, 2]].isfinite().all()
        assert not g[1].isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    case = case_of(mlp(4, 3), (4,), 3, 12)
    at = stand(case, True, 2, torch.float32)
    at.weights["0.weight"] *= 1e4
    assert compare(case, at)


def test_a_small_loss_is_not_lost_beside_large_logits() -> None:
    case = case_of(mlp(4, 3), (4,), 3, 12)
    at = stand(case, True, 1, torch.float32)
    # Logits 1000 x_1 + 10, 1000 x_1, 1000 x_1: a loss of about 1e-4, whatever they have in common.
    at.weights["0.weight"].zero_()[:, :, 0] = 1000.0
    at.weights["0.bias"].copy_(torch.tensor([[10.0, 0.0, 0.0]]))
    x, y = at.batch
    x.copy_(x.round())
    y.zero_()
    losses, _ = chain_of(case, at).gradients(at.weights, at.buffers, at.batch, at.private)
    wanted = float(torch.log1p(2 * torch.exp(torch.tensor(-10.0, dtype=torch.float64))))
    assert float(losses[0]) == pytest.approx(wanted, rel=2e-3)


def test_a_network_measured_in_evaluation_mode_is_left_to_the_operations() -> None:
    case = case_of(mlp(4, 6, 3, batch_norm=True), (4,), 3, 12)
    at = stand(case, True, 2, torch.float32)
    chain = Chain.of(Measured(case.make(), training=False), ENTROPY, at.weights)
    assert chain is not None
    assert chain.compiled is None


def test_training_goes_by_it_and_ends_where_the_operations_end(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    whole = compiled.Compiled.__call__

    def counted(self: Any, *args: Any) -> Any:
        found = whole(self, *args)
        runs.append(found is not None)
        return found

    options: Any = {"seeds": 4, "steps": 30, "batch_size": 32, "execution": "stacked", "progress": False}
    task = digits_task(mlp(64, 24, 10, batch_norm=True))
    monkeypatch.setattr(compiled.Compiled, "__call__", counted)
    mine = train(task, "sgd", **options)
    assert sum(runs) >= 30
    monkeypatch.setattr(compiled.Compiled, "__call__", lambda self, *args: None)
    theirs = train(task, "sgd", **options)
    for name, w in mine.points.items():
        torch.testing.assert_close(w, theirs.points[name], rtol=1e-3, atol=1e-4)
