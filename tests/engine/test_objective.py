"""The objective against plain torch loops in float64, and what it must leave alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.engine.cases import CASES, NAMED, Case, classified
from tests.oracles.objective import objective as oracle
from tests.oracles.objective import with_population_statistics
from torch import Tensor, nn

from losslab.engine import Points, train
from losslab.engine.objective import Objective
from losslab.engine.randomness import seeded
from losslab.errors import LosslabError
from losslab.layers import BatchNorm
from losslab.tasks import Task, mlp, supervised
from losslab.tasks.nest import map_nest

EXACT = {"rtol": 1e-9, "atol": 1e-12}
EXAMPLES, CHUNK = 13, 5  # 5 + 5 + 3: a mean of the chunks' means would be wrong


def double(t):
    return t.double() if t.is_floating_point() else t


def modules_of(case: Case, members: int = 3) -> list[nn.Module]:
    made = []
    for seed in range(members):
        with seeded(seed, "objective test"):
            module = case.make().double()
        for name, buffer in module.named_buffers():  # running statistics that are not the initial ones
            if name.endswith("running_var"):
                buffer.add_(0.3 * seed)
            elif name.endswith("running_mean"):
                buffer.add_(0.1 * (seed + 1))
        made.append(module)
    return made


def batch_of(case: Case, examples: int = EXAMPLES):
    return map_nest(double, case.batch(torch.Generator().manual_seed(5), examples))


def task_of(case: Case) -> Task:
    return Task(lambda: case.make().double(), case.loss, batch_of(case), name=case.name)


def execution_of(case: Case) -> str:
    return "loop" if case.backends == ("loop",) else "stacked"


def random_vectors(points: Points, count: int) -> Tensor:
    shape = (points.members, count, points.parameters)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def agree(found, wanted):
    torch.testing.assert_close(found, wanted, **EXACT)


LEFT = {"large", "smooth-l1-sum", "ce-sum"}  # an objective is a mean of examples, and refuses sums
STILL = [case for case in CASES if "nois" not in case.name and case.name not in LEFT]


@pytest.mark.parametrize("case", STILL, ids=str)
def test_value_gradient_and_products_are_those_of_plain_torch(case):
    members = modules_of(case)
    points = Points.from_modules(members)
    vectors = random_vectors(points, 2)
    wanted = [oracle(m, case.loss, batch_of(case), v, CHUNK) for m, v in zip(members, vectors, strict=True)]
    objective = Objective(task_of(case), chunk=CHUNK, execution=execution_of(case))
    value, gradient, products = (torch.stack(part) for part in zip(*wanted, strict=True))
    agree(objective.value(points), value)
    values, gradients = objective.gradient(points)
    agree(values, value)
    agree(gradients.matrix(), gradient)
    agree(objective.hvp(points, vectors), products)


@pytest.mark.parametrize("name", ["mlp-tanh", "bn1d", "tied"])
def test_products_are_those_of_the_dense_hessian(name):
    case = NAMED[name]
    module = modules_of(case, 1)[0]
    x, y = batch_of(case)
    points = Points.from_modules([module])

    def loss(flat):
        values = {n: w[0] for n, w in points.at(flat[None]).weights.items()}
        return F.cross_entropy(torch.func.functional_call(module, values, (x,)), y)

    dense = torch.autograd.functional.hessian(loss, points.matrix()[0])
    every = torch.eye(points.parameters, dtype=torch.float64)[None]
    agree(Objective(task_of(case)).hvp(points, every)[0], dense)


@pytest.mark.parametrize("name", ["bn1d", "resnet", "bn-cumulative", "dropout-bn", "conv", "dict"])
@pytest.mark.parametrize("policy", ["batch", "running", "re-estimate"])
@pytest.mark.parametrize("chunk", [None, CHUNK])
def test_batch_norm_policies(name, policy, chunk):
    case = NAMED[name]
    members, batch = modules_of(case), batch_of(case)
    objective = Objective(task_of(case), batch_norm=policy, chunk=chunk, execution="stacked")
    points = Points.from_modules(members)
    if policy == "re-estimate":
        members = [with_population_statistics(m, case.loss, batch, chunk) for m in members]
    training, vectors = policy == "batch", random_vectors(points, 1)
    wanted = [oracle(m, case.loss, batch, v, chunk, training) for m, v in zip(members, vectors, strict=True)]
    values, gradients = objective.gradient(points)
    agree(values, torch.stack([w[0] for w in wanted]))
    agree(objective.value(points), values)
    agree(gradients.matrix(), torch.stack([w[1] for w in wanted]))
    agree(objective.hvp(points, vectors), torch.stack([w[2] for w in wanted]))


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_ghost_batch_norm_is_re_estimated_over_all_examples(chunk, momentum):
    x = torch.randn(EXAMPLES, 4, generator=torch.Generator().manual_seed(3)).double() * 3 + 1

    def network(ghost):
        return nn.Sequential(BatchNorm(4, ghost=ghost, momentum=momentum), nn.Linear(4, 1)).double()

    task = Task(lambda: network(3), lambda model, batch: model(batch).square().mean(), x)
    points = Points.from_modules([network(3), network(3)])
    objective = Objective(task, batch_norm="re-estimate", chunk=chunk, execution="stacked")
    grouped = objective.under("batch").value(points)
    settled = objective.settled(points)
    parts = x.split(chunk or EXAMPLES)
    mean, var = (sum(len(p) / EXAMPLES * moment(p, 0) for p in parts) for moment in (torch.mean, torch.var))
    agree(settled.buffers["0.running_mean"], mean.expand(2, 4))
    agree(settled.buffers["0.running_var"], var.expand(2, 4))
    plain = Objective(task, module=network(None), batch_norm="re-estimate", chunk=chunk, execution="stacked")
    agree(objective.value(points), plain.value(points))
    # Under the policy "batch" the groups stay.
    agree(objective.under("batch").value(points), grouped)
    assert (grouped - plain.under("batch").value(points)).abs().min() > 1e-6


def test_by_default_batch_norm_sees_all_examples_at_once():
    case = NAMED["bn1d"]
    big = Task(lambda: case.make().double(), case.loss, batch_of(case, 3000))
    points = Points.from_modules(modules_of(case, 2))
    whole = Objective(big, execution="loop").value(points)
    agree(whole, Objective(big, chunk=3000, execution="loop").value(points))
    assert (whole - Objective(big, chunk=100, execution="loop").value(points)).abs().min() > 1e-6


def test_without_batch_norm_many_examples_are_streamed_and_weighted():
    case = NAMED["mlp-tanh"]
    big = Task(lambda: case.make().double(), case.loss, batch_of(case, 2500))
    points = Points.from_modules(modules_of(case))
    streamed, whole = (Objective(big, chunk=chunk, execution="stacked") for chunk in (None, 2500))
    mode = streamed._mode(True)
    assert len(list(streamed._chunks(mode, points))) > 1
    agree(streamed.value(points), whole.value(points))
    agree(streamed.gradient(points)[1].matrix(), whole.gradient(points)[1].matrix())


@pytest.mark.parametrize("name", ["mlp-relu", "bn1d", "resnet", "lstm"])
def test_a_point_in_a_stack_is_the_point_alone(name):
    case = NAMED[name]
    objective = Objective(task_of(case), chunk=CHUNK, execution=execution_of(case))
    points = Points.from_modules(modules_of(case, 4))
    values, gradients = objective.gradient(points)
    products = objective.hvp(points, gradients.matrix())
    for i in range(4):
        alone = points.select([i])
        value, gradient = objective.gradient(alone)
        agree(value, values[i : i + 1])
        agree(gradient.matrix(), gradients.matrix()[i : i + 1])
        agree(objective.hvp(alone, gradient.matrix()), products[i : i + 1])


@pytest.mark.parametrize("memory", [1.0, None])
def test_members_in_chunks_change_nothing(memory):
    case = NAMED["bn1d"]
    points = Points.from_modules(modules_of(case, 5))
    told = Objective(task_of(case), execution="stacked", memory=memory)
    value, gradient = told.gradient(points)
    plain = Objective(task_of(case), execution="loop").gradient(points)
    agree(value, plain[0])
    agree(gradient.matrix(), plain[1].matrix())


@pytest.mark.parametrize("policy", ["batch", "running", "re-estimate"])
def test_nothing_of_the_caller_is_touched(policy):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)
    )
    module[0].weight.grad = torch.ones(6, 4)
    module[1].eval()
    before = copy.deepcopy(module.state_dict())
    modes = [m.training for m in module.modules()]
    points = Points.from_modules([module])
    state, held = torch.get_rng_state(), {n: t.clone() for n, t in points.items()}
    x, y = classified(4)(torch.Generator().manual_seed(0), 9)
    objective = Objective.of(module, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (x, y), batch_norm=policy)
    value, gradient = objective.gradient(points)
    objective.value(points)
    objective.hvp(points, gradient.matrix())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(module[0].weight.grad, torch.ones(6, 4))
    assert module[4].weight.grad is None
    assert all(torch.equal(t, held[n]) for n, t in points.items())
    assert module[1].momentum is None
    assert torch.isfinite(value).all()


class Dropped(nn.Module):
    """Dropout as a layer, as a function and inside of a recurrent layer."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.lstm, self.p = nn.LSTM(4, 5, num_layers=2, dropout=p, batch_first=True), p
        self.drop, self.out = nn.Dropout(p), nn.Linear(5, 3)

    def forward(self, x):
        y = self.lstm(x)[0][:, -1]
        return self.out(F.dropout(self.drop(y), self.p, training=self.training))


