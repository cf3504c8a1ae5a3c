"""Moments, intervals and torch's own numbers for every initialisation; LSUV on networks of many kinds."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from losslab.engine import train
from losslab.errors import LosslabError
from losslab.layers import (
    InitialisationNotice,
    gain_of,
    gaussian,
    he,
    he_uniform,
    lecun,
    lecun_uniform,
    lsuv,
    orthogonal,
    standard,
    xavier,
    xavier_uniform,
)
from losslab.layers.initialisation import GAINS, Initialisation, fans
from losslab.signals.mean_field import preserving_gain
from losslab.tasks import ACTIVATIONS, conv4, linear_resnet, mlp, resnet20, supervised

SCALED = {  # name -> (made with a gain, variance of a weight at gain 1, uniform)
    "lecun": (lecun, lambda i, o: 1 / i, False),
    "lecun_uniform": (lecun_uniform, lambda i, o: 1 / i, True),
    "xavier": (xavier, lambda i, o: 2 / (i + o), False),
    "xavier_uniform": (xavier_uniform, lambda i, o: 2 / (i + o), True),
    "he": (he, lambda i, o: 1 / i, False),
    "he_uniform": (he_uniform, lambda i, o: 1 / i, True),
    "standard": (standard, lambda i, o: 1 / (3 * i), True),
}
LAYERS = [
    nn.Linear(300, 150),
    nn.Linear(40, 900),
    nn.Conv1d(16, 60, 5),
    nn.Conv2d(12, 40, 3, stride=2),
    nn.Conv2d(24, 48, 3, groups=4),
    nn.Conv3d(5, 30, 3),
    nn.ConvTranspose2d(20, 30, 3),
]


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def drawn(init: Initialisation, layer: nn.Module, seed: int = 0) -> Tensor:
    return init.apply(copy.deepcopy(layer), seeded(seed)).weight.detach().double()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_mean_variance_and_shape_of_the_draws(name: str, layer: nn.Module) -> None:
    make, variance, uniform = SCALED[name]
    wanted = 0.7**2 * variance(*fans(layer))
    weight = drawn(make(gain=0.7), layer)
    n = weight.numel()
    kurtosis = 1.8 if uniform else 3.0
    assert abs(weight.mean()) < 5 * math.sqrt(wanted / n)
    assert weight.var() / wanted == pytest.approx(1, abs=5 * math.sqrt((kurtosis - 1) / n))
    if uniform:
        end = math.sqrt(3 * wanted)
        assert -end <= weight.min() < -0.99 * end
        assert 0.99 * end < weight.max() <= end * (1 + 1e-6)
    else:
        assert weight.abs().max() > 3 * math.sqrt(wanted)


@pytest.mark.parametrize(
    ("init", "theirs"),
    [
        (xavier(), nn.init.xavier_normal_),
        (xavier_uniform(), nn.init.xavier_uniform_),
        (xavier(gain=5 / 3), lambda w, generator: nn.init.xavier_normal_(w, 5 / 3, generator)),
        (he(), lambda w, generator: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=generator)),
        (
            he_uniform(),
            lambda w, generator: nn.init.kaiming_uniform_(w, nonlinearity="relu", generator=generator),
        ),
        (standard(), lambda w, generator: nn.init.kaiming_uniform_(w, a=5**0.5, generator=generator)),
        (orthogonal(1.3), lambda w, generator: nn.init.orthogonal_(w, 1.3, generator)),
        (gaussian(0.2), lambda w, generator: nn.init.normal_(w, 0.0, 0.2, generator)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", [nn.Linear(30, 20), nn.Conv2d(6, 4, 3)], ids=str)
def test_equal_to_torch_where_they_coincide(init: Initialisation, theirs, layer: nn.Module) -> None:
    theirs(layer.weight, generator=seeded(5))
    assert torch.allclose(drawn(init, layer, 5), layer.weight.detach().double(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (12, 12)])
def test_orthogonal_rows_or_columns(shape: tuple[int, int]) -> None:
    weight = drawn(orthogonal(2.0), nn.Linear(*shape, dtype=torch.float64))
    product = weight @ weight.T if len(weight) <= shape[0] else weight.T @ weight
    assert torch.allclose(product, 4 * torch.eye(min(shape), dtype=torch.float64), atol=1e-12)


def test_the_corrected_interval_has_the_variance_of_the_normal_form() -> None:
    a = math.sqrt(6) / math.sqrt(784 + 100)
    assert a**2 / 3 == pytest.approx(2 / 884)
    weight = drawn(xavier_uniform(), nn.Linear(784, 100))
    assert weight.min() < -0.999 * a
    assert weight.max() > 0.999 * a


def test_fans_count_the_uses_of_an_input() -> None:
    """The gradient of the summed outputs with unit weights counts them, away from the borders."""
    for layer in (nn.Conv2d(4, 6, 3, padding=2, groups=2), nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2)):
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.zero_()
        x = torch.ones(1, 4, 9, 9, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert fans(layer) == (y[0, 0, 4, 4].item(), x.grad[0, 0, 4, 4].item())


# -- gains ---------------------------------------------------------------------------------------------


def test_gains_of_torch() -> None:
    for name in ("tanh", "relu", "sigmoid", "linear", "leaky_relu"):
        assert gain_of(name) == pytest.approx(nn.init.calculate_gain(name))
    assert set(ACTIVATIONS) <= set(GAINS)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "softsign", "gelu", "silu", "elu", "identity"])
def test_gains_that_keep_unit_variance(name: str) -> None:
    assert gain_of(name) == pytest.approx(preserving_gain(name), abs=6e-5)


# -- whole networks ------------------------------------------------------------------------------------


def test_apply_touches_weights_and_biases_of_linear_and_convolutional_layers_only() -> None:
    network = resnet20()()
    before = copy.deepcopy(network.state_dict())
    assert xavier().apply(network, seeded()) is network
    for name, value in network.state_dict().items():
        layer = network.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert not torch.equal(value, before[name])
            assert "bias" not in name or not value.any()
        else:
            assert torch.equal(value, before[name])


def test_generators_and_the_global_state() -> None:
    a, b = (xavier().apply(mlp(5, 4, 3)(), seeded(1)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    state = torch.get_rng_state()
    xavier().apply(a, seeded(2))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    xavier().apply(a)
    assert torch.equal(a[0].weight, xavier().apply(mlp(5, 4, 3)(), seeded(7))[0].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept(dtype: torch.dtype) -> None:
    network = he().apply(mlp(5, 4, 3)().to(dtype), seeded())
    assert {p.dtype for p in network.parameters()} == {dtype}
    short = he().apply(mlp(5, 4, 3)(), seeded())[0].weight
    if dtype != torch.float64:
        assert torch.equal(network[0].weight, short.to(dtype))


def test_shared_weights_are_drawn_once() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    network = nn.Sequential(a, b, nn.Linear(4, 2))
    xavier().apply(network, seeded())
    assert b.weight is a.weight
    g = seeded()
    assert torch.equal(a.weight, xavier().apply(nn.Linear(4, 4), g).weight)
    assert torch.equal(network[2].weight, xavier().apply(nn.Linear(4, 2), g).weight)


def test_members_of_a_population_start_as_alone() -> None:
    x = torch.randn(12, 5, generator=seeded())
    task = supervised(gaussian(0.3).on(mlp(5, 4, 3)), train=(x, torch.arange(12) % 3))
    together = train(task, "sgd", seeds=[3, 8], steps=0, progress=False)
    alone = train(task, "sgd", seeds=[8], steps=0, progress=False)
    assert torch.equal(together.points["0.weight"][1], alone.points["0.weight"][0])
    assert not torch.equal(together.points["0.weight"][0], together.points["0.weight"][1])
    assert not together.points["0.bias"].any()


def test_values_print_and_compare() -> None:
    assert repr(xavier().on(mlp(4, 3, 2))).startswith("xavier().on(mlp(4, 3, 2,")
    assert [str(i) for i in (he(), he(gain=1.0), lecun(2.0), gaussian(0.01), orthogonal())] == [
        "he()", "he(gain=1)", "lecun(gain=2)", "gaussian(0.01)", "orthogonal()",
    ]  # fmt: skip
    assert lecun() == lecun()
    assert lecun() != lecun(2.0)


# -- LSUV ----------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Layers used in another order than defined, changed in place, and dropped out."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(9, 3), nn.Linear(9, 9), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.first(x))
        return self.last(F.dropout(F.relu_(self.middle(y)), 0.0, self.training))


def outputs(network: nn.Module, x: Tensor) -> list[float]:
    found = []
    hooks = [
        m.register_forward_hook(lambda _m, _i, y: found.append(float(y.detach().std(correction=0))))
        for m in network.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        network.train()(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("gain", [1.0, 0.3])
@pytest.mark.parametrize("start", [None, gaussian(1e-4), he()], ids=str)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (mlp(6, 20, 20, 20, 3, activation="tanh"), (6,)),
        (mlp(6, 20, 20, 3, activation="sigmoid", dropout=0.4), (6,)),
        (mlp(6, 20, 20, 3, batch_norm=True), (6,)),
        (conv4(1, 8), (1, 8, 8)),
        (resnet20(channels=1, batch_norm=False), (1, 8, 8)),
        (linear_resnet(6, 3, 0.5), (6,)),
        (Functional, (6,)),
    ],
    ids=str,
)
def test_lsuv_gives_every_layer_the_wanted_spread(make, shape, start, gain) -> None:
    x = torch.randn(16, *shape, generator=seeded(1))
    network = lsuv(x, gain=gain, start=start).apply(make().eval(), seeded(2))
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    found = outputs(network, x)
    assert found == pytest.approx([gain] * len(found), rel=1.1e-3)


def test_lsuv_leaves_everything_else_alone() -> None:
    network = mlp(6, 20, 20, 3, batch_norm=True, dropout=0.5)().eval()
    buffers = copy.deepcopy(dict(network.named_buffers()))
    x = torch.randn(16, 6, generator=seeded(1), dtype=torch.float64)
    state = torch.get_rng_state()
    lsuv(x).apply(network, seeded())
    assert torch.equal(state, torch.get_rng_state())
    assert not network.training
    assert all(torch.equal(b, buffers[n]) for n, b in network.named_buffers())
    assert all(not m._forward_hooks for m in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_lsuv_says_what_it_could_not_do() -> None:
    with pytest.warns(InitialisationNotice, match=r"the output of '0' has 0"):
        lsuv(torch.zeros(5, 6)).apply(mlp(6, 4, 2)(), seeded())
    with pytest.raises(LosslabError, match="lsuv's batch is empty: pass at least one example"):
        lsuv(torch.zeros(0, 6))
    network = Functional()
    network.spare = nn.Linear(2, 2)
    with pytest.warns(InitialisationNotice, match="'spare' is not used"):
        lsuv(torch.randn(5, 6, generator=seeded())).apply(network, seeded())
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    tied = nn.Sequential(a, nn.Tanh(), b)
    with pytest.warns(InitialisationNotice, match="the output of '0'"):
        lsuv(torch.randn(50, 6, generator=seeded()), rounds=1).apply(tied, seeded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsuv(torch.randn(5, 6, generator=seeded())).apply(mlp(6, 4, 2)(), seeded())


# -- errors --------------------------------------------------------------------------------------------


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: xavier().apply(nn.ReLU()), "ReLU has no linear or convolutional layer"),
        (lambda: xavier().apply(nn.LazyLinear(3)), "is lazy"),
        (lambda: xavier().apply(parametrised()), "computed from other parameters"),
        (lambda: lecun(-1.0), "gain is -1.0"),
        (lambda: gaussian(math.nan), "std is nan"),
        (lambda: gain_of("relo"), "did you mean 'relu'"),
        (lambda: lsuv(torch.ones(2, 3), tolerance=0.0), "tolerance is 0.0"),
        (lambda: lsuv(torch.ones(2, 3), rounds=0), "rounds 0"),
        (lambda: lsuv(torch.ones(2, 3)).apply(nn.Linear(4, 2)), "cannot be called with lsuv's batch"),
        (lambda: lsuv(torch.full((2, 3), math.inf)).apply(nn.Linear(3, 2)), "4 of 4 outputs of layer ''"),
    ],
)
def test_errors(call, told: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules")
        with pytest.raises(LosslabError, match=told):
            call()
