"""Population statistics against the algorithm written out, and batch-norm networks alone and together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losslab
from losslab.engine.randomness import seeded
from losslab.errors import LosslabError
from losslab.layers import BatchNorm, NoisyBatchNorm, population_statistics, with_batchnorm
from losslab.layers.batchnorm import is_batchnorm
from losslab.tasks import Data, mlp, supervised

X = torch.randn(23, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1


def network(norm: Any = nn.BatchNorm1d) -> nn.Module:
    with seeded(0, "population"):
        layers = [
            nn.Linear(4, 6),
            norm(6),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Linear(6, 5),
            norm(5),
            nn.Linear(5, 2),
        ]
        return nn.Sequential(*layers).double()


def statistics(model: nn.Module) -> list[Tensor]:
    return [t for m in model.modules() if is_batchnorm(m) for t in (m.running_mean, m.running_var)]


def by_hand(model: nn.Module, batches: list[Tensor], population: bool) -> list[Tensor]:
    """Layer by layer over all batches, each normalised by itself or by the statistics just computed."""
    found: list[Tensor] = []
    for module in model:
        if not is_batchnorm(module):
            batches = batches if isinstance(module, nn.Dropout) else [module(b) for b in batches]
            continue
        if population:
            rows = torch.cat(batches)
            mean, var = rows.mean(0), rows.var(0)
            batches = [(b - mean) / (var + 1e-5).sqrt() for b in batches]
        else:
            mean = torch.stack([b.mean(0) for b in batches]).mean(0)
            m = len(batches[0])
            var = m / (m - 1) * torch.stack([b.var(0, correction=0) for b in batches]).mean(0)
            batches = [(b - b.mean(0)) / (b.var(0, correction=0) + 1e-5).sqrt() for b in batches]
        found += [mean, var]
    return [t.detach() for t in found]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm, NoisyBatchNorm])
@pytest.mark.parametrize("size", [5, 23, None])
def test_algorithm_2(norm: Any, size: int | None) -> None:
    model = network(norm)
    whole = list(X.split(size or 23))
    batches = [b for b in whole if len(b) == (size or 23)]
    done = population_statistics(model, X, batch_size=size)
    torch.testing.assert_close(statistics(done), by_hand(model, batches, False), rtol=1e-10, atol=1e-10)
    assert {int(m.num_batches_tracked) for m in done.modules() if is_batchnorm(m)} == {len(batches)}


@pytest.mark.parametrize("size", [1, 5, 22, 23, None])
def test_the_exact_pass_gives_the_statistics_of_the_network_that_uses_them(size: int | None) -> None:
    model = network()
    done = population_statistics(model, X, batch_size=size, exact=True)
    torch.testing.assert_close(statistics(done), by_hand(model, [X], True), rtol=1e-9, atol=1e-9)


def test_the_network_given_stays_and_its_mode_is_kept() -> None:
    model = network()
    model[3].eval()
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    done = population_statistics(model, X, batch_size=5)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [m.training for m in done.modules()] == [m.training for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in [*model.modules(), *done.modules()])
    assert torch.equal(random, torch.get_rng_state())


def test_convolutions_and_dictionaries() -> None:
    with seeded(0, "population"):
        model = nn.Sequential(nn.Conv2d(1, 3, 2), BatchNorm(3)).double()
    images = X[:20].reshape(10, 1, 2, 4)
    done = population_statistics(model, {"x": images}, call=lambda m, batch: m(batch["x"]))
    rows = model[0](images).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(statistics(done), [rows.mean(1), rows.var(1)], rtol=1e-10, atol=1e-10)


def test_what_is_never_called_keeps_its_statistics() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = BatchNorm(4).double(), BatchNorm(4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for options in ({}, {"batch_size": 4, "exact": True}):
        done = population_statistics(Half(), X, **options)
        assert torch.equal(done.unused.running_var, torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(done.used.running_mean, X.mean(0))


def test_bad_data_are_told() -> None:
    with pytest.raises(LosslabError, match="the batch norm '1' got 6 values that are not finite, of 138"):
        population_statistics(network(), torch.cat([X[:22], X[:1] * float("inf")]))
    with pytest.raises(LosslabError, match="got one value a channel"):
        population_statistics(network(), X[:1])
    with pytest.raises(LosslabError, match="got one value a channel"):
        population_statistics(network(), X[:1], exact=True)
    with pytest.raises(LosslabError, match="need one complete batch"):
        population_statistics(network(), X, batch_size=24)
    with pytest.raises(LosslabError, match="23 examples and a batch_size of 0"):
        population_statistics(network(), X, batch_size=0)


Y = torch.arange(23) % 3
NETWORKS: dict[str, Any] = {
    "torch": mlp(4, 6, 3, batch_norm=True),
    "ours": lambda: with_batchnorm(mlp(4, 6, 3)()),
    "ghost": lambda: with_batchnorm(mlp(4, 6, 3)(), lambda n: BatchNorm(n, ghost=4)),
    "noisy": lambda: with_batchnorm(mlp(4, 6, 3)(), NoisyBatchNorm),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("execution", ["stacked", "loop"])
def test_a_member_trains_as_it_does_alone_running_statistics_included(name: str, execution: str) -> None:
    task = supervised(NETWORKS[name], Data.of((X, Y)))
    options: Any = {"steps": 6, "batch_size": 8, "dtype": torch.float64}
    rates = [0.05, 0.5, 0.1]
    together = losslab.train(
        task, losslab.rules.SGD(lr=rates), seeds=[0, 1, 2], execution=execution, **options
    )
    for i, rate in enumerate(rates):
        alone = losslab.train(task, losslab.rules.SGD(lr=rate), seeds=[i], execution="loop", **options)
        for key, tensor in alone.points.items():
            torch.testing.assert_close(together.points[key][i], tensor[0], rtol=1e-9, atol=1e-9)
        assert any("running_mean" in key for key in alone.points)