def test_dropout_is_off_wherever_it_is():
    x, y = classified(2, 4)(torch.Generator().manual_seed(0), 7)
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    dropped, plain = Dropped(0.7), Dropped(0.0)
    plain.load_state_dict(dropped.state_dict())
    points = Points.from_modules([dropped])
    found = Objective.of(dropped, loss, (x, y)).value(points)
    torch.testing.assert_close(found[0], loss(plain, (x, y)).detach())


def test_noise_in_the_network_is_the_same_at_every_point_and_call():
    case = NAMED["noise"]
    points = Points.from_modules(modules_of(case, 1) * 3)
    objective = Objective(task_of(case), chunk=CHUNK)
    value = objective.value(points)
    agree(value, value[:1].expand(3))
    agree(objective.value(points), value)


def test_per_example_losses_average_to_the_value():
    for name, policy in (("mlp-tanh", "batch"), ("conv", "batch"), ("resnet", "running")):
        case = NAMED[name]
        points = Points.from_modules(modules_of(case))
        objective = Objective(task_of(case), batch_norm=policy, execution="stacked")
        each = objective.per_example(points)
        assert each.shape == (3, EXAMPLES)
        agree(each.mean(1), objective.value(points))
        x, y = batch_of(case)
        module = modules_of(case)[1].eval()
        agree(each[1, 4], case.loss(module, (x[4:5], y[4:5])).detach())


