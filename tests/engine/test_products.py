"""Large products: the values and every derivative of ordinary linear layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from losslab.engine import products
from losslab.engine.products import LargeProducts, Product

# Torch's own forward mode warns of its own scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

CALLS = {
    "value": lambda f, x, w, b, v: f(x, w, b),
    "gradient": lambda f, x, w, b, v: torch.func.grad(lambda *a: f(*a).tanh().sum(), (0, 1, 2))(x, w, b),
    "jvp": lambda f, x, w, b, v: torch.func.jvp(f, (x, w, b), v)[1],
    "jvp of the weight": lambda f, x, w, b, v: torch.func.jvp(lambda w: f(x, w, b), (w,), (v[1],))[1],
    "jvp of the bias": lambda f, x, w, b, v: torch.func.jvp(lambda b: f(x, w, b), (b,), (v[2],))[1],
    "hvp": lambda f, x, w, b, v: torch.func.jvp(
        torch.func.grad(lambda *a: f(*a).tanh().sum(), (0, 1, 2)), (x, w, b), v
    )[1],
    "hvp in reverse": lambda f, x, w, b, v: torch.func.vjp(
        torch.func.grad(lambda *a: f(*a).tanh().sum(), (0, 1, 2)), x, w, b
    )[1](v),
    "vmap over inputs": lambda f, x, w, b, v: torch.func.vmap(f, (0, None, None))(
        torch.stack([x, v[0]]), w, b
    ),
    "vmap over weights": lambda f, x, w, b, v: torch.func.vmap(f, (None, 0, None))(
        x, torch.stack([w, v[1]]), b
    ),
    "vmap over all": lambda f, x, w, b, v: torch.func.vmap(f, (0, 0, 0))(
        *(torch.stack([t, s]) for t, s in zip((x, w, b), v, strict=True))
    ),
    "vmap of gradients": lambda f, x, w, b, v: torch.func.vmap(
        lambda w, b: torch.func.grad(lambda *a: f(*a).tanh().sum(), (0, 1, 2))(x, w, b)
    )(torch.stack([w, v[1]]), torch.stack([b, v[2]])),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("large", [True, False])
def test_product_is_a_linear_layer(call, large, monkeypatch):
    if large:
        monkeypatch.setattr(products, "LARGE", 1)
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g) for s in ((6, 5), (4, 5), (4,)))
    v = tuple(torch.randn(t.shape, generator=g) for t in (x, w, b))
    told, wanted = call(Product.apply, x, w, b, v), call(F.linear, x, w, b, v)
    for mine, theirs in zip(*((t,) if torch.is_tensor(t) else t for t in (told, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_and_gradients_of_gradients_in_double_precision():
    g = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (2, 4), (2,))
    )
    assert torch.autograd.gradcheck(Product.apply, (x, w, b), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(Product.apply, (x, w, b), check_fwd_over_rev=True)


def test_only_large_linear_layers_are_taken_over(monkeypatch):
    taken = []
    monkeypatch.setattr(products, "by_onednn", lambda a, b, bias=None: taken.append(1) or a @ b.T + bias)
    w, b = torch.ones(128, 128), torch.zeros(128)
    with LargeProducts():
        for x, count in (
            (torch.ones(64, 128), 1),
            (torch.ones(8, 8, 128), 2),
            (torch.ones(2, 128), 2),
        ):
            y = F.linear(x, w, b)
            assert y.shape == (*x.shape[:-1], 128)
            assert float(y.flatten()[0]) == 128
            assert len(taken) == (count if products.available(w) else 0)
        F.linear(torch.ones(64, 128, dtype=torch.float64), w.double(), b.double())
    assert LargeProducts.pay([w]) == products.available(w)
    assert not LargeProducts.pay([torch.ones(8, 8), b])
