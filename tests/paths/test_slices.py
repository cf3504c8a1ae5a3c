"""Slices: the points they name, what is measured there, and the defects of other tools."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losslab.engine import Points, checkpoints, train
from losslab.engine.randomness import seeded
from losslab.errors import LosslabError
from losslab.paths import Landscape, Trajectory, Work, along, measure_slice, principal, random_slice, through
from losslab.paths import landscape as landscape_module
from losslab.paths.sharing import Straight
from losslab.rules import make
from losslab.tasks import Task, conv2, double_well, function_task, mlp, rosenbrock, supervised
from losslab.tasks.models import ResidualBlock

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def networks(factory, count: int = 3) -> list[nn.Module]:
    made = []
    for seed in range(count):
        with seeded(seed, "paths"):
            made.append(factory().double())
        for name, buffer in made[-1].named_buffers():
            if name.endswith("running_var"):
                buffer.add_(0.2 * seed)
    return made


def small_conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), ResidualBlock(4, 4, True), nn.Flatten(), nn.Linear(16, 3)
    )


class Gated(nn.Module):
    """With an operation that is in no table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(F.glu(torch.cat([self.a(x), self.a(x)], -1)))


KINDS = {
    "mlp": (mlp(5, 7, 3), (5,)),
    "one layer": (mlp(5, 3), (5,)),
    "conv": (small_conv, (1, 4, 4)),
    "batch norm": (mlp(5, 7, 3, batch_norm=True), (5,)),
    "residual": (residual, (1, 4, 4)),
    "gated": (Gated, (5,)),
}


def task_of(kind: str, examples: int = 23) -> Task:
    factory, shape = KINDS[kind]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(examples, *shape, generator=g, dtype=torch.float64)
    y = torch.randint(3, (examples,), generator=g)
    return supervised(lambda: factory().double(), (x[:13], y[:13]), (x[13:], y[13:]), name=kind)


def by_hand(task: Task, module: nn.Module, policy: str) -> dict[str, float]:
    """Losses and errors of one module in plain torch."""
    module = copy.deepcopy(module)
    if policy == "re-estimate":
        for m in module.modules():
            if hasattr(m, "momentum"):
                m.momentum = 1.0
        module.train()
        module(task.train.all()[0])
    module.train(policy == "batch")
    told = {}
    for name in ("train", "test"):
        x, y = getattr(task, name).all()
        with torch.no_grad():
            z = module(x)
        told[f"{name}_loss"] = float(F.cross_entropy(z, y))
        told[f"{name}_error"] = float((z.argmax(-1) != y).double().mean())
    return told


def precision(name: str) -> float:
    return 1e-9 if name.endswith("loss") else 1e-6  # accuracies are counted in single precision


@pytest.mark.parametrize("policy", ["re-estimate", "running", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_measures_what_each_network_measures_alone(kind, policy):
    task, made = task_of(kind), networks(KINDS[kind][0])
    before = [copy.deepcopy(m.state_dict()) for m in made]
    plane = through(made)
    landscape = Landscape(task, batch_norm=policy)
    grid = measure_slice(landscape, plane, torch.linspace(-0.5, 2, 4), torch.linspace(-1, 1, 3))
    points = plane.at(grid.slice.marks)
    for i in range(4):
        for j in range(3):
            c = torch.tensor([[grid.axes[0][i], grid.axes[1][j]]])
            module = plane.at(c).load_into(copy.deepcopy(made[0]), 0)
            for name, wanted in by_hand(task, module, policy).items():
                assert float(grid[name][i, j]) == pytest.approx(wanted, rel=precision(name))
    for i, module in enumerate(made):  # the checkpoints at their own marks, running statistics included
        wanted = by_hand(task, module, policy)
        for name, value in wanted.items():
            assert float(grid.at_marks[name][i]) == pytest.approx(value, rel=precision(name))
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[i][name])
            if tensor.is_floating_point():
                torch.testing.assert_close(points[name][i], tensor, **EXACT)


@pytest.mark.parametrize("kind", ["mlp", "conv", "one layer"])
def test_the_shared_first_layer_is_used_and_changes_nothing(kind, monkeypatch):
    task, plane = task_of(kind), through(networks(KINDS[kind][0]))
    coordinates = torch.randn(17, 2, generator=torch.Generator().manual_seed(0))
    landscape = Landscape(task, execution="stacked", chunk=4)
    shared = landscape.along(plane.frame, plane.coefficients(coordinates))
    assert list(landscape._agrees.values()) == [True]
    monkeypatch.setattr(landscape_module, "WEIGHTS_BYTES", 4000)  # in pieces
    torch.testing.assert_close(shared, landscape(plane.at(coordinates)), **EXACT)


STRAIGHT = {
    "activations": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7, bias=False), nn.SiLU(), nn.Dropout(0.5),
        nn.Sequential(nn.Linear(7, 5), nn.Softsign(), nn.Linear(5, 3), nn.Sigmoid()),
    ),
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Identity(), nn.Linear(4, 3)),
}  # fmt: skip
BENT = {
    "tokens": lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
    "activation first": lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(6, 3)),
    "unknown": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Softmax(-1)),
    "frozen": lambda: _frozen(nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))),
}


