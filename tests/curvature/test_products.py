"""Products against dense float64 matrices by plain loops, closed forms, and what must be refused."""

from __future__ import annotations

import copy
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.engine.cases import NAMED
from tests.engine.test_objective import STILL, batch_of, execution_of, modules_of, task_of
from tests.oracles.objective import objective as oracle
from tests.oracles.objective import pieces
from torch import Tensor, nn

from losslab.curvature import EmpiricalFisher, GaussNewton, Hessian
from losslab.curvature.graphs import dropouts
from losslab.curvature.noise import HELD
from losslab.curvature.operator import PLAIN_KERNELS
from losslab.engine import ExecutionNotice, Objective, Points
from losslab.errors import LosslabError
from losslab.tasks import Task, function_task, mlp, quadratic, supervised

EXACT = {"rtol": 1e-9, "atol": 1e-11}
EXAMPLES, CHUNK = 13, 5
STRATEGIES = ("kept", "recomputed", "forward")


def agree(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **EXACT)


def block(size: int, count: int) -> Tensor:
    return torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def regression(n: int = EXAMPLES, outputs: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, 3, dtype=torch.float64, generator=g),
        torch.rand(n, outputs, dtype=torch.float64, generator=g),
    )


def classes(n: int = EXAMPLES, kinds: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, dtype=torch.float64, generator=g), torch.randint(kinds, (n,), generator=g)


def task_for(module: nn.Module, data, criterion=F.cross_entropy) -> tuple[Task, Points]:
    module = module.double()
    return supervised(lambda: copy.deepcopy(module), data, criterion=criterion), Points.from_modules([module])


# -- the Hessian -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STILL, ids=str)
@pytest.mark.filterwarnings("ignore:fast attention")
def test_hessian_products_are_those_of_plain_torch(case):
    members = modules_of(case, 2)
    points = Points.from_modules(members)
    vectors = torch.stack([block(points.parameters, 2)] * 2)
    wanted = [
        oracle(m, case.loss, batch_of(case), v.T, CHUNK)[2].T for m, v in zip(members, vectors, strict=True)
    ]
    hessian = Hessian(Objective(task_of(case), chunk=CHUNK, execution=execution_of(case)), points)
    agree(hessian @ vectors, torch.stack(wanted))
    agree(hessian @ vectors[:, :, 0], torch.stack(wanted)[:, :, 0])
    alone = Hessian(Objective(task_of(case), chunk=CHUNK), points.select([1]))
    agree(alone @ vectors[1], wanted[1])


