"""Batch norm against torch's, against its equations, and against hand-written backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from losslab.errors import LosslabError
from losslab.layers import BatchNorm

SHAPES = [(7, 3), (5, 3, 4), (4, 3, 2, 5), (3, 2, 2, 3, 2)]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    {"momentum": None},
    {"ghost": 2},
    {"ghost": 3, "momentum": None},
    {"detach": True},
    {"statistics": "frozen"},
    {"eps": 0.0},
]
shapes = st.tuples(st.integers(2, 9), st.integers(1, 5), *[st.integers(1, 3)] * 2).map(
    lambda s: s[:2] if s[3] == 1 else s
)


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64) * 2 + 3


def torchs(shape: tuple[int, ...], **options: Any) -> nn.Module:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return kinds[len(shape)](shape[1], **options).double()


def pair(shape: tuple[int, ...], **options: Any) -> tuple[BatchNorm, nn.Module]:
    """Ours and torch's with the same random weights, by way of the state dict."""
    ours, theirs = BatchNorm(shape[1], **options).double(), torchs(shape, **options)
    with torch.no_grad():
        for i, p in enumerate(ours.parameters()):
            p.copy_(draw(p.shape, 10 + i))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(layer: nn.Module, x: Tensor, seed: int = 5) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return list(torch.autograd.grad((y * draw(y.shape, seed)).sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.3, "eps": 1e-2}, {"momentum": None}, {"affine": False}], ids=str
)
def test_equals_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    ours, theirs = pair(shape, **options)
    for step in range(3):
        x = draw(shape, step)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(ours, x), gradients(theirs, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-12, atol=1e-12)
    assert ours.num_batches_tracked.item() == 6
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 3)], ids=str)
def test_gradients_equal_finite_differences(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    layer = BatchNorm(shape[1], **options).double()
    x = draw(shape).requires_grad_()
    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        held = {n: w for (n, _), w in zip(layer.named_parameters(), weights, strict=True)}
        frozen = {n: b.clone() for n, b in layer.named_buffers()}
        return torch.func.functional_call(layer, held | frozen, (x,))

    if options.get("detach"):  # the gradient of the input is meant to be another one
        assert torch.autograd.gradcheck(lambda *w: call(x.detach(), *w), weights)
        assert not torch.autograd.gradcheck(call, (x, *weights), raise_exception=False)
    else:
        assert torch.autograd.gradcheck(call, (x, *weights))


@given(shape=shapes, seed=st.integers(0, 99), ghost=st.sampled_from([None, 2, 4]))
def test_moments_of_the_output(shape: tuple[int, ...], seed: int, ghost: int | None) -> None:
    """Mean beta and standard deviation |gamma| sqrt(var / (var + eps)), group by group."""
    if ghost and shape[0] % ghost:
        shape = (ghost * 2, *shape[1:])
    layer = BatchNorm(shape[1], eps=0.1, ghost=ghost).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(seed + 1))
    x = draw(shape, seed)
    y = layer(x).detach()
    for a, b in zip(x.split(ghost or shape[0]), y.split(ghost or shape[0]), strict=True):
        axes = (0, *range(2, x.dim()))
        var = a.var(axes, correction=0)
        assert torch.allclose(b.mean(axes), layer.bias.detach(), atol=1e-12)
        wanted = layer.weight.detach().abs() * (var / (var + 0.1)).sqrt()
        assert torch.allclose(b.std(axes, correction=0), wanted, atol=1e-12)


@given(shape=shapes, seed=st.integers(0, 99), plain=st.booleans())
def test_backward_projects_out_the_constant_and_the_normalised_input(
    shape: tuple[int, ...], seed: int, plain: bool
) -> None:
    """grad_x = gamma / sigma (g - mean(g) - x_hat mean(x_hat g)), with eps in sigma and x_hat."""
    layer = BatchNorm(shape[1], eps=1e-3, momentum=0.1 if plain else None).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    x, g = draw(shape, seed).requires_grad_(), draw(shape, seed + 1)
    (found,) = torch.autograd.grad((layer(x) * g).sum(), [x])
    axes = (0, *range(2, x.dim()))
    free = x.detach()
    sigma = (free.var(axes, correction=0, keepdim=True) + 1e-3).sqrt()
    hat = (free - free.mean(axes, keepdim=True)) / sigma
    gamma = layer.weight.detach().reshape(-1, *[1] * (x.dim() - 2))
    inner = g - g.mean(axes, keepdim=True) - hat * (hat * g).mean(axes, keepdim=True)
    assert torch.allclose(found, gamma / sigma * inner, atol=1e-9 * float((gamma / sigma).abs().max()))
    scale = float((gamma / sigma * g).abs().sum())
    assert float(found.sum(axes).abs().max()) < 1e-10 * scale


