"""A folded network equals the network in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.engine.randomness import seeded
from losslab.layers import BatchNorm, NoisyBatchNorm, fold, with_batchnorm
from losslab.layers.batchnorm import is_batchnorm
from losslab.layers.folding import ChannelAffine
from losslab.tasks import conv4, mlp, resnet20


class Branching(nn.Module):
    """Norms on a sum, on an output that is used twice, and on a layer called twice; code fx can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.on_sum, self.on_shared, self.on_twice = (BatchNorm(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.on_sum(self.on_shared(y) + y)
        return self.out(F.relu(self.on_twice(self.b(self.b(z)))))


class Untraceable(nn.Module):
    """A branch on a value, and one pair in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), BatchNorm(5), nn.ReLU())
        self.conv, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.norm(self.conv(y if float(y.detach().mean()) < 9 else -y))


class ReadsWeights(nn.Module):
    """A layer whose weights are also used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), BatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(self.a(x)), self.a.weight)


def tied() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(a, nn.BatchNorm1d(4), nn.Tanh(), b, nn.BatchNorm1d(4))


def hooked() -> nn.Module:
    a = nn.Linear(4, 4)
    a.register_forward_hook(lambda m, args, out: 2 * out)
    return nn.Sequential(a, nn.BatchNorm1d(4))


# network, shape of an input, layers left: foldable norms go, others become affine, some must stay
CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = [
    (mlp(4, 6, 5, 3, batch_norm=True), (4,), 0, 0),
    (resnet20(), (3, 8, 8), 0, 0),
    (lambda: with_batchnorm(conv4(size=8)()), (3, 8, 8), 0, 0),
    (lambda: with_batchnorm(resnet20(batch_norm=False)(), NoisyBatchNorm), (3, 8, 8), 0, 0),
    (lambda: nn.Sequential(nn.Conv1d(2, 3, 2, bias=False), nn.BatchNorm1d(3)), (2, 5), 0, 0),
    (lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), BatchNorm(4, affine=False)), (2, 5, 5), 0, 0),
    (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), BatchNorm(3)), (2, 3, 3, 3), 0, 0),
    (lambda: nn.Sequential(BatchNorm(4), nn.ReLU(), nn.Linear(4, 2)), (4,), 1, 0),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), BatchNorm(3)), (4,), 2, 0),
    (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.BatchNorm2d(3)), (2, 3, 3), 1, 0),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), (4,), 0, 1),
    (Branching, (4,), 3, 0),
    (Untraceable, (4,), 1, 0),
    (ReadsWeights, (4,), 1, 0),
    (tied, (4,), 2, 0),
    (hooked, (4,), 1, 0),
    (lambda: BatchNorm(4), (4,), 1, 0),
]


@pytest.mark.parametrize(("make", "shape", "affine", "left"), CASES)
def test_the_folded_network_computes_the_same(
    make: Callable[[], nn.Module], shape: tuple[int, ...], affine: int, left: int
) -> None:
    with seeded(1, "folding"):
        model = make().double()
        for m in model.modules():
            if is_batchnorm(m) and m.weight is not None:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
        x = torch.randn(6, *shape, dtype=torch.float64)
        for step in range(3):
            model(x * (step + 1) + step)
    before, text = {n: t.clone() for n, t in model.state_dict().items()}, repr(model)
    folded = fold(model)
    assert sum(isinstance(m, ChannelAffine) for m in folded.modules()) == affine
    assert sum(is_batchnorm(m) for m in folded.modules()) == left
    assert model.training
    assert repr(model) == text
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    wanted = model.eval()(x)
    torch.testing.assert_close(folded(x), wanted, rtol=1e-10, atol=1e-10 * float(wanted.detach().abs().max()))
    if not left:  # nothing of the batch matters any more, whatever the mode
        torch.testing.assert_close(folded.train()(x[:1]), wanted[:1], rtol=1e-9, atol=1e-9)