@pytest.mark.parametrize(
    "name", ["mlp-relu", "bn1d", "resnet", "tied", "unused", "scalar", "dict", "attention"]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_agree(name, strategy):
    case = NAMED[name]
    points = Points.from_modules(modules_of(case, 1))
    vectors = block(points.parameters, 5)
    objective = Objective(task_of(case), chunk=CHUNK)
    wanted = oracle(modules_of(case, 1)[0], case.loss, batch_of(case), vectors.T, CHUNK)[2].T
    hessian = Hessian(objective, points, strategy=strategy)
    agree(hessian @ vectors, wanted)
    agree(hessian @ vectors, wanted)
    agree(hessian @ vectors[:, 2], wanted[:, 2])
    for together in (True, False):
        hessian._batched = together
        agree(hessian @ vectors, wanted)


@pytest.mark.parametrize("policy", ["batch", "running", "re-estimate"])
def test_batch_norm_policies(policy):
    case = NAMED["bn1d"]
    points = Points.from_modules(modules_of(case, 1))
    objective = Objective(task_of(case), batch_norm=policy)
    vectors = block(points.parameters, 2)
    agree((Hessian(objective, points) @ vectors).T, objective.hvp(points, vectors.T[None])[0])


def test_closed_forms():
    x, y = regression()
    task, points = task_for(nn.Linear(3, 2, bias=False), (x, y), nn.MSELoss())
    second = 2 / 2 * x.T @ x / len(x)  # the mean over two outputs halves it
    wanted = torch.block_diag(second, second)
    agree(Hessian(Objective(task, chunk=4), points).dense(), wanted)
    agree(GaussNewton(Objective(task, chunk=4), points).dense(), wanted)

    x, y = classes()
    task, points = task_for(nn.Linear(3, 3, bias=False), (x, y))
    p = torch.softmax(x @ points.weights["weight"][0].T, 1)
    softmax = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    wanted = torch.einsum("bij,bk,bl->ikjl", softmax, x, x).reshape(9, 9) / len(x)
    agree(Hessian(Objective(task, chunk=4), points).dense(), wanted)
    agree(GaussNewton(Objective(task, chunk=4), points).dense(), wanted)

    task, points = task_for(
        nn.Linear(3, 1, bias=False), (x, (y == 0).double()[:, None]), F.binary_cross_entropy_with_logits
    )
    s = torch.sigmoid(x @ points.weights["weight"][0].T)[:, 0]
    wanted = x.T @ (x * (s * (1 - s))[:, None]) / len(x)
    agree(Hessian(Objective(task, chunk=4), points).dense(), wanted)
    slopes = x * (s - (y == 0).double())[:, None]
    agree(EmpiricalFisher(Objective(task, chunk=4), points).dense(), slopes.T @ slopes / len(x))


def test_uneven_batches_are_weighted_by_their_examples():
    x, y = classes(100)
    task, points = task_for(mlp(3, 5, 3)(), (x, y))
    whole = Hessian(Objective(task, chunk=100), points).dense()
    agree(Hessian(Objective(task, chunk=64), points).dense(), whole)
    parts = [Hessian(Objective(task, (x[a:b], y[a:b])), points).dense() for a, b in ((0, 64), (64, 100))]
    mean_of_means = (parts[0] + parts[1]) / 2
    assert (mean_of_means - whole).norm() > 0.01 * whole.norm()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_is_that_of_the_products(scale):
    data = classes()
    task, points = task_for(mlp(3, 5, 3)(), data)
    scaled = task.replace(loss=lambda m, b: scale * F.cross_entropy(m(b[0]), b[1]))
    v = block(points.parameters, 2)
    found, plain = Hessian(Objective(scaled), points) @ v, Hessian(Objective(task), points) @ v
    torch.testing.assert_close(found / scale, plain, rtol=1e-9, atol=1e-12)


# -- Gauss-Newton and empirical Fisher ---------------------------------------------------------------------


def jacobian(module: nn.Module, points: Points, x: Tensor) -> Tensor:
    """``[B, C, P]`` in evaluation mode."""

    def out(flat):
        values = {n: w[0] for n, w in points.at(flat[None]).weights.items()}
        return torch.func.functional_call(module.eval(), values, (x,))

    return torch.autograd.functional.jacobian(out, points.matrix()[0])


NO_FORWARD = ("lstm", "multihead")
JACOBIANS = ("mlp-tanh", "mlp-relu", "bn1d", "tied", "unused", "conv", *NO_FORWARD)


@pytest.mark.parametrize("name", JACOBIANS)
@pytest.mark.filterwarnings("ignore:fast attention")
def test_gauss_newton_and_fisher_by_explicit_jacobians(name):
    case = NAMED[name]
    module = modules_of(case, 1)[0]
    x, y = batch_of(case)
    task = supervised(lambda: copy.deepcopy(module), (x, y))
    points = Points.from_modules([module])
    j = jacobian(module, points, x)
    p = torch.softmax(copy.deepcopy(module).eval()(x), -1).detach()
    curve = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    slope = torch.einsum("bc,bcp->bp", p - F.one_hot(y, p.shape[1]), j)
    v = block(points.parameters, 4)
    objective = Objective(task, batch_norm="running", chunk=CHUNK)
    gauss = torch.einsum("bcp,bcd,bdq->pq", j, curve, j) / len(x) @ v
    for strategy in STRATEGIES[: 2 if name in NO_FORWARD else 3]:
        agree(GaussNewton(objective, points, strategy=strategy) @ v, gauss)
        agree(EmpiricalFisher(objective, points, strategy=strategy) @ v, slope.T @ (slope @ v) / len(x))


def test_losses_of_ones_own():
    case = NAMED["dict"]
    points = Points.from_modules(modules_of(case, 2))
    objective = Objective(task_of(case), chunk=CHUNK)
    with pytest.raises(LosslabError, match=r"hides what the network puts out.*pass outputs="):
        GaussNewton(objective, points)
    v = block(points.parameters, 3).expand(2, -1, -1)
    wanted = []
    for member in modules_of(case, 2):
        gradients = []
        for one, _ in pieces(batch_of(case), 1):
            member.zero_grad()
            case.loss(member, one).backward()
            gradients.append(torch.cat([q.grad.flatten() for q in member.parameters()]))
        g = torch.stack(gradients)
        wanted.append(g.T @ (g @ v[0]) / len(g))
    agree(EmpiricalFisher(objective, points) @ v, torch.stack(wanted))
    split = {"outputs": lambda m, b: m(b["x"]), "criterion": lambda z, b: F.cross_entropy(z, b["y"])}
    plain = Task(case.make, lambda m, b: F.cross_entropy(m(b["x"]), b["y"]), batch_of(case))
    gauss = GaussNewton(Objective(plain, chunk=CHUNK), points, **split)
    assert (torch.linalg.eigvalsh(gauss.dense()) > -1e-12).all()
    with pytest.raises(LosslabError, match="belong together"):
        GaussNewton(objective, points, outputs=split["outputs"])


def test_gauss_newton_is_the_hessian_without_the_networks_curvature():
    task, points = task_for(mlp(3, 5, 1)(), regression(outputs=1), nn.MSELoss())
    difference = Hessian(Objective(task), points).dense() - GaussNewton(Objective(task), points).dense()
    x, y = task.train.all()
    residual = 2 * (points.load_into(task.model(), 0)(x) - y).detach() / len(x)
    weighted = task.replace(loss=lambda m, b: (m(b[0]) * residual).sum())
    agree(Hessian(Objective(weighted), points).dense(), difference)


# -- what an operator can do --------------------------------------------------------------------------------


def test_restricted_to_layers_it_is_a_block_of_the_whole():
    case = NAMED["bn1d"]
    points = Points.from_modules(modules_of(case, 1))
    for kind in (Hessian, GaussNewton):
        task = supervised(case.make, batch_of(case))
        whole = kind(Objective(task, batch_norm="running"), points)
        names = list(points.weights)
        picked = names[1:3]
        places = torch.cat([torch.full((points.weights[n][0].numel(),), n in picked) for n in names])
        part = whole.restrict(picked)
        assert part.names == tuple(picked)
        agree(part.dense(), whole.dense()[places][:, places])
        agree(part.gradient(), whole.gradient()[places])
    module = names[-1].rpartition(".")[0]
    assert whole.restrict(module).names == tuple(n for n in names if n.startswith(module + "."))
    with pytest.raises(LosslabError, match="no layer is named 'nowhere'"):
        whole.restrict("nowhere")


def test_scipy_takes_it():
    from scipy.sparse.linalg import eigsh

    task, points = task_for(mlp(3, 5, 3)(), classes())
    hessian = Hessian(Objective(task), points)
    values, _ = eigsh(hessian.linear_operator(), k=2, which="LA")
    np.testing.assert_allclose(values, torch.linalg.eigvalsh(hessian.dense())[-2:], rtol=1e-8)
    two = Points.from_modules([task.model(), task.model()])
    with pytest.raises(LosslabError, match="scipy takes one matrix"):
        Hessian(Objective(task), two).linear_operator()


def test_products_and_passes_are_counted():
    task, points = task_for(mlp(3, 5, 3)(), classes())
    v = block(points.parameters, 3)
    for strategy, passes in (("kept", 1), ("recomputed", 2), ("forward", 4)):
        hessian = Hessian(Objective(task, chunk=4), points, strategy=strategy)
        hessian @ v
        hessian @ v[:, 0]
        assert (hessian.products, hessian.passes) == (4, passes)
    moved = hessian.at(points)
    assert (moved.products, moved.passes) == (0, 0)
    agree(moved @ v, hessian @ v)


def test_training_may_go_on_while_the_operator_stays():
    task, points = task_for(mlp(3, 5, 3)(), classes())
    v = block(points.parameters, 2)
    hessian = Hessian(Objective(task), points)
    before = hessian @ v
    for w in points.weights.values():
        w.add_(1.0)
    agree(hessian @ v, before)
    assert (hessian.at(points) @ v - before).norm() > 0.1 * before.norm()


def test_a_budget_of_memory_decides_about_the_graph():
    task, points = task_for(mlp(3, 5, 3)(), classes())
    for memory, strategies in ((None, ("kept",)), (1.0, ("recomputed", "forward"))):
        hessian = Hessian(Objective(task, memory=memory), points)
        hessian @ torch.ones(points.parameters, dtype=torch.float64)
        assert hessian._strategy in strategies


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_of_the_caller_is_touched(kind, strategy):
    module = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3))
    module[0].weight.grad = torch.ones(6, 3)
    module[1].eval()
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    x, y = classes()
    task = supervised(lambda: module, (x.float(), y))
    points = Points.from_modules([module])
    held, state = {n: t.clone() for n, t in points.items()}, torch.get_rng_state()
    policy = "running" if kind is EmpiricalFisher else "batch"
    operator = kind(Objective(task, batch_norm=policy, module=module), points, strategy=strategy)
    operator @ torch.ones(points.parameters, 4)
    assert operator.notes == ["dropout is off in 2"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(module[0].weight.grad, torch.ones(6, 3))
    assert module[4].weight.grad is None
    assert all(torch.equal(t, held[n]) for n, t in points.items())


def test_half_precision_takes_single_precision_vectors():
    x, y = classes()
    module = mlp(3, 5, 3)()
    points = Points.from_modules([module])
    task = supervised(lambda: module, (x.float(), y))
    v = block(points.parameters, 2).float()
    exact = Hessian(Objective(task), points) @ v
    found = Hessian(Objective(task), points.to(dtype=torch.bfloat16)) @ v
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.1 * exact.norm()


# -- attention, noise, and other refusals ------------------------------------------------------------------


COUNT = itertools.count(1)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x):
        q = self.q(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0].mean(1)