def test_per_example_losses_need_independent_examples():
    case = NAMED["bn1d"]
    with pytest.raises(LosslabError, match="depends on the others"):
        Objective(task_of(case)).per_example(Points.from_modules(modules_of(case)))
    weights_only = NAMED["weights-only"]
    with pytest.raises(LosslabError, match="no examples"):
        Objective(Task(weights_only.make, weights_only.loss, None)).per_example(
            Points.from_modules(modules_of(weights_only))
        )


def test_metrics_are_means_over_the_examples():
    x, y = classified(4)(torch.Generator().manual_seed(0), 10)
    task = supervised(mlp(4, 6, 3), (x, y))
    points = Points.from_modules([task.model() for _ in range(3)])
    found = Objective(task, chunk=3).metrics(points)["accuracy"]
    wanted = [(points.load_into(task.model(), i)(x).argmax(1) == y).float().mean() for i in range(3)]
    torch.testing.assert_close(found, torch.stack(wanted))
    with pytest.raises(LosslabError, match="no metrics"):
        Objective(task.replace(metrics=None)).metrics(points)


def test_a_point_that_is_not_finite_stays_alone():
    case = NAMED["bn1d"]
    points = Points.from_modules(modules_of(case, 4))
    objective = Objective(task_of(case), execution="stacked")
    good, _ = objective.gradient(points)
    for w in points.weights.values():
        w[2] = math.nan
    values, gradients = objective.gradient(points)
    assert torch.isnan(values).tolist() == [False, False, True, False]
    assert torch.isnan(gradients.matrix()).any(1).tolist() == [False, False, True, False]
    agree(values[[0, 1, 3]], good[[0, 1, 3]])


def test_vectors_by_name():
    case = NAMED["mlp-tanh"]
    points = Points.from_modules(modules_of(case))
    objective = Objective(task_of(case))
    vectors = {n: torch.ones_like(w) for n, w in points.weights.items()}
    flat = objective.hvp(points, torch.ones(3, points.parameters, dtype=torch.float64))
    agree(objective.hvp(points, vectors).matrix(), flat)


