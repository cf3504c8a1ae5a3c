from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from losslab.errors import LosslabError
from losslab.tasks import Data, Task, build, check, digits_task, function_task, mlp, rosenbrock, supervised

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4


def classify(**changes: object) -> Task:
    return supervised(lambda: nn.Linear(3, 4), (X, Y)).replace(**changes)


def mean_output(model: nn.Module, batch: object) -> torch.Tensor:
    return model(batch[0]).mean()  # type: ignore[index]


def fail(error: Exception) -> Callable[..., object]:
    def function(*_: object) -> object:
        raise error

    return function


def test_supervised_is_the_criterion_and_the_share_of_right_answers() -> None:
    task = supervised(lambda: nn.Linear(3, 4), (X, Y), test=(X[:5], Y[:5]), name="mine")
    model = build(task)
    batch = task.train.all()
    assert torch.equal(task.loss(model, batch), F.cross_entropy(model(X), Y))
    right = sum(int(row.argmax()) == label for row, label in zip(model(X), Y.tolist(), strict=True))
    assert task.metrics(model, batch)["accuracy"].item() == pytest.approx(right / 40)
    assert (task.name, len(task.test), task.validation) == ("mine", 5, None)


def test_supervised_has_no_accuracy_without_classes() -> None:
    assert supervised(lambda: nn.Linear(3, 3), (X, X), criterion=F.mse_loss).metrics is None
    assert supervised(lambda: nn.Linear(3, 3), (X, torch.ones(40, 1, dtype=torch.int64))).metrics is None


def test_loss_and_metrics_run_stacked() -> None:
    task = digits_task(mlp(64, 8, 10, activation="lecun_tanh"))
    models = [build(task) for _ in range(3)]
    batch = task.train.take(torch.arange(20))
    weights, _ = torch.func.stack_module_state(models)
    shell = copy.deepcopy(models[0])

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = shell

        def forward(self, what: Callable[..., torch.Tensor]) -> torch.Tensor:
            return what(self.inner, batch)

    bound = Bound()
    for what in (task.loss, lambda model, b: task.metrics(model, b)["accuracy"]):
        alone = torch.stack([what(model, batch) for model in models])
        named = {f"inner.{key}": value for key, value in weights.items()}
        stacked = torch.func.vmap(lambda w, f=what: torch.func.functional_call(bound, w, (f,)))(named)
        torch.testing.assert_close(stacked, alone, rtol=1e-5, atol=1e-6)


def test_replace_converts_and_leaves_the_first_task() -> None:
    task = classify()
    other = task.replace(name="other", test=(X[:2], Y[:2]))
    assert isinstance(other.test, Data)
    assert (task.name, other.name, task.test) == ("task", "other", None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classify(model=nn.Linear(3, 4)), "model is one Linear, and each seed needs its own"),
        (lambda: classify(model="mlp"), "model is a str, a function was wanted"),
        (lambda: classify(loss=3), "loss is a int, a function was wanted"),
        (lambda: classify(metrics={}), "metrics is a dict, a function was wanted"),
        (lambda: classify(train=(X, Y[:3])), "disagree on the number of examples"),
        (lambda: classify(test="x"), "data is a str"),
        (lambda: supervised(lambda: nn.Linear(3, 4), X), "supervised data are pairs"),
        (
            lambda: supervised(lambda: nn.Linear(3, 4), (X, Y, Y)),
            "supervised data are pairs .* tuple of 3 tensors",
        ),
    ],
)
def test_bad_tasks(make: Callable[[], Task], message: str) -> None:
    with pytest.raises(LosslabError, match=message):
        make()


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it outdated
        module: nn.Module = torch.jit.trace(nn.Linear(3, 4), X)
    return module


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (fail(KeyError("hidden")), "the model of 'task' raised KeyError: 'hidden'"),
        (fail(LosslabError("told already")), "^told already$"),
        (lambda: 3, "the model of 'task' built a int"),
        (lambda: None, "the model of 'task' built a NoneType"),
        (lambda: nn.LazyLinear(4), "has lazy layers without weights yet"),
        (lambda: nn.Sequential(traced()), "has parts compiled by torch.jit, .* give it as"),
    ],
)
def test_bad_factories(model: Callable[[], object], message: str) -> None:
    with pytest.raises(LosslabError, match=message):
        build(classify(model=model))


LABELS_FAR = torch.cat([Y[:35], torch.tensor([9, 1, 1, 1, 1])])
LABELS_NEGATIVE = torch.cat([Y[:39], torch.tensor([-1])])
NOT_FINITE = X.clone().index_fill_(0, torch.tensor([38]), float("nan"))
INFINITE = X.clone()
INFINITE[38, 1] = float("inf")
TOKENS_FAR = torch.cat([torch.zeros(39, 2, dtype=torch.int64), torch.tensor([[0, 8]])])


def squashed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))


def overwritten(model: nn.Module, batch: object) -> torch.Tensor:
    activated = model(batch[0]).tanh()  # type: ignore[index]
    return activated.add_(1).sum()  # its derivative needed it


