"""Rules as torch optimizers: the same numbers, torch's habits, none of its surprises."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tests.rules.cases import CASES, SECOND_ORDER, TORCH, Case, draw, run
from torch import Tensor, nn

from losslab import LosslabError
from losslab.rules import (
    SGD,
    AdaGrad,
    Adam,
    AdaMax,
    AMSGrad,
    FullAdaGrad,
    Momentum,
    Nesterov,
    Newton,
    RMSProp,
    schedules,
)
from losslab.rules import TorchOptimizer as Adapter

STEPS = 12
adaptable = [case for case in CASES if case.rule not in SECOND_ORDER and case.first == 0]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    return {n: nn.Parameter(w[0].clone()) for n, w in draw(seed, members=1, dtype=dtype).items()}


def drive(
    optimizer: torch.optim.Optimizer, params: Any, steps: int = STEPS, seed: int = 1, first: int = 0
) -> None:
    """The same ``steps`` gradients for everyone; checks that they are left alone."""
    given = list(params.values()) if isinstance(params, dict) else list(params)
    for g in draw(seed, steps=first + steps, members=1, dtype=given[0].dtype)[first:]:
        for p, tensor in zip(given, g.values(), strict=True):
            p.grad = tensor[0].clone()
        kept = [p.grad for p in given]
        optimizer.step()
        assert all(
            p.grad is k and torch.equal(k, t[0]) for p, k, t in zip(given, kept, g.values(), strict=True)
        )


def same(ours: Any, theirs: Any, **told: float) -> None:
    for p, q in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(p.data, q.data, **(told or {"rtol": 1e-12, "atol": 1e-13}))


@pytest.mark.parametrize("case", adaptable, ids=str)
@pytest.mark.parametrize(
    "extra", [{}, {"weight_decay": 0.1, "clip": 1.0, "box": 0.9}], ids=["plain", "extras"]
)
def test_equals_the_rule(case: Case, extra: dict[str, float]) -> None:
    params, rule = parameters(), case.make(**extra)
    drive(rule.as_torch(params.values()), params)
    weights, _ = run(rule, draw(0, members=1), draw(1, steps=STEPS, members=1))
    same(params, {n: w[0] for n, w in weights.items()})


@pytest.mark.parametrize("case", TORCH, ids=str)
def test_equals_torch_and_keeps_its_names(case: Case) -> None:
    assert case.torch is not None
    ours, theirs = parameters(), parameters()
    mine, other = Adapter(ours.values(), case.make()), case.torch(list(theirs.values()))
    drive(mine, ours)
    drive(other, theirs)
    same(ours, theirs)
    rate_inside = case.settings.get("variant") in ("sutskever", "lookahead")
    for p, q in zip(ours.values(), theirs.values(), strict=True):
        for key, value in other.state[q].items():
            if isinstance(value, Tensor) and not rate_inside:
                torch.testing.assert_close(mine.state[p][key], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", adaptable, ids=str)
def test_state_survives_a_file(case: Case) -> None:
    whole, halved = parameters(), parameters()
    drive(Adapter(whole.values(), case.make()), whole)
    first = Adapter(halved.values(), case.make())
    drive(first, halved, steps=5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Adapter(halved.values(), case.make(lr=0.123))
    second.load_state_dict(torch.load(file, weights_only=True))
    drive(second, halved, steps=STEPS - 5, first=5)
    same(halved, whole, rtol=0, atol=0)


def test_state_moves_to_torch_and_back() -> None:
    ours, theirs = parameters(), parameters()
    mine, other = Adapter(ours.values(), Adam(lr=0.1)), torch.optim.Adam(theirs.values(), lr=0.1)
    drive(mine, ours, steps=4)
    drive(other, theirs, steps=4)
    swapped, back = torch.optim.Adam(ours.values(), lr=0.1), Adapter(theirs.values(), Adam(lr=0.5))
    hyper = {
        "params": [0, 1, 2],
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "amsgrad": False,
    }
    hyper |= {"maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
    swapped.load_state_dict({"state": mine.state_dict()["state"], "param_groups": [hyper]})
    back.load_state_dict(other.state_dict())
    assert back.param_groups[0]["lr"] == 0.1
    drive(swapped, ours, first=4)
    drive(back, theirs, first=4)
    same(ours, theirs)
    assert {int(s["step"]) for s in back.state.values()} == {STEPS + 4}


def test_moments_of_bfloat16_weights_stay_wide_through_a_load() -> None:
    params = parameters(dtype=torch.bfloat16)
    optimizer = Adapter(params.values(), Adam())
    drive(optimizer, params, steps=2)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["exp_avg_sq"] = state["exp_avg_sq"].float() + 1e-6
    again = Adapter(params.values(), Adam())
    again.load_state_dict(saved)
    for index, p in enumerate(params.values()):
        held = again.state[p]["exp_avg_sq"]
        assert held.dtype == torch.float32
        assert torch.equal(held, saved["state"][index]["exp_avg_sq"])
    drive(again, params, steps=1)
    assert all(p.dtype == torch.bfloat16 for p in params.values())
    assert all(state["exp_avg_sq"].dtype == torch.float32 for state in again.state.values())
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in again.state.values())


def test_a_load_copies() -> None:
    params = parameters()
    optimizer = Adapter(params.values(), Adam())
    drive(optimizer, params, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    again = Adapter(parameters().values(), Adam())
    again.load_state_dict(copy.deepcopy(saved))
    drive(optimizer, params, steps=2)
    for p, state in zip(again.param_groups[0]["params"], saved["state"].values(), strict=True):
        assert torch.equal(again.state[p]["exp_avg"], state["exp_avg"])


def test_groups_have_their_own_hyperparameters() -> None:
    grouped, split = parameters(), parameters()
    one, *rest = grouped.values()
    optimizer = Adapter([{"params": [one], "lr": 0.5, "beta1": 0.5}, {"params": rest}], Adam(lr=0.1))
    drive(optimizer, grouped)
    first, *others = split.values()
    parts = [Adapter([first], Adam(lr=0.5, beta1=0.5)), Adapter(others, Adam(lr=0.1))]
    both = type("Both", (), {"step": lambda self: [part.step() for part in parts]})()
    drive(both, split)
    same(grouped, split)


def test_torch_schedulers_change_the_rate() -> None:
    ours, theirs = parameters(), parameters()
    pairs = [
        (Adapter(ours.values(), Momentum(lr=0.1)), ours),
        (torch.optim.SGD(theirs.values(), 0.1, 0.9), theirs),
    ]
    for optimizer, params in pairs:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
        for k in range(STEPS):
            drive(optimizer, params, steps=1, first=k)
            scheduler.step()
    same(ours, theirs)
    assert pairs[0][0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**4)


def test_a_rate_held_as_a_tensor_may_change_in_place() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, rate = Adapter(ours.values(), SGD(lr=0.1)), torch.tensor(0.1, dtype=torch.float64)
    optimizer.param_groups[0]["lr"] = rate
    for k in range(4):
        drive(optimizer, ours, steps=1, first=k)
        rate.mul_(2)
    drive(Adapter(theirs.values(), SGD(lr=schedules.exponential(0.1, rate=2.0))), theirs, steps=4)
    same(ours, theirs)


def test_a_schedule_of_the_rule_is_told_in_the_group() -> None:
    params = parameters()
    optimizer = Adapter(params.values(), Adam(lr=schedules.inverse([0.4])))
    drive(optimizer, params, steps=4)
    assert optimizer.param_groups[0]["lr"] == 0.1
    weights, _ = run(Adam(lr=schedules.inverse(0.4)), draw(0, members=1), draw(1, steps=4, members=1))
    same(params, {n: w[0] for n, w in weights.items()})


def test_parameters_without_gradients_stand_still() -> None:
    ours, theirs = parameters(), parameters()
    pairs = [
        (Adapter(ours.values(), Adam(lr=0.1)), ours),
        (torch.optim.Adam(theirs.values(), lr=0.1), theirs),
    ]
    for optimizer, params in pairs:
        for k, g in enumerate(draw(1, steps=STEPS, members=1)):
            for n, p in params.items():
                p.grad = None if n == "bias" and k % 3 else g[n][0].clone()
            optimizer.step()
    same(ours, theirs)
    steps = [int(pairs[0][0].state[p]["step"]) for p in ours.values()]
    assert steps == [STEPS, STEPS // 3, STEPS]


def test_the_closure_is_called_with_gradients_on() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = Adapter([p], SGD(lr=0.25))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == 1.0


def test_a_matrix_rule_sees_the_group_as_one_vector() -> None:
    params, rule = parameters(), FullAdaGrad(lr=0.3, eps=0.1)
    optimizer = Adapter(params.values(), rule)
    drive(optimizer, params)
    first = next(iter(params.values()))
    assert optimizer.state[first]["S"].shape == (12, 12)
    weights, _ = run(rule, draw(0, members=1), draw(1, steps=STEPS, members=1))
    same(params, {n: w[0] for n, w in weights.items()})


@pytest.mark.parametrize(
    "rule", [Adam(lr=0.1), AdaMax(lr=0.1), RMSProp(), AdaGrad(), Momentum(), AMSGrad()], ids=str
)
def test_weights_in_another_memory_format(rule: Any) -> None:
    plain = nn.Conv2d(2, 3, 3).double()
    strided = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    both = [Adapter(net.parameters(), rule) for net in (plain, strided)]
    for net, optimizer in zip((plain, strided), both, strict=True):
        for k in range(3):
            x = torch.linspace(-1, 1, 50, dtype=torch.float64).view(1, 2, 5, 5) * (k + 1)
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert strided.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(strided.weight, plain.weight, rtol=1e-10, atol=1e-12)
    for key, value in both[0].state[plain.weight].items():
        torch.testing.assert_close(both[1].state[strided.weight][key], value, rtol=1e-10, atol=1e-12)


def test_training_a_network() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(30, 4)
    y = (x[:, 0] > 0).long()
    optimizer = Nesterov(lr=0.1).as_torch(net.parameters())
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_a_copy_goes_on_alike() -> None:
    params = parameters()
    holder = {"params": params, "optimizer": Adapter(params.values(), Adam(lr=0.1))}
    drive(holder["optimizer"], params, steps=3)
    twin = copy.deepcopy(holder)
    for each in (holder, twin):
        drive(each["optimizer"], each["params"], steps=3, first=3)
    same(twin["params"], params, rtol=0, atol=0)


def one(value: Any = 1.0) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value]))]


def test_what_an_optimizer_cannot_do_is_said() -> None:
    with pytest.raises(LosslabError, match="newton needs the Hessian, which an optimizer is not given"):
        Adapter(one(), Newton())
    with pytest.raises(LosslabError, match=r"lr has shape \(3,\), the population has 1 members"):
        Adapter(one(), Adam(lr=[0.1, 0.2, 0.3]))
    with pytest.raises(LosslabError, match="adam: lr is -1, it must be at least 0 and finite"):
        Adapter([{"params": one(), "lr": -1.0}], Adam())
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([0])).sum().backward()
    with pytest.raises(LosslabError, match="adam got a sparse gradient"):
        Adapter(embedding.parameters(), Adam()).step()
    p = one(1 + 1j)
    p[0].abs().sum().backward()
    with pytest.raises(LosslabError, match="sgd got a complex gradient"):
        Adapter(p, SGD()).step()


def test_the_state_of_another_rule_is_refused() -> None:
    params = parameters()
    optimizer = Adapter(params.values(), Momentum())
    drive(optimizer, params, steps=1)
    with pytest.raises(
        LosslabError, match="holds momentum_buffer, step, adam keeps exp_avg, exp_avg_sq, step"
    ):
        Adapter(parameters().values(), Adam()).load_state_dict(optimizer.state_dict())
