"""The gradient-defined covariate shift against its definition, layer by layer with deep copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.engine import Points, train
from losslab.errors import LosslabError
from losslab.signals import gradient_shift
from losslab.tasks import conv2, linear_net, mlp, supervised


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(9, *shape, generator=g).double(), torch.randint(3, (9,), generator=g)


def gradients(module: nn.Module, given: Any) -> dict[str, Tensor]:
    module = copy.deepcopy(module).train()
    names, weights = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(entropy(module, given), weights), strict=True))


def by_definition(module: nn.Module, after: nn.Module, given: Any) -> dict[str, tuple[float, float, float]]:
    """Layer -> ||G - G'||, cosine, ||G||."""
    owners = list(dict.fromkeys(n.rpartition(".")[0] for n, _ in module.named_parameters()))
    now, found = gradients(module, given), {}
    for i, owner in enumerate(owners):
        mixed = copy.deepcopy(module)
        for before in owners[:i]:
            mixed.get_submodule(before).load_state_dict(after.get_submodule(before).state_dict())
            for name, buffer in mixed.get_submodule(before).named_buffers():
                buffer.copy_(module.get_submodule(before).get_buffer(name))
        then = gradients(mixed, given)
        g, h = (torch.cat([t[n].flatten() for n in t if n.rpartition(".")[0] == owner]) for t in (now, then))
        found[owner] = ((g - h).norm().item(), (g @ h / (g.norm() * h.norm())).item(), g.norm().item())
    return found


NETS = {
    "mlp": (mlp(4, 6, 5, 3, activation="tanh"), (4,)),
    "bn": (mlp(4, 6, 5, 3, batch_norm=True), (4,)),
    "linear": (linear_net(4, 5, 5, 5, 3), (4,)),
    "conv": (conv2(2, 4, 3), (2, 4, 4)),
}


@pytest.mark.parametrize("name", NETS)
def test_as_defined(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    net, given = make().double(), batch(*shape)
    after = copy.deepcopy(net)
    step = gradients(net, given)
    with torch.no_grad():
        for n, p in after.named_parameters():
            p -= 0.3 * step[n]
    wanted = by_definition(net, after, given)
    kept = copy.deepcopy(net.state_dict())
    for found in (
        gradient_shift(net, after, entropy, given),
        gradient_shift(net, Points.from_modules([after]), entropy, given),
        gradient_shift(net, loss=entropy, batch=given, lr=0.3),
    ):
        assert found.layers == tuple(wanted)
        for i, layer in enumerate(found.layers):
            got = [t[i, 0].item() for t in (found.difference, found.cosine, found.norm)]
            assert got == pytest.approx(wanted[layer], rel=1e-8, abs=1e-13)
    assert found.difference[0, 0] == 0
    assert found.difference[-1, 0] > 0
    assert all(torch.equal(net.state_dict()[n], t) for n, t in kept.items())


def test_members_have_rates_and_batches_of_their_own() -> None:
    make, shape = NETS["bn"]
    x, y = batch(*shape)
    task = supervised(make, (x, y))
    population = train(task, "sgd", seeds=3, steps=2, batch_size=4, drop_last=True, dtype="float64")
    rates = [0.1, 0.2, 0.4]
    found = gradient_shift(population, batch=(x, y), lr=rates)
    chosen = gradient_shift(population, batch=(x, y), lr=rates, layers=["6", "3"])
    assert chosen.layers == ("3", "6")
    torch.testing.assert_close(chosen.difference[1], found.difference[found.layers.index("6")])
    for i, rate in enumerate(rates):
        alone = gradient_shift(population[i], loss=entropy, batch=(x, y), lr=rate)
        torch.testing.assert_close(found.difference[:, i], alone.difference[:, 0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.relative[:, i], alone.relative[:, 0], rtol=1e-9, atol=1e-12)
    each = [torch.stack([t[k : k + 4] for k in (0, 2, 5)]) for t in (x, y)]
    private = gradient_shift(population, batch=tuple(each), lr=0.1, private=True)
    alone = gradient_shift(population[1], loss=entropy, batch=(each[0][1], each[1][1]), lr=0.1)
    torch.testing.assert_close(private.difference[:, 1], alone.difference[:, 0], rtol=1e-9, atol=1e-12)
    table = found.table
    assert len(table) == 3 * len(found.layers)
    assert table.query("layer == '6' and member == 2").difference.item() == found.difference[-1, 2].item()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "neither of later= and lr="),
        ({"lr": 0.1, "later": mlp(4, 5, 3)().double()}, "both of later= and lr="),
        ({"later": mlp(4, 6, 3)().double()}, "differs from the network at '0.bias'"),
        ({"lr": 0.1, "layers": ["00"]}, "no layer with weights is named '00'"),
    ],
)
def test_errors(change: dict[str, Any], told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        gradient_shift(mlp(4, 5, 3)().double(), loss=entropy, batch=batch(4), **change)