def test_attention_falls_back_to_the_math_kernel_and_says_so():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, 4, generator=g, dtype=torch.float64), torch.randint(4, (6,), generator=g)
    task, points = task_for(Attentive(), (x, y))
    hessian = Hessian(Objective(task, chunk=4), points)
    v = block(points.parameters, 2)
    with pytest.warns(ExecutionNotice, match="plain"):
        found = hessian @ v
    assert hessian.notes == [PLAIN_KERNELS]
    agree(found.T, Objective(task, chunk=4).hvp(points, v.T[None])[0])


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (random.random, "Python's random module"),
        (np.random.rand, "numpy's random module"),
        (COUNT.__next__, "something in it changes"),
    ],
)
def test_a_loss_with_noise_of_its_own_is_refused(draw, told):
    x, y = classes()
    task, points = task_for(mlp(3, 5, 3)(), (x, y))
    noisy = task.replace(loss=lambda m, b: F.cross_entropy(m(b[0] + 0.1 * draw()), b[1]))
    with pytest.raises(LosslabError, match=f"(?s)at the same weights.*{told}"):
        Hessian(Objective(noisy), points) @ torch.ones(points.parameters, dtype=torch.float64)


def test_noise_drawn_through_torch_is_held_and_told():
    x, y = classes()
    task, points = task_for(mlp(3, 5, 3)(), (x, y))
    noisy = task.replace(loss=lambda m, b: F.cross_entropy(m(b[0] + 0.1 * torch.randn_like(b[0])), b[1]))
    hessian = Hessian(Objective(noisy), points)
    assert torch.equal(hessian @ ones(points), hessian @ ones(points))
    assert hessian.notes == [HELD]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