def _frozen(module):
    module[1].weight.requires_grad_(False)
    return module


def _penalised(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) + sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("loss", ["plain", "penalised"])
@pytest.mark.parametrize("name", [*STRAIGHT, *BENT])
def test_chains_are_run_point_by_point_and_nothing_else_is(name, loss, monkeypatch):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 2, 3, generator=g, dtype=torch.float64), torch.randint(3, (20,), generator=g)
    make = {**STRAIGHT, **BENT}[name]
    task = supervised(lambda: make().double(), (x, y))
    if loss == "penalised":
        task = task.replace(loss=_penalised)
    plane = through([task.model() for _ in range(3)])
    runs = []
    outputs = Straight.outputs
    monkeypatch.setattr(Straight, "outputs", lambda self, *args: runs.append(1) or outputs(self, *args))
    # a grid's rows, where only the last coefficient moves, and points at random
    coordinates = torch.cat([torch.cartesian_prod(torch.rand(3, generator=g), torch.rand(4, generator=g)),
                             torch.randn(9, 2, generator=g)])  # fmt: skip
    landscape = Landscape(task, execution="stacked", chunk=7)
    shared = landscape.along(plane.frame, plane.coefficients(coordinates))
    assert bool(runs) == (name in STRAIGHT)
    torch.testing.assert_close(shared, landscape(plane.at(coordinates)), **EXACT)


def test_centre_of_any_plane_is_the_model_bit_for_bit():
    module = networks(mlp(5, 7, 3))[0]
    points = Points.from_modules([module])
    ways = torch.randn(2, points.parameters, dtype=torch.float64)
    for plane in (along(module, ways), random_slice(module), random_slice(module, normalise="unit")):
        centre = plane.at([[0.0, 0.0]])
        assert all(torch.equal(centre[n], points[n]) for n in points)