def test_other_examples_and_policies_keep_what_was_found_out():
    case = NAMED["bn1d"]
    points = Points.from_modules(modules_of(case))
    objective = Objective(task_of(case), execution="stacked")
    objective.value(points)
    batch = map_nest(lambda t: t[:6], batch_of(case))
    other = objective.on(batch)
    wanted = torch.stack([case.loss(m.train(), batch).detach() for m in modules_of(case)])
    agree(other.value(points), wanted)
    assert other._modes is objective._modes
    running = other.under("running").value(points)
    assert (running - wanted).abs().min() > 1e-6


def test_of_a_population():
    x, y = classified(4)(torch.Generator().manual_seed(0), 12)
    task = supervised(mlp(4, 6, 3, batch_norm=True), (x, y))
    population = train(task, "sgd", seeds=3, steps=4, batch_size=6, progress=False)
    values = Objective.of(population, batch_norm="running").value(population.points)
    wanted = [F.cross_entropy(population[i](x), y).detach() for i in range(3)]
    torch.testing.assert_close(values, torch.stack(wanted))


def test_single_precision_is_kept():
    x, y = classified(4)(torch.Generator().manual_seed(0), 12)
    task = supervised(mlp(4, 6, 3), (x.double(), y))
    points = Points.from_modules([mlp(4, 6, 3)()])
    values, gradients = Objective(task).gradient(points)
    assert values.dtype == gradients.matrix().dtype == torch.float32


BAD = [
    (lambda t: Objective(t, batch_norm="frozen"), "no batch-norm policy is named 'frozen'"),
    (lambda t: Objective(t).under("frozen"), "no batch-norm policy is named 'frozen'"),
    (lambda t: Objective(t, "held out"), "no data set is named"),
    (lambda t: Objective(t, "validation"), "has no validation data"),
    (lambda t: Objective(t, chunk=0), "at least one example"),
    (lambda t: Objective(t, execution="fast"), "no execution is named"),
    (lambda t: Objective.of(nn.Linear(4, 3)), "pass loss="),
    (lambda t: Objective(t).value(Points.from_modules([nn.Linear(5, 3)])), "differ from the objective's"),
    (lambda t: Objective(t).hvp(points_of(t), torch.ones(2, 5)), r"wanted \[1, 15\]"),
    (lambda t: Objective(t).hvp(points_of(t), {"weight": torch.ones(2)}), "differ from the weights at"),
]


def losing(**options):
    return lambda m, b: F.cross_entropy(m(b[0]), b[1], **options)


LOSSES = {
    "unreduced": (losing(reduction="none"), r"has shape \(\d+,\), not a scalar"),
    "a sum": (losing(reduction="sum"), "so it is a sum"),
    "a number": (lambda m, b: float(losing()(m, b)), "is a float, not a tensor"),
    "detached": (lambda m, b: losing()(m, b).detach(), "does not depend on the weights"),
    "of something else": (lambda m, b: torch.ones((), requires_grad=True), "does not depend on the weights"),
    "raises": (lambda m, b: m(b[1]), "the loss of 'task' raised RuntimeError"),
}


@pytest.mark.parametrize("batch_norm", ["batch", "running", "re-estimate"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_no_mean_of_examples_is_refused(name, batch_norm):
    loss, told = LOSSES[name]
    task = Task(lambda: nn.Linear(4, 3), loss, classified(4)(torch.Generator().manual_seed(0), 12))
    objective, points = Objective(task, batch_norm=batch_norm, chunk=5), points_of(task)
    for use in (objective.value, objective.gradient, objective.per_example):
        with pytest.raises(LosslabError, match=told):
            use(points)


def test_a_loss_may_be_infinite_at_a_network_that_is_only_built():
    task = Task(lambda: nn.Linear(4, 3), lambda m, x: m(x).mean() / m.bias[0].detach(), torch.ones(3, 4))
    nought = points_of(task)
    nought.weights["bias"].zero_()
    assert not Objective(task).value(nought).isfinite().any()


def points_of(task):
    return Points.from_modules([task.model()])


@pytest.mark.parametrize(("use", "told"), BAD)
def test_mistakes_are_told(use, told):
    x, y = classified(4)(torch.Generator().manual_seed(0), 12)
    with pytest.raises(LosslabError, match=told):
        use(supervised(lambda: nn.Linear(4, 3), (x, y)))