def ones(points: Points) -> Tensor:
    return torch.ones(points.parameters, dtype=torch.float64)


def test_a_loss_that_is_not_twice_differentiable_is_named():
    task, points = task_for(mlp(3, 5, 3)(), classes())
    once = task.replace(loss=lambda m, b: F.cross_entropy(Once.apply(m(b[0])), b[1]))
    for strategy in STRATEGIES:
        with pytest.raises((LosslabError, RuntimeError), match=r"differentiated twice|jvp|setup_context"):
            Hessian(Objective(once), points, strategy=strategy) @ ones(points)
    with pytest.raises(LosslabError, match="marked once_differentiable"):
        Hessian(Objective(once, memory=1.0), points) @ ones(points)
    root = task.replace(loss=lambda m, b: sum(p.sum() for p in m.parameters()).mul(0).abs().sqrt())
    with pytest.raises(LosslabError, match="not twice differentiable there"):
        Hessian(Objective(root), points) @ ones(points)


def test_a_linear_loss_has_no_curvature():
    task, points = task_for(nn.Linear(3, 3), classes())
    flat = task.replace(loss=lambda m, b: m(b[0]).mean())
    agree(Hessian(Objective(flat), points) @ ones(points), torch.zeros(12, dtype=torch.float64))


def test_a_member_that_is_not_finite_stays_alone():
    task, _ = task_for(mlp(3, 5, 3)(), classes())
    points = Points.from_modules([task.model() for _ in range(3)])
    v = block(points.parameters, 2).expand(3, -1, -1)
    good = Hessian(Objective(task), points) @ v
    for w in points.weights.values():
        w[1] = torch.nan
    found = Hessian(Objective(task), points) @ v
    agree(found[[0, 2]], good[[0, 2]])
    assert found[1].isnan().all()