@pytest.mark.parametrize("normalise", ["filter", "layer", "global", "unit"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_random_directions_are_orthogonal_and_normalised(normalise, count):
    module = networks(KINDS["conv"][0])[0]
    found = random_slice(module, count, seed=3, normalise=normalise)
    ways = found.frame.matrix()[1:]
    gram = ways @ ways.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-10)
    for name, w in module.named_parameters():
        for d in found.frame[name][1:]:
            if normalise in ("filter", "layer") and w.dim() == 1:
                assert not d.any()
            elif normalise == "filter":
                torch.testing.assert_close(d.flatten(1).norm(dim=1), w.detach().flatten(1).norm(dim=1))
            elif normalise == "layer":
                torch.testing.assert_close(d.norm(), w.detach().norm())
    size = Points.from_modules([module]).matrix().norm()
    if normalise in ("global", "unit"):
        wanted = (size if normalise == "global" else torch.ones(())).double()
        torch.testing.assert_close(gram.diagonal().sqrt(), wanted.expand(count))


def test_random_directions_depend_on_the_seed_alone_and_look_gaussian():
    module = mlp(30, 40, 5)()
    a, b, c = (random_slice(module, seed=s).frame.matrix()[1:] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    directions = torch.cat(
        [random_slice(module, seed=s, normalise="unit").frame.matrix()[1:] for s in range(5)]
    )
    values = (directions * directions.shape[1] ** 0.5).flatten()
    assert abs(float(values.mean())) < 0.03  # uniform on [0, 1], as a tool had them, would give 0.87
    assert abs(float((values.abs() < 0.6745).double().mean()) - 0.5) < 0.02


def test_filters_smaller_than_the_number_of_directions_are_taken_together():
    module = mlp(1, 4, 1)()
    ways = random_slice(module, 2).frame["0.weight"][1:].flatten(1)
    assert abs(float(ways[0] @ ways[1])) < 1e-6
    torch.testing.assert_close(ways.norm(dim=1), module[0].weight.detach().norm().expand(2))


def test_marks_of_a_slice_are_the_checkpoints_coordinates():
    for count in (2, 3, 4, 6):
        points = Points.from_modules(networks(mlp(5, 7, 3), count))
        cut = through(points)
        torch.testing.assert_close(cut.at(cut.marks).matrix(), points.matrix(), **EXACT)
        found, away = cut.project(points)
        torch.testing.assert_close(found, cut.marks, **EXACT)
        assert float(away.max()) < 1e-10
        if count > 2:
            ways = cut.frame.matrix()[1:]
            torch.testing.assert_close(ways @ ways.T, torch.eye(count - 1).double(), **EXACT)


def test_a_line_extrapolates_past_its_ends():
    line = through(networks(mlp(5, 3), 2))
    (axis,) = line.axes(5, margin=0.5)
    torch.testing.assert_close(axis, torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).double())


def test_principal_components_of_a_trajectory():
    been = Trajectory()
    task = function_task(rosenbrock)
    rule = make("gd", lr=1e-3)
    train(task, rule, seeds=2, steps=20, record=1, watch=been, progress=False, dtype="float64", evaluate=None)
    points = been.points(1)
    found = principal(points)
    torch.testing.assert_close(found.at(found.marks).matrix(), points.matrix(), **EXACT)
    centred = points.matrix() - points.matrix()[-1]
    values = torch.linalg.svdvals(centred)
    torch.testing.assert_close(torch.tensor(found.explained).double(), values**2 / (values**2).sum())
    with pytest.raises(LosslabError, match="components"):
        principal(points.select([0, 1]))
    straight = Points({"x": torch.arange(5.0)[:, None] * torch.ones(1, 3)}, {})
    with pytest.raises(LosslabError, match="does not move"):
        principal(straight)
    assert principal(straight, 1, "mean").explained[0] == pytest.approx(1.0)


def test_nan_and_infinity_are_kept():
    task = function_task(double_well)
    line = along(task.model(), torch.tensor([[1.0, 0.0]]))
    grid = measure_slice(Landscape(task), line, torch.tensor([0.0, 1e30, -1e30, float("nan")]))
    assert grid["loss"].isinf().tolist() == [False, True, True, False]
    assert grid["loss"].isnan().tolist() == [False, False, False, True]
    classified = task_of("mlp")
    points = Points.from_modules(networks(mlp(5, 7, 3)))
    points.weights["0.bias"][1] = float("nan")
    told = Landscape(classified)(points)
    assert all(v.isnan().tolist() == [False, True, False] for v in told.values())


def test_a_killed_grid_goes_on_and_is_the_same(tmp_path, monkeypatch):
    task, plane = task_of("mlp"), through(networks(mlp(5, 7, 3)))
    landscape, axes = Landscape(task, execution="stacked"), plane.axes(5)
    whole = measure_slice(landscape, plane, *axes, piece=4)
    file, calls = tmp_path / "grid.safetensors", []
    work = Work(file, every=0)

    def killed(path, tensors, meta, write=checkpoints.write):
        write(path, tensors, meta)
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_slice(landscape, plane, *axes, out=work, piece=4)
    resumed = measure_slice(landscape, plane, *axes, out=work, piece=4)
    assert len(calls) == 7
    assert all(torch.equal(resumed[n], whole[n]) for n in whole.values)
    with pytest.raises(LosslabError, match="other work"):
        measure_slice(landscape, plane, *plane.axes(6), out=file)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda m: through([m[0]]), "two or more"),
        (lambda m: through([m[0], copy.deepcopy(m[0])]), "zero"),
        (lambda m: through(_in_a_row(m)), "combination"),
        (lambda m: through([m[0], mlp(5, 8, 3)().double()]), "one architecture"),
        (lambda m: through([m[0], _lost(m[1])]), "not finite"),
        (lambda m: along(m[0], torch.ones(2, 66)), "combination"),
        (lambda m: along(m[0], torch.ones(2, 7)), "directions of shape"),
        (lambda m: along(m[:2], torch.ones(1, 66)), "origin"),
        (lambda m: along(m[0], torch.eye(66)[:2], names=["one"]), "names"),
        (lambda m: random_slice(m[0], normalise="filters"), "did you mean 'filter'"),
        (lambda m: random_slice(m[0], 0), "directions were wanted"),
        (lambda m: random_slice("model.pt"), "no place in weight space"),
        (lambda m: through(m).at([[0.0]]), "one column a direction"),
        (lambda m: Landscape(task_of("mlp"), on=["tset"]), "did you mean 'test'"),
        (lambda m: Landscape(task_of("mlp"), batch_norm="train"), "policy"),
        (lambda m: Landscape(task_of("mlp"))(Points.from_modules([mlp(5, 8, 3)()])), "differ"),
        (lambda m: measure_slice(Landscape(task_of("mlp")), through(m), torch.ones(2)), "axes"),
    ],
)
def test_bad_input_is_told_in_one_sentence(make, told):
    with pytest.raises(LosslabError, match=told) as error:
        make(networks(mlp(5, 7, 3)))
    assert "\n" not in str(error.value)


def _in_a_row(made):
    points = Points.from_modules(made[:2])
    return points.at(points.matrix()[:1] + torch.tensor([[0.0], [1.0], [2.0]]) * points.matrix()[1:])


def _lost(module):
    with torch.no_grad():
        module[0].bias[0] = float("nan")
    return module


def test_a_plane_of_many_large_points_stays_small(monkeypatch):
    """The first layer's weights are never written out for all points."""
    task = Task(conv2(1, 4), lambda m, b: m(b).mean(), torch.randn(3, 1, 4, 4))
    with seeded(0, "paths"):
        points = Points.from_modules([task.model() for _ in range(2)])
    told = Landscape(task, execution="stacked").along(points, torch.rand(9, 2))
    assert told["train_loss"].shape == (9,)


def test_a_slice_of_other_networks_is_refused_where_the_first_layer_is_shared():
    landscape = Landscape(task_of("mlp"))
    wider = Points.from_modules([mlp(4, 9, 3)() for _ in range(2)])
    with pytest.raises(LosslabError, match="differ from the objective's network"):
        measure_slice(landscape, through(wider), torch.linspace(0, 1, 21))
