"""N members trained together are N members trained alone, and each is what plain torch makes of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tests.engine.cases import LOOP, NAMED, Case, classified, task_of
from torch import Tensor, nn

from losslab import LosslabError, Population, Task, TorchRule, train
from losslab.engine import Batches, ExecutionNotice
from losslab.engine.randomness import seeded
from losslab.rules import Adam, Momentum, Newton, Rule
from losslab.rules.schedules import cosine
from losslab.tasks import logistic_regression
from losslab.tasks.nest import map_nest

SEEDS = [3, 1, 2]
NETS = ["mlp-relu", "linear-mse", "penalty", "ignored", "dict", "weights-only", "bn1d", "resnet", "dropout",
        "dropout-bn", "conv", "embedding", "attention", "multihead", "lstm", "tied", "frozen", "buffers",
        "scalar", "large"]  # fmt: skip
RULES: dict[str, Rule] = {
    "momentum": Momentum(lr=[0.02, 0.03, 0.05], beta=0.9, weight_decay=[0.0, 0.1, 0.01]),
    "adam": Adam(lr=cosine([0.01, 0.02, 0.03], steps=9), beta2=[0.9, 0.99, 0.999]),
    "clipped": Adam(lr=[0.01, 0.02, 0.03], clip=[0.1, 10.0, 0.5]),
}


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExecutionNotice)
        yield


def trained(case: Case, rule: Any, seeds: Any = SEEDS, **options: Any) -> Population:
    settings: dict[str, Any] = {"steps": 7, "batch_size": 6, "dtype": "float64", "record": 2}
    if case.name == "weights-only":
        settings |= {"batch_size": None}
    settings["execution"] = "loop" if case.backends == (LOOP,) else "stacked"
    task = task_of(case)
    if case.name == "weights-only":
        task = task.replace(train=None, test=None)
    with unnoticed():
        return train(task, rule, seeds=seeds, **{**settings, **options})


def same(ours: Population, i: int, theirs: Population, j: int, tolerance: float = 1e-10) -> None:
    """Member i of one population is member j of another: weights, buffers, rule state and history."""
    for name, tensor in ours.points.items():
        close(tensor[i], theirs.points[name][j], tolerance)
    for slot, tensors in ours.state.items():
        for name, tensor in tensors.items():
            close(tensor[i], theirs.state[slot][name][j], tolerance)
    a, b = ours.history, theirs.history
    a, b = (h[h.member == m].drop(columns="member").reset_index(drop=True) for h, m in ((a, i), (b, j)))
    for column in set(a.columns) & set(b.columns):
        assert a[column].tolist() == pytest.approx(b[column].tolist(), abs=1e-9, rel=1e-9, nan_ok=True), (
            column
        )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("rule", "shared"), [("momentum", False), ("adam", True), ("clipped", False)])
def test_together_is_alone(name: str, rule: str, shared: bool) -> None:
    case = NAMED[name]
    together = trained(case, RULES[rule], shared_batches=shared, order_seed=5)
    for i, seed in enumerate(SEEDS):
        alone = trained(
            case, RULES[rule].select([i]), [seed], shared_batches=shared, order_seed=5, execution="auto"
        )
        assert alone.execution is not None
        assert alone.execution.backend.name == LOOP
        same(together, i, alone, 0)


def plain(
    task: Task,
    seed: int,
    make: Callable[..., torch.optim.Optimizer],
    order: Callable[[int], Tensor],
    steps: int,
) -> nn.Module:
    """A training loop as anyone writes it."""
    with seeded(seed, "init"):
        module = task.model()
    module.double().train()
    optimizer = make(module.parameters())
    assert task.train is not None
    data = task.train.to(dtype=torch.float64)
    for step in range(steps):
        batch = data.take(order(step))

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = task.loss(module, batch)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return module


OPTIMIZERS: list[tuple[Any, Any]] = [
    (Momentum(lr=0.05, beta=0.9), partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    (Adam(lr=0.02), partial(torch.optim.Adam, lr=0.02)),
    (torch.optim.Adam, torch.optim.Adam),
    (TorchRule(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
     partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)),
    (TorchRule(torch.optim.LBFGS, lr=0.5, max_iter=4, history_size=3),
     partial(torch.optim.LBFGS, lr=0.5, max_iter=4, history_size=3)),
    (TorchRule(torch.optim.AdamW, lr=0.02, weight_decay=[0.1] * 3, betas=(0.8, 0.9)),
     partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))),
]  # fmt: skip


@pytest.mark.parametrize("name", ["mlp-tanh", "penalty", "conv", "tied", "unused", "frozen", "bn1d", "lstm"])
@pytest.mark.parametrize(("rule", "make"), OPTIMIZERS, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_population_is_a_hand_written_loop(name: str, rule: Any, make: Any, shared: bool) -> None:
    lbfgs = isinstance(rule, TorchRule) and rule.optimizer is torch.optim.LBFGS
    if (lbfgs and name == "bn1d") or (shared and name in ("tied", "unused", "lstm")):
        return  # the population evaluates once more than LBFGS asks; one order is enough for the others
    if name == "unused" and rule is OPTIMIZERS[-1][0]:
        return  # torch leaves a weight without a gradient alone, here its gradient is zero and it decays
    task, population = task_of(NAMED[name]), trained(NAMED[name], rule, shared_batches=shared, order_seed=4)
    batches = Batches(17, 6, SEEDS, shared, order_seed=4)
    for i, seed in enumerate(SEEDS):
        order = lambda k, i=i: batches.at(k) if shared else batches.at(k)[i]
        module = plain(task, seed, make, order, steps=7)
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for n, tensor in population.points.items():
            close(tensor[i], held[n].detach(), 1e-6 if lbfgs else 1e-10)  # its line amplifies rounding


@pytest.mark.parametrize(
    "rule",
    [Momentum(lr=[0.02, 1e200, 0.05]), Adam(lr=[0.02, 1e200, 0.05], clip=1.0),
     TorchRule(torch.optim.Adam, lr=[0.02, 1e305, 0.05]),
     TorchRule(torch.optim.LBFGS, lr=[0.5, 1e200, 0.3], max_iter=3)],
    ids=["momentum", "clipped", "torch", "lbfgs"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["square", "dropout", "lstm"])
def test_a_member_that_diverges_is_marked_and_disturbs_no_other(name: str, rule: Any) -> None:
    population = trained(NAMED[name], rule, steps=9, record=1)
    without = trained(NAMED[name], rule.select([0, 2]), [SEEDS[0], SEEDS[2]], steps=9, record=1)
    same(population, 0, without, 0)
    same(population, 2, without, 1)
    step = int(population.diverged[1])
    assert population.diverged.tolist() == [-1, step, -1]
    finite = torch.tensor(population.history.query("member == 1").loss.tolist()).double().isfinite()
    if name == "lstm":  # saturates: huge weights, and all is finite
        return
    assert 1 <= step <= 9
    assert finite.tolist() == [k < step for k in range(10)]
    assert all(torch.isnan(w[1]).all() for w in population.points.weights.values())
    assert population.summary().ended.tolist()[1] == f"diverged at step {step}"


def test_every_member_may_diverge() -> None:
    population = trained(NAMED["square"], Momentum(lr=[1e200, 1e200, 1e200]), steps=20)
    assert (population.diverged > 0).all()
    assert population.step < 20
    assert len(population.active) == 0


def test_newton_solves_a_logistic_regression_and_equals_scipy() -> None:
    from scipy.optimize import minimize

    x, y = classified(3, classes=2)(torch.Generator().manual_seed(0), 40)
    x, flip = x.double(), torch.arange(40) % 5 == 0  # not separable, so the penalised optimum is inside
    y = torch.where(flip, 1 - y, y)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + 0.05 * penalty

    task = Task(logistic_regression(3, 2), loss, (x, y))
    population = train(task, Newton(), seeds=3, steps=8, dtype="float64", record=1)
    flat = population.points.matrix()

    def objective(w: Any) -> float:
        module = logistic_regression(3, 2)().double()
        nn.utils.vector_to_parameters(torch.as_tensor(w), module.parameters())
        return loss(module, (x, y)).item()

    best = minimize(objective, flat[0].numpy(), method="BFGS", options={"gtol": 1e-7}).fun
    assert population.history.query("step == 7").loss.tolist() == pytest.approx([best] * 3, abs=1e-9)
    assert population.history.query("step == 7").gradient_norm.max() < 1e-12
    close(flat[1], flat[0], 1e-9)


def test_a_rule_by_name_by_class_and_a_class_of_torch() -> None:
    case = NAMED["mlp-relu"]
    for rule, value in (("adam", Adam()), (Adam, Adam()), ("momentum", Momentum())):
        same(trained(case, rule), 0, trained(case, value), 0, 0.0)
    same(trained(case, torch.optim.Adam), 1, trained(case, TorchRule(torch.optim.Adam)), 1, 0.0)
    with pytest.raises(LosslabError, match="no rule is named 'adm': did you mean 'adam'"):
        trained(case, "adm")
    with pytest.raises(LosslabError, match="is no torch"):
        trained(case, 3)
    with pytest.raises(LosslabError, match="was refused its arguments"):
        trained(case, TorchRule(torch.optim.Adam, learning_rate=0.1))


def test_hyperparameters_must_fit_the_members() -> None:
    case = NAMED["mlp-relu"]
    for rule in (Adam(lr=[0.1] * 7), TorchRule(torch.optim.Adam, lr=[0.1] * 7)):
        with pytest.raises(
            LosslabError, match=r"lr has shape \(7,\), the population has 3 members: pass a scalar"
        ):
            trained(case, rule)
        assert len(trained(case, rule, 1, steps=1)) == 7


def test_one_batch_is_read_by_members_of_one_seed() -> None:
    case = NAMED["mlp-relu"]
    population = trained(case, Momentum(lr=[0.01, 0.02]), 1)
    for i, rate in enumerate((0.01, 0.02)):
        same(population, i, trained(case, Momentum(lr=[rate]), [0]), 0)
    batch = map_nest(lambda t: t.shape, task_of(case).train.examples)  # type: ignore[union-attr]
    assert batch == (torch.Size([17, 4]), torch.Size([17]))
