"""Which way a population is run: tried, checked against the loop, and never at the price of a trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.cases import CASES, LOOP, NAMED, TABLE, VMAP, Case, linear, net, stand, task_of
from torch import Tensor, nn

from losslab import LosslabError, Task, supervised, train
from losslab.engine import Execution, ExecutionNotice, choose
from losslab.engine.backends import BACKENDS
from losslab.engine.template import Template
from losslab.tasks import Data, mlp


def picked(case: Case, execution: str = "stacked", **options: Any) -> Execution:
    at = stand(case, private=True, **options)
    template = Template(case.make())
    kept, before = copy.deepcopy(at), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExecutionNotice)
        found = choose(execution, template, case.loss, at)
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in {**at.weights, **at.buffers}.items():
        assert torch.equal(tensor, {**kept.weights, **kept.buffers}[name])
    return found


@pytest.mark.parametrize("case", [c for c in CASES if c.backends != (LOOP,)], ids=str)
def test_the_fastest_backend_that_can_is_taken_and_nothing_moves(case: Case) -> None:
    execution = picked(case)
    assert execution.backend.name == case.backends[0]
    assert execution.backend.draws == case.draws
    assert "agrees with the loop" in execution.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp-relu", "bn1d", "dropout", "resnet"])
def test_rounding_in_short_dtypes_is_no_disagreement(name: str, dtype: torch.dtype) -> None:
    assert picked(NAMED[name], dtype=dtype).backend.name == NAMED[name].backends[0]


@pytest.mark.parametrize("name", ["lstm", "mask", "branch", "bn-cumulative"])
def test_what_cannot_be_stacked_falls_back_to_the_loop(name: str) -> None:
    case = NAMED[name]
    assert picked(case, "auto").backend.name == LOOP
    with pytest.raises(LosslabError, match=r'as one program .* pass execution="loop" or "auto"'):
        picked(case, "stacked")


@pytest.mark.parametrize("name", ["lstm", "mask"])
def test_the_fallback_is_told_once_in_a_whole_training(name: str) -> None:
    with pytest.warns(ExecutionNotice, match="trained one by one") as told:
        population = train(task_of(NAMED[name]), "sgd", seeds=3, epochs=3, batch_size=5)
    assert len(told) == 1
    assert population.execution is not None
    assert population.execution.backend.name == LOOP


def test_one_member_and_a_loop_as_asked_are_told_apart() -> None:
    assert picked(NAMED["mlp-relu"], "auto", members=1).reason == "one member"
    assert picked(NAMED["mlp-relu"], "loop").reason == "a loop, as asked"
    with pytest.raises(LosslabError, match="no execution is named 'stakced': did you mean 'stacked'"):
        picked(NAMED["mlp-relu"], "stakced")


# -- a backend that is wrong is not taken ----------------------------------------------------------------


def differing(change: Callable[[Any], Any]) -> Case:
    """A network that behaves differently on anything but a plain tensor."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.b(torch.tanh(y if isinstance(y, Tensor) else change(y)))

    return Case(
        "", net(forward, a=linear(4, 6), b=linear(6, 3)), NAMED["mlp-relu"].batch, NAMED["mlp-relu"].loss
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * float("nan"),
        lambda y: y * (1 + 1e-5),
        lambda y: y + 1e-6,
        lambda y: y.detach() + 1e-9 * y,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_backend_that_disagrees_is_refused(change: Callable[[Any], Any], dtype: torch.dtype) -> None:
    assert picked(differing(change), dtype=dtype).backend.name == VMAP


def test_a_network_that_insists_on_its_dtype_is_checked_in_that_dtype() -> None:
    forward = lambda m, x: m.b(torch.tanh(m.a(x).float()))
    case = Case(
        "", net(forward, a=linear(4, 6), b=linear(6, 3)), NAMED["mlp-relu"].batch, NAMED["mlp-relu"].loss
    )
    assert picked(case, dtype=torch.float32).backend.name == TABLE


def test_a_buffer_that_would_not_move_is_a_disagreement() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        if isinstance(y, Tensor):
            m.count.add_(1)
        return y

    case = Case("", net(forward, a=linear(4, 3), count=lambda: torch.zeros(())), NAMED["mlp-relu"].batch,
                NAMED["mlp-relu"].loss)  # fmt: skip
    assert picked(case).backend.name == VMAP


# -- what is measured ----------------------------------------------------------------------------------


def test_metrics_need_not_be_in_the_table() -> None:
    def metrics(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        z = model(batch[0])
        largest = z.topk(2, dim=1).values[:, 0]
        data: Any = next(model.parameters()).data
        return {
            "top": largest.mean(),
            "spread": z.var(0, False).sum(),
            "norm": data.norm(),
            "one": z.new_ones(()),
        }

    case = NAMED["mlp-relu"]
    task = task_of(case).replace(metrics=metrics)
    population = train(
        task, "sgd", seeds=3, steps=3, batch_size=4, record=1, execution="stacked", dtype="float64"
    )
    assert population.execution is not None
    assert population.execution.backend.name == "tape"
    last = population.history.query("step == 3")
    for i, module in enumerate(population):
        assert task.test is not None
        told = metrics(module, task.test.to(dtype=torch.float64).all())
        for name, value in told.items():
            assert last[f"test_{name}"].iloc[i] == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("name", ["bn-first", "ln-first", "bn1d", "resnet", "dropout", "embedding", "lstm"])
def test_evaluation_is_the_weighted_mean_over_ragged_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = NAMED[name]
    execution = "auto" if case.backends == (LOOP,) else "stacked"
    monkeypatch.setattr(Execution, "stream_size", lambda self, examples, members: 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExecutionNotice)
        population = train(
            task_of(case), "sgd", seeds=3, steps=2, batch_size=6, dtype="float64", execution=execution
        )
    test = task_of(case).test
    assert test is not None
    wanted = [case.loss(m, test.to(dtype=torch.float64).all()).item() for m in population]
    assert population.history["test_loss"].iloc[-3:].tolist() == pytest.approx(wanted, abs=1e-12)


def test_means_in_bfloat16_are_added_up_in_float32() -> None:
    case = NAMED["mlp-relu"]
    at = stand(case, False, dtype=torch.bfloat16)
    execution = Execution(BACKENDS[TABLE](Template(case.make()), draws=False), chunk=3)
    data = Data.of(case.batch(torch.Generator().manual_seed(0), 3000)).to(dtype=torch.bfloat16)
    execution.example_bytes = 2.0**28  # one example at a time
    found = execution.mean(case.loss, at.weights, at.buffers, data, at.keys)
    x, y = data.all()
    module = mlp(4, 6, 3)().bfloat16()
    for i in range(3):
        state = {n: w[i] for n, w in at.weights.items()}
        each = F.cross_entropy(torch.func.functional_call(module, state, x), y, reduction="none")
        assert found[i].item() == pytest.approx(each.double().mean().item(), rel=1e-3)


def test_a_memory_budget_splits_the_members_and_changes_nothing() -> None:
    case = NAMED["bn1d"]
    options: dict[str, Any] = {
        "seeds": 5,
        "steps": 6,
        "batch_size": 6,
        "dtype": "float64",
        "execution": "stacked",
    }
    whole = train(task_of(case), "adam", **options)
    parts = train(task_of(case), "adam", **options, memory=20_000)
    assert whole.execution is not None
    assert parts.execution is not None
    assert whole.execution.chunk == 5
    assert 1 <= parts.execution.chunk < 5
    for name, tensor in whole.points.items():
        torch.testing.assert_close(parts.points[name], tensor, rtol=1e-12, atol=1e-12)


# -- randomness ----------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Noise by torch's global generator: in training, in evaluation, or in both."""

    def __init__(self, training: bool, evaluation: bool) -> None:
        super().__init__()
        self.a, self.acts = nn.Linear(4, 3), {True: training, False: evaluation}

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + torch.rand(4, dtype=x.dtype) if self.acts[self.training] else x)


@pytest.mark.parametrize(("training", "evaluation"), [(True, True), (True, False), (False, True)])
def test_global_random_numbers_are_reproducible_and_put_back(training: bool, evaluation: bool) -> None:
    x, y = NAMED["mlp-relu"].batch(torch.Generator().manual_seed(0), 8)
    task = supervised(lambda: Noisy(training, evaluation), (x, y), test=(x, y))
    options: dict[str, Any] = {
        "seeds": 2, "steps": 3, "batch_size": 3, "record": 1, "evaluate": 1, "dtype": "float64",
    }  # fmt: skip
    seen = []
    for number in (1, 2):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExecutionNotice)
            population = train(task, "sgd", **options)
        assert torch.equal(torch.get_rng_state(), before)
        seen.append(population.history)
    assert seen[0].equals(seen[1])
    one = train(task, "sgd", **{**options, "seeds": [1]}).history
    both = seen[0].query("seed == 1").drop(columns="member").reset_index(drop=True)
    for column in one.drop(columns="member"):
        assert both[column].tolist() == pytest.approx(one[column].tolist(), abs=1e-12, nan_ok=True)


def test_noise_is_new_at_every_step() -> None:
    seen: list[float] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        noise = torch.rand(())
        if model.training:
            seen.append(noise.item())
        return (model(batch) * noise).mean()

    train(Task(linear(4, 1), loss, torch.ones(3, 4)), "sgd", seeds=1, steps=5, evaluate=None)
    assert len(set(seen[-5:])) == 5


def test_dropout_that_acts_in_evaluation_too_is_the_members_own() -> None:
    x, y = NAMED["mlp-relu"].batch(torch.Generator().manual_seed(0), 8)
    make = net(lambda m, x: m.a(F.dropout(x, 0.5, True)), a=linear(4, 3))
    task = supervised(make, (x, y), test=(x, y))
    before = torch.get_rng_state()
    together = train(task, "sgd", seeds=3, steps=3, dtype="float64", execution="stacked").history
    one = train(task, "sgd", seeds=[2], steps=3, dtype="float64").history
    assert torch.equal(torch.get_rng_state(), before)
    columns = ["loss", "test_loss", "test_accuracy"]
    ours = together.query("seed == 2")[columns].to_numpy()
    assert ours == pytest.approx(one[columns].to_numpy(), abs=1e-12, nan_ok=True)
