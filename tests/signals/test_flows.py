"""What flows: against hooks and autograd of plain torch, alone and in a population; and no trace is left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.cases import CASES, NAMED, TABLE, Case, stand
from torch import Tensor, nn

from losslab.engine import Points, Population, train
from losslab.engine.backends import LoopBackend
from losslab.engine.template import Template
from losslab.errors import LosslabError
from losslab.signals import Flow, Instrument, flow
from losslab.tasks import Data, Task, conv2, mlp, supervised


def close(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def batch(*shape: int, examples: int = 7, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(examples, *shape, generator=g).double(), torch.randint(
        classes, (examples,), generator=g
    )


def entropy(model: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(model(b[0]), b[1])


def plain(module: nn.Module, loss: Any, given: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, outputs and their gradients by retain_grad on a copy; the slow and obvious way."""
    module = copy.deepcopy(module)
    kept: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if not list(part.children()):
            part.register_forward_hook(lambda m, i, o, name=name: kept.setdefault(name, _retained(o)))
    value = loss(module, given)
    value.backward()
    return value.detach(), {n: t.detach() for n, t in kept.items()}, {n: t.grad for n, t in kept.items()}


def _retained(t: Tensor) -> Tensor:
    if t.requires_grad:
        t.retain_grad()
    return t


# -- numbers -------------------------------------------------------------------------------------------


