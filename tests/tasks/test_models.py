from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from losslab.errors import LosslabError
from losslab.tasks import (
    ACTIVATIONS,
    MODELS,
    Factory,
    conv2,
    conv4,
    conv6,
    lenet_300_100,
    linear_net,
    linear_resnet,
    logistic_regression,
    mlp,
    resnet20,
    vgg,
    vgg11,
    vgg13,
)
from losslab.tasks.models import ResidualBlock

IMAGE = (3, 32, 32)

# factory, shape of an input, outputs, all parameters, weights (tensors of two or more axes)
CASES = [
    (mlp(64, 32, 10), (64,), 10, 2410, 2368),
    (mlp(4, 5, 6, 2, bias=False), (4,), 2, 62, 62),
    (mlp(4, 5, 2, batch_norm=True), (4,), 2, 20 + 10 + 12, 30),
    (mlp(4, 2), (4,), 2, 10, 8),
    (linear_net(3, 5, 2), (3,), 2, 25, 25),
    (linear_resnet(4, 3, scale=0.1), (4,), 4, 48, 48),
    (lenet_300_100(), (784,), 10, 266_610, 266_200),
    (logistic_regression(64, 10), (64,), 10, 650, 640),
    (conv2(), IMAGE, 10, 4_300_992 + 128 + 522, 4_300_992),
    (conv4(), IMAGE, 10, 2_425_024 + 384 + 522, 2_425_024),
    (conv6(), IMAGE, 10, 2_261_184 + 896 + 522, 2_261_184),
    (
        conv2(channels=1, size=8, classes=3),
        (1, 8, 8),
        3,
        None,
        9 * 64 + 9 * 64**2 + 1024 * 256 + 256**2 + 768,
    ),
    (resnet20(), IMAGE, 10, 269_722, 268_336),
    (resnet20(batch_norm=False), IMAGE, 10, 269_034, 268_336),
    (resnet20(width=8), IMAGE, 10, 67_352 + 2 * 344 + 10, 67_352),
    (resnet20(channels=1, classes=5), (1, 28, 28), 5, None, 268_336 - 288 - 320),
    (vgg(2, 2, 2, width=8, channels=1, size=8), (1, 8, 8), 10, 18_370, 18_248),
    (vgg(1, 3, width=4, size=8, classes=3, batch_norm=True), (3, 8, 8), 3, None, 108 + 288 + 2 * 576 + 96),
    (vgg11(), IMAGE, 10, 9_225_610, 9_222_848),
    (vgg11(batch_norm=True), IMAGE, 10, 9_222_848 + 2 * 2752 + 10, 9_222_848),
    (vgg13(), IMAGE, 10, 9_410_122, 9_407_168),
]


@pytest.mark.parametrize(("factory", "shape", "outputs", "parameters", "weights"), CASES, ids=repr)
def test_shapes_and_counts(
    factory: Factory, shape: tuple[int, ...], outputs: int, parameters: int | None, weights: int
) -> None:
    model = factory()
    assert model(torch.randn(2, *shape)).shape == (2, outputs)
    counts = [(p.ndim, p.numel()) for p in model.parameters()]
    assert sum(n for ndim, n in counts if ndim > 1) == weights
    assert parameters is None or sum(n for _, n in counts) == parameters


@pytest.mark.parametrize(
    "factory",
    [case[0] for case in CASES if not repr(case[0]).startswith(("conv", "vgg(1, 1", "vgg(2, 2, 2, 2"))],
    ids=repr,
)
def test_each_model_runs_stacked(factory: Factory) -> None:
    shape = next(case[1] for case in CASES if case[0] is factory)
    models = [factory() for _ in range(2)]
    x = torch.randn(4, *shape)
    weights, buffers = torch.func.stack_module_state(models)
    shell = copy.deepcopy(models[0]).to("meta")
    stacked = torch.func.vmap(lambda w, b: torch.func.functional_call(shell, (w, b), (x,)))(weights, buffers)
    alone = torch.stack([model(x) for model in models])
    torch.testing.assert_close(stacked, alone, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5), st.sampled_from(sorted(ACTIVATIONS)), st.booleans()
)
def test_mlp_is_its_equation(widths: list[int], activation: str, bias: bool) -> None:
    model = mlp(*widths, activation=activation, bias=bias)().double()
    x = torch.randn(3, widths[0], dtype=torch.float64)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert len(linear) == len(widths) - 1
    h = x
    for number, layer in enumerate(linear):
        h = torch.stack([layer.weight @ row + (layer.bias if bias else 0) for row in h])
        if number < len(linear) - 1:
            h = ORACLES[activation](h)
    torch.testing.assert_close(model(x), h)


