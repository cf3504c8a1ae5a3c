"""Random networks against torch modules, and their two passes against autograd through those."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from losslab.layers import xavier
from losslab.lecture.section_6_5.networks import drawn, forward, gaussian_rows, passage, units


def test_passes_are_those_of_modules() -> None:
    widths = (5, 7, 4, 3)
    weights = [w.double() for w in drawn(xavier(), widths, draws=2)]
    x, top = gaussian_rows(6, 5).double(), gaussian_rows(2, 6, 3, seed=1).double()
    passed = passage(weights, x, top, torch.tanh)
    for draw in range(2):
        layers = [nn.Linear(i, o, bias=False).double() for i, o in pairwise(widths)]
        outputs = []
        a = x
        for layer, w in zip(layers, weights, strict=True):
            with torch.no_grad():
                layer.weight.copy_(w[draw])
            h = layer(a)
            h.retain_grad()
            outputs.append(h)
            a = h.tanh()
        outputs[-1].backward(top[draw])
        for k, (h, layer) in enumerate(zip(outputs, layers, strict=True)):
            assert torch.allclose(passed.ahead[k][draw], h.detach(), rtol=1e-12)
            assert torch.allclose(passed.back[k][draw], h.grad, rtol=1e-12)
            assert torch.allclose(passed.weights[k][draw], layer.weight.grad, rtol=1e-12)
    linear = forward(weights, x)[-1][0]
    assert torch.allclose(linear, x @ (weights[2] @ weights[1] @ weights[0])[0].T)


def test_draws_are_their_own_and_repeat() -> None:
    state = torch.get_rng_state()
    a, b, more = drawn(xavier(), (4, 3), 2), drawn(xavier(), (4, 3), 2), drawn(xavier(), (4, 3), 3)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[0], more[0][:2])
    assert not torch.equal(a[0][0], a[0][1])
    assert not torch.equal(a[0], drawn(xavier(), (4, 3), 2, seed=1)[0])
    assert units(xavier(), 4, 9, torch.Generator()).shape == (9, 4)
    assert torch.equal(state, torch.get_rng_state())