def test_an_mlp_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = batch(4)
    seen = flow(net, entropy, (x, y))
    s = x @ net[0].weight.T + net[0].bias
    z = torch.tanh(s)
    logits = z @ net[2].weight.T + net[2].bias
    back = (torch.softmax(logits, 1) - F.one_hot(y, 3)) / len(y)
    for name, value in {"0": s, "1": z, "2": logits}.items():
        close(seen.outputs[name][0], value.detach())
    for name, value in {
        "2": back,
        "1": back @ net[2].weight,
        "0": (back @ net[2].weight) * (1 - z**2),
    }.items():
        close(seen.gradients[name][0], value.detach())
    close(seen.weight_gradients["2.weight"][0], (back.T @ z).detach())
    close(seen.inputs["2"][0], z.detach())
    close(seen.losses[0], F.cross_entropy(logits, y).detach())
    assert [seen.layers[n].kind for n in seen.layers] == ["Linear", "Tanh", "Linear"]
    assert seen.layers["0"].weights == ("0.weight", "0.bias")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (mlp(4, 6, 5, 3, batch_norm=True), (4,)),
        (conv2(2, 8, 3), (2, 8, 8)),
        (NAMED["resnet"].make, (2, 6, 6)),
    ],
    ids=["bn", "conv", "residual"],
)
def test_equal_to_hooks_of_plain_torch(make: Any, shape: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(1)
    net = make().double().train(training)
    given = batch(*shape)
    loss, outputs, gradients = plain(net, entropy, given)
    seen = flow(net, entropy, given, training=training)
    close(seen.losses[0], loss)
    assert set(seen.outputs) >= set(outputs) - {"7", "5", "6"}
    for name in set(seen.outputs) & set(outputs):
        close(seen.outputs[name][0], outputs[name])
        close(seen.gradients[name][0], gradients[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_members_together_are_members_alone(case: Case) -> None:
    at = stand(case, private=False)
    instrument = Instrument(case.make().double(), case.loss)
    points = Points(at.weights, at.buffers)
    before = points.clone()
    together = instrument(points, at.batch, at.keys)
    losses, grads = LoopBackend(Template(case.make().double()), True, True).gradients(
        case.loss, at.sheltered()
    )
    close(together.losses, losses)
    for name, g in grads.items():
        close(together.weight_gradients[name], g)
    for i in range(at.members):
        one = Instrument(case.make().double(), case.loss)(points.select([i]), at.batch, at.keys[i : i + 1])
        left_out = {"relu()"} if case.name == "mask" else set()  # as many numbers as the mask lets pass
        assert set(one.outputs) - set(together.outputs) == left_out
        for kind in ("outputs", "inputs", "gradients"):
            ours, theirs = getattr(together, kind), getattr(one, kind)
            assert list(ours) == [name for name in theirs if name not in left_out]
            for name in ours:
                close(ours[name][i], theirs[name][0])
    assert all(torch.equal(points[n], before[n]) for n in points)
    assert instrument.alone == (TABLE not in case.backends)


def test_private_batches() -> None:
    case = NAMED["bn1d"]
    at = stand(case, private=True)
    points = Points(at.weights, at.buffers)
    seen = Instrument(case.make().double(), case.loss)(points, at.batch, at.keys, private=True)
    for i in range(at.members):
        given = tuple(t[i] for t in at.batch)
        one = flow(points.load_into(case.make().double(), i), case.loss, given)
        close(seen.outputs["0"][i], one.outputs["0"][0])
        close(seen.gradients["0"][i], one.gradients["0"][0])


# -- what a network may do -----------------------------------------------------------------------------


class Functional(nn.Module):
    """Activations called as functions and methods, some in place, one layer called twice."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = F.relu_(h) if self.in_place else F.relu(h)
        h = self.b(self.b(h).sigmoid())
        if self.in_place:
            h += 1.0
        else:
            h = h + 1.0
        return self.c(torch.tanh(h))


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_functional_activations_are_seen_as_they_were(in_place: bool, members: int) -> None:
    modules = []
    for seed in range(members):
        torch.manual_seed(seed)
        modules.append(Functional(in_place).double())
    given = batch(4)
    seen = Instrument(modules[0], entropy)(Points.from_modules(modules), given, torch.arange(members))
    assert list(seen.outputs) == ["a", "relu()", "b", "sigmoid()", "b#2", "tanh()", "c"]
    for i, module in enumerate(modules):
        s = module.a(given[0]).detach()
        assert bool((s < 0).any())
        close(seen.outputs["a"][i], s)
        close(seen.inputs["relu()"][i], s)
        close(seen.outputs["relu()"][i], s.relu())
        close(seen.inputs["b"][i], s.relu())
        twice = module.b(module.b(s.relu()).sigmoid()).detach()
        close(seen.outputs["b#2"][i], twice)
        close(seen.inputs["tanh()"][i], twice + 1)
        back = seen.gradients["tanh()"][i] * (1 - torch.tanh(twice + 1) ** 2)
        close(seen.gradients["b#2"][i], back)
    other = Instrument(Functional(not in_place).double(), entropy)
    same = other(Points.from_modules(modules), given, torch.arange(members))
    for name in seen.gradients:
        close(seen.gradients[name], same.gradients[name])


def test_modules_that_work_in_place() -> None:
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=i), nn.Linear(6, 3), nn.ELU(inplace=i))
        for i in (True, False)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    a, b = (flow(net.double(), entropy, batch(4)) for net in nets)
    for kind in ("outputs", "inputs", "gradients"):
        for name, t in getattr(a, kind).items():
            close(t, getattr(b, kind)[name])
    assert bool((a.outputs["0"] < 0).any())
    assert nets[0][1].inplace  # the private copy's was switched off


def test_a_first_layer_without_weights_has_a_gradient_a_member() -> None:
    modules = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).double() for _ in range(3)]
    given = batch(4)
    kept = given[0].clone()
    seen = Instrument(modules[0], entropy)(Points.from_modules(modules), given, torch.arange(3))
    for i, module in enumerate(modules):
        close(seen.gradients["0"][i], flow(module, entropy, given).gradients["0"][0])
    assert torch.equal(given[0], kept)
    assert not torch.equal(seen.gradients["0"][0], seen.gradients["0"][1])


def test_dict_batches_outputs_that_are_nests_and_inner_modules() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Sequential(nn.Linear(5, 3))

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.head(self.lstm(inputs)[0][:, -1])
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    x, y = batch(3, 4)
    seen = flow(Model().double(), lambda m, b: m(**b)["loss"], {"inputs": x, "labels": y})
    assert seen.outputs["lstm"].shape == (1, 7, 3, 5)
    assert float(seen.gradients["lstm"][0, :, :-1].abs().max()) == 0.0
    inner = flow(Model().double(), lambda m, b: m(**b)["loss"], {"inputs": x, "labels": y}, layers=["head"])
    assert list(inner.outputs) == ["head"]


def test_layers_asked_for_and_their_errors() -> None:
    net, given = Functional(False).double(), batch(4)
    assert list(flow(net, entropy, given, layers=["b#2", "relu()"]).outputs) == ["relu()", "b#2"]
    assert list(flow(net, entropy, given, layers="b").outputs) == ["b", "b#2"]
    with pytest.raises(LosslabError, match=r"no layer is named 'bb'.*'b'"):
        flow(net, entropy, given, layers=["bb"])
    with pytest.raises(LosslabError, match=r"layer 'selu\(\)' has no output"):
        flow(net, entropy, given, layers=["selu()"])


def test_a_spectral_norm_and_a_parametrisation_stay() -> None:
    torch.manual_seed(0)
    for norm in (nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm):
        net = nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double().eval()
        given = batch(4)
        seen = flow(net, entropy, given, training=False)
        assert list(seen.outputs) == ["0", "1", "2"]
        close(seen.outputs["0"][0], net[0](given[0]).detach())


class Drawing(nn.Module):
    """Draws from the global generator, or reads all members' values through a back door."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.a, self.draws = nn.Linear(4, 3), draws

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y * (torch.rand(()) if self.draws else y.data.std())


@pytest.mark.parametrize("draws", [True, False])
def test_what_cannot_be_stacked_is_run_one_by_one(draws: bool) -> None:
    modules = [Drawing(draws).double() for _ in range(3)]
    points, keys = Points.from_modules(modules), torch.arange(3)
    instrument = Instrument(modules[0], entropy)
    seen = instrument(points, batch(4), keys)
    assert instrument.alone
    for i in range(3):
        one = Instrument(modules[0], entropy)(points.select([i]), batch(4), keys[i : i + 1])
        close(seen.losses[i], one.losses[0])
        close(seen.gradients["a"][i], one.gradients["a"][0])
    if draws:
        assert len(set((seen.losses / seen.outputs["a"].mean((1, 2))).tolist())) == 3


# -- what training's own way sees ----------------------------------------------------------------------


class Written(nn.Module):
    """Activations as modules, functions and methods, a tied weight, a branch that the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.c = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 3),
        )
        self.b.weight = self.a.weight
        self.act, self.idle = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        self.idle(h)
        h = torch.sigmoid(self.b(h))
        return self.c(self.act(self.norm(h).relu()))


@pytest.mark.parametrize("training", [True, False])
def test_the_tape_and_autograd_see_the_same(training: bool) -> None:
    x, y = batch(4, examples=40)
    task = supervised(Written, (x, y))
    options = {"dtype": "float64", "evaluate": None, "execution": "stacked"}
    population = train(task, "sgd", seeds=3, steps=2, batch_size=10, **options)
    assert population.execution is not None
    assert population.execution.backend.name == "tape"
    found = []
    for taping in (True, False):
        instrument = Instrument.of(population)
        assert instrument.taping
        instrument.taping = taping
        found.append(instrument(population.points, (x, y), torch.arange(3), training=training))
        assert instrument.taping == taping
    ours, theirs = found
    assert list(ours.outputs) == ["a", "tanh()", "idle", "b", "sigmoid()", "norm", "relu()", "act", "c"]
    for kind in ("outputs", "inputs", "gradients", "weight_gradients"):
        assert list(getattr(ours, kind)) == list(getattr(theirs, kind))
        for name, t in getattr(theirs, kind).items():
            close(getattr(ours, kind)[name], t)
    close(ours.losses, theirs.losses)
    assert ours.layers["b"].weights == ("a.weight", "b.bias")
    assert float(ours.gradients["idle"].abs().max()) == 0.0


def test_what_the_tape_cannot_see_autograd_does() -> None:
    x, y = batch(4, examples=20)
    task = supervised(lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), (x, y))
    options = {"dtype": "float64", "evaluate": None, "execution": "stacked"}
    population = train(task, "sgd", seeds=2, steps=1, batch_size=5, **options)
    instrument = Instrument.of(population)
    assert instrument.taping
    seen = instrument(population.points, (x, y), torch.arange(2))
    assert not instrument.taping
    assert bool((seen.gradients["0"] != 0).any())


def test_attention_is_a_layer() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.out(self.mix(h, h, h)[0].mean(1))

    tokens = torch.randint(9, (7, 5), generator=torch.Generator().manual_seed(0))
    seen = flow(Attentive().double(), entropy, (tokens, batch(4)[1]))
    assert list(seen.outputs) == ["embed", "mix", "out"]
    assert seen.outputs["mix"].shape == (1, 7, 5, 4)
    assert float(seen.gradients["mix"].abs().max()) > 0


# -- populations ---------------------------------------------------------------------------------------


def digits_like() -> Task:
    x, y = batch(4, examples=40)
    return supervised(mlp(4, 6, 3, activation="relu", batch_norm=True, dropout=0.2), (x.float(), y))


@pytest.fixture(scope="module")
def population() -> Population:
    return train(digits_like(), "sgd", seeds=3, steps=4, batch_size=10, dtype="float64")


def test_a_population_looks_at_its_own_examples(population: Population) -> None:
    seen = flow(population)
    assert seen.losses.shape == (3,)
    assert seen.outputs["0"].dtype == torch.float64
    again = flow(population, batch=population.task.train)
    assert seen.outputs["0"].shape == again.outputs["0"].shape
    quiet = flow(population, training=False, gradients=False)
    assert not quiet.gradients
    assert not quiet.weight_gradients
    close(quiet.losses, torch.stack([entropy(m, _all(population)) for m in population]).detach())


def _all(population: Population) -> Any:
    assert population.task.train is not None
    return population.task.train.to(dtype=torch.float64).all()


def test_a_diverged_member_is_data_and_a_sick_one_an_error() -> None:
    task = digits_like()
    population = train(task, "sgd", seeds=2, steps=1, batch_size=10)
    population.points.weights["0.weight"][1] = float("nan")
    with pytest.raises(LosslabError, match=r"layer '0' gives 240 of 240 values.*for member 1.*smaller"):
        flow(population)
    population.diverged[1] = 0
    seen = flow(population)
    assert bool(seen.outputs["0"][1].isnan().all())
    assert bool(seen.gradients["0"][0].isfinite().all())


# -- no trace, and errors ------------------------------------------------------------------------------


def test_no_trace_is_left() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)
    ).double()
    net[0].eval()
    entropy(net, batch(4)).backward()
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    state = torch.get_rng_state()
    noisy = lambda model, b: entropy(model, b) * torch.rand(()).add(1.0)
    first, second = (flow(net, noisy, batch(4)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    close(first.outputs["3"], second.outputs["3"])
    assert all(torch.equal(net.state_dict()[n], t) for n, t in before.items())
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert net[2].inplace


class Logarithm(nn.Linear):
    """A layer that works on what has no logarithm."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.log())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"network": 3}, "the network is a int"),
        ({"loss": None}, "without a loss"),
        ({"batch": None}, "without a batch"),
        ({"loss": lambda m, b: m(b[0]).sum(1)}, r"shape \[7\], a scalar was wanted"),
        ({"batch": (torch.full((7, 4), float("inf")).double(), torch.zeros(7).long())}, "the batch holds 28"),
        ({"batch": tuple(t[:0] for t in batch(4))}, "the batch is empty"),
        ({"network": nn.Tanh()}, "neither weights nor buffers"),
        ({"network": mlp(5, 6, 3)().double()}, r"layer '0' raised RuntimeError: .*mend the network"),
        ({"loss": lambda m, b: m(b[0]).missing()}, "the loss raised AttributeError"),
        ({"network": Logarithm(4, 3).double()}, "layer 'Logarithm' is given values that are not finite"),
        (
            {"network": mlp(4, 5, 3, batch_norm=True)().double(), "batch": tuple(t[:1] for t in batch(4))},
            "two examples or more",
        ),
    ],
)
def test_errors(change: dict[str, Any], told: str) -> None:
    given = {"network": mlp(4, 5, 3)().double(), "loss": entropy, "batch": batch(4)} | change
    with pytest.raises(LosslabError, match=told):
        flow(**given)


def test_a_task_brings_loss_and_examples() -> None:
    task = digits_like()
    net = task.model()
    seen = flow(net, task)
    assert isinstance(seen, Flow)
    assert seen.outputs["0"].shape == (1, 40, 6)
    assert flow(net, task, Data.of(task.train).head(5)).outputs["0"].shape == (1, 5, 6)
    assert "layers: 0, 1" in repr(seen)