BAD = {
    "raises": (classify(loss=fail(RuntimeError("shapes\nand more"))), "raised RuntimeError: shapes: mend it"),
    "raises without words": (classify(loss=fail(ZeroDivisionError())), "raised ZeroDivisionError: mend it"),
    "dtypes": (
        classify(train=(X.double(), Y)),
        "raised RuntimeError: mat1 and mat2 must have the same dtype",
    ),
    "a number": (classify(loss=lambda m, b: mean_output(m, b).item()), "is a float, .*without .item"),
    "nothing": (classify(loss=lambda m, b: None), "is a NoneType, not a tensor: return the loss alone"),
    "a sum": (
        classify(loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum")),
        "doubles .* when each example is given twice, so it is a sum",
    ),
    "no weights": (classify(model=nn.Flatten), "the model of 'task' has no trainable weights"),
    "its own sentence": (classify(loss=fail(LosslabError("told already"))), "^told already$"),
    "a vector": (classify(loss=lambda m, b: m(b[0])[:5].sum(1)), r"has shape \(5,\), not a scalar"),
    "whole": (
        classify(loss=lambda m, b: (m(b[0]).argmax(1) == b[1]).sum()),
        "is torch.int64, not floating-point",
    ),
    "nan": (classify(loss=lambda m, b: mean_output(m, b) * float("nan")), "is nan at the start"),
    "inf": (classify(loss=lambda m, b: mean_output(m, b) + float("inf")), "is inf at the start"),
    "bad data": (classify(train=(X / 0, Y)), r"not a finite number: data\[0\] holds -?(inf|nan) in "),
    "one bad value": (classify(train=(NOT_FINITE, Y)), r"data\[0\] holds nan in example 38; mend the data"),
    "detached": (classify(loss=lambda m, b: mean_output(m, b).detach()), "does not depend on the weights"),
    "of no weight": (
        classify(loss=lambda m, b: torch.ones((), requires_grad=True)),
        "does not depend on the weights",
    ),
    "labels": (
        classify(train=(X, Y + 1)),
        "run from 1 to 4 and the model has 4 outputs, for labels from 0 to 3: give the",
    ),
    "a far label": (classify(train=(X, LABELS_FAR)), "run from 0 to 9 and the model has 4 outputs"),
    "a negative label": (
        classify(train=(X, LABELS_NEGATIVE)),
        "run from -1 to 3 and the model has 4 outputs",
    ),
    "a far token": (
        Task(lambda: nn.Embedding(8, 2), lambda m, b: m(b).mean(), TOKENS_FAR),
        "raised IndexError: index out of range in self: give indices within the range of the model",
    ),
    "one infinite value that a tanh hides": (
        classify(model=squashed, train=(INFINITE, Y)),
        r"the gradient of the loss of 'task' is not finite at the start: data\[0\] holds -?inf in example 38",
    ),
    "a backward pass that raises": (
        classify(loss=lambda m, b: mean_output(m, b) + overwritten(m, b)),
        "the backward pass of the loss of 'task' raised RuntimeError: one of the variables needed",
    ),
    "checkpointing": (
        classify(loss=lambda m, b: checkpoint(m, b[0], use_reentrant=False).mean()),
        "runs parts of its forward pass again in the backward one .* switch activation checkpointing off",
    ),
    "metrics raise": (
        classify(metrics=fail(TypeError("odd"))),
        "the metrics of 'task' raised TypeError: odd",
    ),
    "metrics": (classify(metrics=lambda m, b: 3), "the metrics of 'task' are a int: return a dict"),
    "a metric": (classify(metrics=lambda m, b: {"a": m(b[0])[:2]}), r"hold 'a' of shape \(2, 4\)"),
    "a metric's type": (classify(metrics=lambda m, b: {"a": 0.5}), "hold 'a' of type float"),
}


@pytest.mark.parametrize("name", BAD)
def test_check_refuses(name: str) -> None:
    task, message = BAD[name]
    with pytest.raises(LosslabError, match=message) as caught:
        check(task, build(task))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ((X[:5], Y[:5] + 3), "labels of 'task' on its test data run from 3 to 6 and the model has 4 outputs"),
        ((NOT_FINITE, Y), r"on its test data is nan at the start.*data\[0\] holds nan in example 38"),
        ((X[:5, :2], Y[:5]), "the loss of 'task' on its test data raised RuntimeError: mat1 and mat2"),
    ],
)
def test_held_out_data_are_looked_at_where_they_will_be(test: object, message: str) -> None:
    task = classify(test=test)
    module = build(task)
    check(task, module)
    with pytest.raises(LosslabError, match=message):
        check(task, module, held_out=["test"])
    check(classify(test=(X, Y)), module, held_out=["test"])


@pytest.mark.parametrize(
    "task",
    [
        classify(),
        classify(train=(X[:1], Y[:1])),
        classify(loss=lambda m, b: mean_output(m, b) + sum(p.square().sum() for p in m.parameters())),
        classify(loss=lambda m, b: mean_output(m, (b[0].nan_to_num(0.0), b[1])), train=(NOT_FINITE, Y)),
        digits_task(),
        function_task(rosenbrock),
    ],
    ids=["classes", "one example", "a penalty", "not finite on purpose", "digits", "no data"],
)
def test_check_passes(task: Task) -> None:
    check(task, build(task))


def test_check_leaves_no_trace() -> None:
    task = digits_task(mlp(64, 16, 10, batch_norm=True, dropout=0.5))
    module = build(task)
    before = copy.deepcopy(module.state_dict())
    random = torch.get_rng_state()
    check(task, module)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module._forward_hooks
    assert module.training