@given(shape=shapes, seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_the_scale_of_the_weights_before_does_not_matter(
    shape: tuple[int, ...], seed: int, scale: float
) -> None:
    """BN(a W u) = BN(W u), d/d(aW) = 1/a d/dW, at eps = 0."""
    layer = BatchNorm(3, eps=0.0).double()
    u = draw((shape[0] + 2, shape[1] + 1), seed) - 3
    w, g = draw((shape[1] + 1, 3), seed + 1) - 3, draw((shape[0] + 2, 3), seed + 2)
    results = []
    for a in (1.0, scale):
        leaf = (a * w).requires_grad_()
        y = layer(u @ leaf)
        results.append((y.detach(), a * torch.autograd.grad((y * g).sum(), leaf)[0]))
    (y1, g1), (y2, g2) = results
    assert torch.allclose(y1, y2, atol=1e-9)
    assert torch.allclose(g1, g2, rtol=1e-7, atol=1e-7 * float(g1.abs().max()))


@pytest.mark.parametrize("momentum", [0.2, None])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((8, 3), 4),
        ((11, 3), 4),
        ((9, 3), [4, 5]),
        ((5, 3), 5),
        ((8, 3, 2, 2), 4),
        ((9, 3, 2), 4),
        ((3, 3), 4),
    ],
    ids=str,
)
def test_ghost_batches_equal_separate_calls(
    momentum: float | None, shape: tuple[int, ...], groups: int | list[int]
) -> None:
    ghost, apart = (BatchNorm(3, momentum=momentum, ghost=g).double() for g in (4, None))
    for step in range(2):
        x = draw(shape, step)
        wanted = torch.cat([apart(part) for part in x.split(groups)])
        torch.testing.assert_close(ghost(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(ghost.state_dict()), dict(apart.state_dict()), rtol=1e-12, atol=1e-12)


def test_a_group_larger_than_the_batch_is_the_batch() -> None:
    x = draw((5, 3))
    torch.testing.assert_close(BatchNorm(3, ghost=64).double()(x), BatchNorm(3).double()(x))


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2)], ids=str)
def test_detached_statistics_are_constants_in_the_backward_pass(shape: tuple[int, ...]) -> None:
    layer, plain = (BatchNorm(3, detach=d).double() for d in (True, False))
    x, g = draw(shape).requires_grad_(), draw(shape, 1)
    y = layer(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-12, atol=1e-12)
    sigma = (x.detach().var((0, *range(2, x.dim())), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(torch.autograd.grad((y * g).sum(), x)[0], g / sigma, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(layer.state_dict()), dict(plain.state_dict()))


def test_frozen_statistics_are_used_and_left_alone() -> None:
    layer = BatchNorm(3).double()
    layer(draw((6, 3)))
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.statistics = "frozen"
    x = draw((1, 3), 4)  # one example is enough
    y = layer.train()(x)
    torch.testing.assert_close(y, (x - before["running_mean"]) / (before["running_var"] + 1e-5).sqrt())
    assert all(torch.equal(before[n], t) for n, t in layer.state_dict().items())


def test_second_derivatives_exist_in_every_variant() -> None:
    for options in VARIANTS:
        layer = BatchNorm(2, **options).double()
        x = draw((6, 2)).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.isfinite(second).all()


def test_float32_is_as_good_as_torchs_far_from_zero() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 1000
    exact = nn.BatchNorm1d(3).double()(x.double())
    for layer in (BatchNorm(3), BatchNorm(3, momentum=None), BatchNorm(3, ghost=64)):
        assert float((layer(x).double() - exact).detach().abs().max()) < 2e-3


MISTAKES: list[tuple[dict[str, Any], tuple[int, ...], str]] = [
    ({}, (1, 3), "a batch of 1 in training mode, one value a channel"),
    ({}, (1, 3, 1), "pass two examples or more"),
    ({}, (5, 4), r"input of shape \(5, 4\), wanted \[batch, 3\]"),
    ({}, (5,), r"wanted \[batch, 3\]"),
    ({"ghost": 4}, (1, 3), "a batch of 1 in training mode"),
    ({"ghost": 1}, (5, 3), r"groups of one \(ghost=1\)"),
]


@pytest.mark.parametrize(("options", "shape", "told"), MISTAKES, ids=str)
def test_bad_input_is_told(options: dict[str, Any], shape: tuple[int, ...], told: str) -> None:
    layer = BatchNorm(3, **options).double()
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    with pytest.raises(LosslabError, match=told):
        layer(draw(shape))
    assert all(torch.equal(before[n], t) for n, t in layer.state_dict().items())


def test_one_example_with_positions_has_a_variance() -> None:
    x = draw((1, 3, 4))
    torch.testing.assert_close(BatchNorm(3).double()(x), torchs(x.shape)(x))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"features": 0}, "features is 0"),
        ({"features": 2.0}, "features is 2.0"),
        ({"eps": -1.0}, "pass eps >= 0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"statistics": "batches"}, "did you mean 'batch'"),
        ({"ghost": 0}, "ghost is 0"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        BatchNorm(**{"features": 3, **options})


def test_it_prints_what_differs_from_the_defaults() -> None:
    assert repr(BatchNorm(3)) == "BatchNorm(3)"
    assert repr(BatchNorm(3, ghost=4, momentum=None)) == "BatchNorm(3, momentum=None, ghost=4)"
