"""What rules may ask about a batch's loss, against matrices made entry by entry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losslab
from losslab.engine import Points
from losslab.engine.backends import BACKENDS, Stand
from losslab.engine.execution import Execution
from losslab.engine.hessian import BatchCurvature
from losslab.engine.randomness import member_keys
from losslab.engine.template import Template
from losslab.rules import RULES, make
from losslab.tasks import half_mse, mlp, supervised

MEMBERS = 3
WAYS = ("tape", "table", "vmap", "loop")
LOSSES = {"cross-entropy": F.cross_entropy, "half-mse": half_mse}


def problem(loss: str, way: str, private: bool) -> tuple[BatchCurvature, Points, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    modules = [mlp(3, 4, 2, activation="tanh")().double() for _ in range(MEMBERS)]
    points = Points.from_modules(modules)
    shape = (MEMBERS, 7) if private else (7,)
    x = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    classes = torch.randint(2, shape, generator=generator)
    y = classes if loss == "cross-entropy" else F.one_hot(classes).double()
    task = supervised(mlp(3, 4, 2), (x.flatten(0, -2), y.flatten(0, len(shape) - 1)), criterion=LOSSES[loss])
    at = Stand(
        points.weights, points.buffers, (x, y), private, member_keys(range(MEMBERS), "forward", x.device)
    )
    how = Execution(BACKENDS[way](Template(modules[0]), draws=False), MEMBERS)
    batches = [(x[i], y[i]) if private else (x, y) for i in range(MEMBERS)]
    return BatchCurvature(how, task.loss, at), points, batches


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_answer_equals_the_entry_by_entry_one(loss: str, way: str, private: bool) -> None:
    curvature, points, batches = problem(loss, way, private)
    flat = points.matrix()
    vectors = torch.randn(flat.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dense, products = curvature.hessian(), curvature.products(vectors)
    torch.testing.assert_close((dense @ vectors[:, :, None])[:, :, 0], products, rtol=1e-9, atol=1e-12)
    gauss, values = curvature.gauss_newton(), curvature.value(flat + vectors)
    gradients = curvature.gradient(flat + vectors)
    module = mlp(3, 4, 2, activation="tanh")().double()
    for i, (x, y) in enumerate(batches):

        def outputs(w: Tensor, i: int = i, x: Tensor = x) -> Tensor:
            weights = {n: t[0] for n, t in points.select([i]).at(w[None]).weights.items()}
            return torch.func.functional_call(module, weights, (x,))

        def whole(w: Tensor, y: Tensor = y, outputs: object = outputs) -> Tensor:
            return LOSSES[loss](outputs(w), y)  # type: ignore[operator]

        jacobian = torch.autograd.functional.jacobian(outputs, flat[i]).flatten(0, 1)
        z = outputs(flat[i]).detach()
        middle = torch.autograd.functional.hessian(lambda z, y=y: LOSSES[loss](z, y), z)
        middle = middle.reshape(z.numel(), z.numel())
        torch.testing.assert_close(gauss[i], jacobian.T @ middle @ jacobian, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(values[i], whole(flat[i] + vectors[i]), rtol=1e-12, atol=0)
        (slope,) = torch.autograd.functional.vjp(whole, flat[i] + vectors[i])[1:]
        torch.testing.assert_close(gradients[i], slope, rtol=1e-9, atol=1e-12)


def test_a_loss_without_outputs_has_no_gauss_newton_matrix() -> None:
    x = torch.ones(4, 1)
    task = losslab.Task(lambda: nn.Linear(1, 1), lambda m, b: m(b).square().mean(), x)
    with pytest.raises(losslab.LosslabError, match=r"make the task with losslab\.supervised"):
        losslab.train(task, "gauss-newton", steps=1, progress=False)


SECOND_ORDER = [name for name, rule in RULES.items() if rule.needs_curvature]
SETTINGS = {"newton": {"variant": "searched", "damping": 0.05}, "gauss-newton": {"variant": "adaptive"},
            "cubic-newton": {"penalty": 5.0}, "diagonal-lm": {"lr": 0.3}, "auto-rate": {"lr": 0.5},
            "saddle-free": {"damping": 0.05}}  # fmt: skip


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_every_second_order_rule_trains_and_members_stand_alone(name: str) -> None:
    task = losslab.tasks.teacher_student(2, 3, 4, n=40, dtype=torch.float64)
    rule = make(name, **SETTINGS.get(name, {}))  # type: ignore[arg-type]
    told = {"steps": 15, "dtype": "float64", "progress": False, "execution": "stacked", "batch_size": 40}
    together = losslab.train(task, rule, seeds=3, record=1, **told)  # type: ignore[arg-type]
    losses = together.history.dropna(subset="loss").pivot(index="step", columns="member", values="loss")
    assert (losses.iloc[-1] < 0.3 * losses.iloc[0]).all()
    alone = losslab.train(task, rule, seeds=[1], **told)  # type: ignore[arg-type]
    torch.testing.assert_close(alone.points.matrix()[0], together.points.matrix()[1], rtol=1e-6, atol=1e-8)
