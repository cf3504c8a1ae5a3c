"""Rules as torch optimizers on one LeNet-300-100, against torch's own fused step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import Row, interleaved
from losslab.rules import SGD, AdaGrad, Adam, Momentum, Rule, TorchOptimizer
from losslab.tasks import lenet_300_100

PAIRS: tuple[tuple[Rule, Callable[[Any], torch.optim.Optimizer]], ...] = (
    (Adam(lr=1e-3), lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)),
    (Momentum(lr=1e-2, beta=0.9), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True)),
    (SGD(lr=1e-2), lambda p: torch.optim.SGD(p, lr=1e-2, fused=True)),
    (AdaGrad(lr=1e-2), lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True)),
)


def networks() -> list[nn.Module]:
    """Two equal networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = lenet_300_100()()
    second = lenet_300_100()()
    second.load_state_dict(first.state_dict())
    return [first, second]


def rows() -> list[Row]:
    """The step alone, on gradients that are there already, and equal weights after it."""
    x = torch.randn(60, 784, generator=torch.Generator().manual_seed(1))
    y = torch.arange(60) % 10
    found = []
    for rule, torchs in PAIRS:
        ours, theirs = networks()
        optimizers = [TorchOptimizer(ours.parameters(), rule), torchs(theirs.parameters())]
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        worst = max(
            float((a - b).detach().abs().max())
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        )
        assert worst < 1e-6, f"{rule.name}: the adapter differs from torch by {worst:.1e}"

        def many(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
            return lambda: [optimizer.step() for _ in range(200)]

        seconds = interleaved({"losslab": many(optimizers[0]), "torch": many(optimizers[1])})
        ratio = seconds["losslab"] / seconds["torch"]
        found.append(
            Row(
                f"{rule.name} through its adapter, LeNet-300-100 ({seconds['torch'] * 5:.3f} ms torch fused)",
                f"{ratio:.2f} times torch's step",
                "<= 1.15",
                ratio <= 1.15,
            )
        )
    return found