def refused():
    task, points = task_for(mlp(3, 5, 3)(), classes())
    frozen = Points.from_modules([mlp(3, 5, 3)().requires_grad_(False)])
    lost = Points({n: torch.full_like(w, torch.inf) for n, w in points.weights.items()}, {})
    bn = NAMED["bn1d"]
    normalised = supervised(bn.make, batch_of(bn))
    weights = function_task(quadratic([1.0, 2.0]))
    return [
        (lambda: Hessian(Objective(task), frozen), "no trainable parameters"),
        (lambda: Hessian(Objective(task), lost), "not finite in '"),
        (lambda: Hessian(Objective(task), points, strategy="fast"), "no strategy is named 'fast'"),
        (lambda: Hessian(Objective(task), points, layers=[]), "layers is empty"),
        (lambda: Hessian(Objective(task), points) @ torch.ones(3), r"wanted \[38\] or \[38, K\]"),
        (
            lambda: EmpiricalFisher(Objective(normalised), Points.from_modules(modules_of(bn))),
            "depends on the others",
        ),
        (lambda: EmpiricalFisher(Objective(weights), Points.from_modules([weights.model()])), "no examples"),
    ]


@pytest.mark.parametrize(("use", "told"), refused())
def test_mistakes_are_told(use, told):
    with pytest.raises(LosslabError, match=told):
        use()


def test_bad_values_in_the_data_are_told_as_such() -> None:
    x = torch.ones(6, 3)
    x[4, 1] = torch.nan
    task = supervised(lambda: nn.Linear(3, 2), train=(x, torch.zeros(6).long()))
    points = Points.from_modules([nn.Linear(3, 2)])
    with pytest.raises(LosslabError, match=r"the loss is nan at these weights.*bad values in the data"):
        Hessian(Objective(task), points) @ torch.ones(8)


class Dropping(nn.Module):
    """Drops units by a call inside of its forward."""

    def __init__(self, p: float, always: bool) -> None:
        super().__init__()
        self.into, self.out, self.p, self.always = nn.Linear(3, 5), nn.Linear(5, 3), p, always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.into(x))
        return self.out(nn.functional.dropout(hidden, self.p, self.always or self.training))


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_dropout_inside_of_a_forward_is_off_and_told(execution):
    x, y = classes()
    for p, always, policy, told in (
        (0.5, False, "batch", ["dropout is off in calls of dropout()"]),
        (0.5, True, "running", ["dropout is off in calls of dropout()"]),
        (0.5, False, "running", []),  # in evaluation mode nothing would be dropped
        (0.0, True, "batch", []),
    ):
        module = Dropping(p, always)
        task = supervised(lambda module=module: module, (x.float(), y))
        hessian = Hessian(
            Objective(task, batch_norm=policy, execution=execution), Points.from_modules([module])
        )
        first, second = (hessian @ torch.ones(hessian.size) for _ in range(2))
        assert torch.equal(first, second)
        assert hessian.notes == told


def test_dropout_of_recurrent_layers_is_told():
    module = nn.ModuleDict({"rnn": nn.LSTM(3, 4, 2, dropout=0.5), "plain": nn.LSTM(3, 4)})
    assert dropouts(module) == ["rnn"]