ORACLES = {
    "relu": lambda x: x * (x > 0),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "softsign": lambda x: x / (1 + x.abs()),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + (-x).exp()),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "identity": lambda x: x,
    "lecun_tanh": lambda x: 1.7159 * torch.tanh(2 * x / 3),
}


def test_every_activation_has_an_oracle() -> None:
    assert ORACLES.keys() == ACTIVATIONS.keys()


def test_lecun_tanh_maps_one_to_one() -> None:
    one = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(ACTIVATIONS["lecun_tanh"]()(one), one, rtol=0, atol=1e-5)


def test_dropout_and_batch_norm_stand_where_the_page_says() -> None:
    kinds = [type(layer).__name__ for layer in mlp(4, 5, 2, batch_norm=True, dropout=0.2)()]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert mlp(4, 5, 2, batch_norm=True)()[0].bias is None


def test_linear_models_are_products_of_matrices() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    chain = linear_net(4, 7, 3)().double()
    torch.testing.assert_close(chain(x), x @ (chain[1].weight @ chain[0].weight).T)
    residual = linear_resnet(4, 3, scale=0.5)().double()
    product = torch.eye(4, dtype=torch.float64)
    for block in residual:
        product = (torch.eye(4, dtype=torch.float64) + block.linear.weight) @ product
    torch.testing.assert_close(residual(x), x @ product.T)
    assert torch.equal(linear_resnet(4, 3)().double()(x), x)


def test_linear_resnet_starts_at_its_scale() -> None:
    torch.manual_seed(0)
    largest = [
        torch.linalg.matrix_norm(b.linear.weight, 2).item() for b in linear_resnet(200, 3, scale=0.3)()
    ]
    assert largest == pytest.approx([0.6] * 3, rel=0.1)


def test_the_residual_shortcut_subsamples_and_pads() -> None:
    block = ResidualBlock(2, 4, batch_norm=True)
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, [0, 2]][:, :, :, [0, 2]])
    assert torch.equal(y[:, 2:], torch.zeros(1, 2, 2, 2))


def test_vgg_halves_after_each_stage_and_doubles_up_to_eight_times() -> None:
    layers = vgg(1, 2, 1, 1, 1, width=2, size=32)()
    seen, x = [], torch.randn(2, 3, 32, 32)
    for layer in layers:
        x = layer(x)
        seen += [tuple(x.shape[1:])] if isinstance(layer, nn.MaxPool2d) else []
    assert seen == [(2, 16, 16), (4, 8, 8), (8, 4, 4), (16, 2, 2), (16, 1, 1)]
    kinds = [type(layer).__name__ for layer in vgg(1, width=2, size=2, batch_norm=True)()]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Flatten", "Linear"]
    assert vgg(1, width=2, size=2, batch_norm=True)()[0].bias is None


def test_factories_print_compare_and_draw_fresh_weights() -> None:
    factory = mlp(3, 4, 2, activation="tanh")
    assert repr(factory) == "mlp(3, 4, 2, activation='tanh', bias=True, batch_norm=False, dropout=0.0)"
    assert factory == mlp(3, 4, 2, activation="tanh", bias=True)
    assert factory != mlp(3, 4, 2)
    assert not torch.equal(factory()[0].weight, factory()[0].weight)
    assert repr(conv4(size=16)) == "conv4(channels=3, size=16, classes=10)"
    double = factory.to(torch.float64)
    assert double()[0].weight.dtype == torch.float64
    assert double != factory
    assert all(name == maker.__name__ for name, maker in MODELS.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(3), r"mlp got the sizes \(3,\): pass at least two"),
        (lambda: mlp(3, 0, 2), "positive whole numbers"),
        (lambda: mlp(3, 2.5), "positive whole numbers"),
        (lambda: mlp(3, 2, activation="rellu"), "no activation is named 'rellu': did you mean 'relu'"),
        (lambda: mlp(3, 2, dropout=1.0), "dropout is 1.0"),
        (lambda: linear_net(3), "linear_net got the sizes"),
        (lambda: linear_resnet(3, 0), "linear_resnet got the sizes"),
        (lambda: linear_resnet(3, 1, scale=-1.0), "scale is -1.0"),
        (lambda: logistic_regression(0, 2), "logistic_regression got the sizes"),
        (lambda: conv6(size=12), "conv6 halves the image 3 times, size is 12: pass a multiple of 8"),
        (lambda: conv2(classes=0), "conv2 got the sizes"),
        (lambda: resnet20(classes=0), "resnet20 got the sizes"),
        (lambda: vgg(), "vgg got the sizes"),
        (lambda: vgg(2, 0), "vgg got the sizes"),
        (lambda: vgg(1, 1, 1, size=12), "vgg halves the image 3 times, size is 12: pass a multiple of 8"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(LosslabError, match=message):
        make()  # type: ignore[operator]
