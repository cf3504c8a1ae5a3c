"""One update: the kernel is the equation, and torch's optimizers keep their state."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from losslab import LosslabError, TorchRule
from losslab.engine.gradients import Factored, Gradients
from losslab.engine.updating import Updater, as_rule, updater
from losslab.rules import GD, SGD, AdaGrad, Adam, AMSGrad, Momentum, Nesterov, RMSProp, Rule

MEMBERS, STEPS = 3, 4
FUSED: list[Rule] = [
    GD(lr=0.1), SGD(lr=[0.1, 0.2, 0.3], weight_decay=[0.0, 0.1, 0.2]), Momentum(lr=0.1, weight_decay=0.1),
    Momentum(lr=[0.1, 0.2, 0.3], weight_decay=[0.0] * 3), Momentum(lr=0.1, beta=[0.0, 0.5, 0.9]),
    Nesterov(lr=0.1, beta=0.9), Adam(lr=[0.01, 0.02, 0.03]), Adam(beta1=[0.8, 0.9, 0.95], weight_decay=0.1),
    Adam(lr=0.01, weight_decay=[0.1, 0.0, 0.2], decay="decoupled"), AMSGrad(lr=0.01), RMSProp(lr=0.01),
    AdaGrad(lr=[0.1, 0.2, 0.3]),
]  # fmt: skip
NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}


def draws(dtype: torch.dtype, size: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(size)
    shapes = {"weight": (MEMBERS, size, 3), "bias": (MEMBERS, size), "scale": (MEMBERS,)}

    def one() -> dict[str, Tensor]:
        return {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}

    return one(), [one() for _ in range(STEPS)]


@pytest.mark.parametrize("rule", FUSED, ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("size", [5, 37, 12_000])
def test_the_kernel_is_the_equation(rule: Rule, dtype: torch.dtype, size: int) -> None:
    weights, gradients = draws(dtype, size)
    way = Updater(rule)
    assert way.fused is not None
    ours, state = {n: w.clone() for n, w in weights.items()}, way.init(weights)
    theirs: dict[str, Tensor] = {n: w.double() for n, w in weights.items()}
    kept = rule.init(theirs)
    for step, g in enumerate(gradients):
        before = {n: t.clone() for n, t in g.items()}
        ours, state = way.apply(g, state, ours, step)  # type: ignore[assignment]
        theirs, kept = rule.update({n: t.double() for n, t in g.items()}, kept, theirs, step)
        assert all(torch.equal(g[n], before[n]) for n in g)
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name].double(), wanted, rtol=NEAR[dtype], atol=NEAR[dtype])
        assert ours[name].dtype == dtype


@pytest.mark.parametrize("rule", FUSED, ids=lambda r: r.name)
def test_a_gradient_in_factors_is_the_gradient_written_out(rule: Rule) -> None:
    weights, _ = draws(torch.float64, 12_000)
    draw = torch.Generator().manual_seed(1)
    factors = [torch.randn(MEMBERS, 4, width, generator=draw, dtype=torch.float64) for width in (12_000, 3)]
    small = {n: weights[n] ** 2 - 0.5 for n in ("bias", "scale")}
    found = []
    for large in (Factored(*factors), Factored(*factors).tensor()):
        way, ours = Updater(rule), {n: w.clone() for n, w in weights.items()}
        state = way.init(ours)
        for step in range(STEPS):
            grads = Gradients({"weight": large, **small})
            ours, state = way.apply(grads, state, ours, step)  # type: ignore[assignment]
        found.append(ours)
    for name in weights:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-12, atol=1e-12)


def test_gradients_need_not_lie_in_one_piece() -> None:
    weights, gradients = draws(torch.float64, 4)
    g = gradients[0] | {"weight": torch.ones(MEMBERS, 1, 1, dtype=torch.float64).expand(MEMBERS, 4, 3)}
    ours, _ = Updater(Adam()).apply(g, Adam().init(weights), {n: w.clone() for n, w in weights.items()}, 0)
    theirs, _ = Adam().update(g, Adam().init(weights), weights, 0)
    torch.testing.assert_close(dict(ours), theirs, rtol=1e-12, atol=1e-12)


STATES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.Adam, {"amsgrad": True}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.RMSprop, {"centered": True}), (torch.optim.Adagrad, {}), (torch.optim.NAdam, {}),
    (torch.optim.LBFGS, {"lr": 0.5, "max_iter": 3}), (torch.optim.Rprop, {}), (torch.optim.ASGD, {}),
    (torch.optim.Adafactor, {}), (torch.optim.Adadelta, {}), (torch.optim.Adamax, {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), STATES, ids=lambda v: getattr(v, "__name__", ""))
def test_the_state_of_torchs_optimizers_can_be_put_down_and_taken_up(
    kind: Any, options: dict[str, Any]
) -> None:
    rule = TorchRule(kind, **options)
    weights, gradients = draws(torch.float64, 4)

    def closure(member: int, row: list[Tensor]) -> Tensor:
        for w in row:
            w.grad = w.detach() ** 3
        return sum((w.detach() ** 4 / 4).sum() for w in row)  # type: ignore[return-value]

    def advance(way: Any, w: dict[str, Tensor], steps: list[int]) -> None:
        for step in steps:
            way.apply(gradients[step], {}, w, step, None, closure)

    whole = {n: w.clone() for n, w in weights.items()}
    one = updater(rule)
    one.init(whole)
    advance(one, whole, [0, 1, 2, 3])
    parts = {n: w.clone() for n, w in weights.items()}
    first = updater(rule)
    first.init(parts)
    advance(first, parts, [0, 1])
    second, moved = updater(rule), {n: w.clone() for n, w in parts.items()}
    second.load({n: t.clone() for n, t in first.save().items()}, moved)  # type: ignore[arg-type]
    advance(second, moved, [2, 3])
    for name in whole:
        assert torch.equal(whole[name], moved[name])
    saved, again = one.save(), second.save()
    assert saved.keys() == again.keys()
    torch.testing.assert_close(saved, again, rtol=0, atol=0)


class Odd(torch.optim.SGD):
    """Keeps what no file can hold."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = {"a": 1}


def test_state_that_no_file_can_hold_is_named() -> None:
    weights, gradients = draws(torch.float64, 4)
    way = updater(TorchRule(Odd, lr=0.1))
    way.init(weights)
    way.apply(gradients[0], {}, weights, 0)
    with pytest.raises(LosslabError, match=r"torch\.Odd keeps a dict in its state, which a file cannot hold"):
        way.save()


def test_what_passes_for_a_rule() -> None:
    wrapped = as_rule(partial(torch.optim.SGD, momentum=0.9))
    assert wrapped.describe() == {"rule": "torch.SGD", "momentum": 0.9}
    many = TorchRule(torch.optim.SGD, lr=torch.tensor([0.1, 0.2]), betas=(1, 2))
    assert many.members() == 2
    assert many.select([1]).hyper["lr"] == pytest.approx([0.2])
    assert many.hyper["betas"] == (1, 2)
    assert TorchRule(torch.optim.SGD).members() is None
    with pytest.raises(LosslabError, match="is no torch"):
        TorchRule(torch.nn.Linear)
    with pytest.raises(LosslabError, match="an instance of SGD is no torch"):
        TorchRule(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
