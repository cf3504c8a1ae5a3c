"""Networks whose units may change places, with what a trace must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.tasks import conv2, mlp, resnet20, vgg


@dataclass(frozen=True)
class Network:
    """A network, the shape of an example, and the sizes of its groups."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: tuple[int, ...]
    tokens: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, count: int = 6) -> Tensor:
        g = torch.Generator().manual_seed(0)
        if self.tokens:
            return torch.randint(7, (count, *self.shape), generator=g)
        return torch.randn(count, *self.shape, generator=g, dtype=torch.float64)


class Attention(nn.Module):
    """Heads cut out of one projection by hand, with a residual stream and layer norm."""

    def __init__(self, fast: bool) -> None:
        super().__init__()
        self.fast = fast
        self.start, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.qkv, self.out, self.last = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        h = self.norm(x)
        count, length, width = h.shape
        q, k, v = (part.view(count, length, 2, 4).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=-1))
        if self.fast:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(count, length, width))
        return self.last(x.mean(1))


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, group norm, and a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
        self.few, self.norm, self.last = nn.Conv2d(6, 4, 1, groups=2), nn.GroupNorm(2, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.few(self.deep(self.first(x).relu()))).flatten(1))


class Joined(nn.Module):
    """Two branches and the input side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 5), nn.Linear(4, 6), nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x).tanh(), F.silu(self.b(x)), x], 1))


class Tokens(nn.Module):
    """An embedding with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(7, 6), nn.Parameter(torch.randn(5, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.einsum("btd->bd", self.table(x) + self.places) / 5)


class Sorted(nn.Module):
    """Units that an unknown function puts in order, after others that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cumsum(self.b(self.a(x).tanh()), -1))


class Single(nn.Module):
    """One unit of a layer is looked at alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu())
        return self.c(h.relu()) * h[:, :1]


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(4, 2))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(
        nn.Linear(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)
    )


NETWORKS = [
    Network("mlp", mlp(4, 8, 6, 3), (4,), (8, 6)),
    Network("mlp with batch norm", mlp(4, 8, 6, 3, batch_norm=True), (4,), (8, 6)),
    Network("conv2", conv2(1, 4), (1, 4, 4), (64, 64, 256, 256)),
    Network("vgg", vgg(1, 2, batch_norm=True, width=4, channels=1, size=8), (1, 8, 8), (4, 8, 8)),
    # The stages share one stream; the shortcut's zeros let the new channels of each stage move as well.
    Network("resnet20", resnet20(), (3, 8, 8), (16, 16, 16, 16, 32, 16, 32, 32, 64, 32, 64, 64)),
    Network("attention", lambda: Attention(False), (6, 5), (8, 2, 4, 4)),
    Network("fast attention", lambda: Attention(True), (6, 5), (8, 2, 4, 4)),
    Network("encoder", encoder, (6, 5), (8, 2, 4, 4, 16, 2, 4, 4, 16)),
    Network("grouped", Grouped, (2, 6, 6), (2, 3, 2)),
    Network("joined", Joined, (4,), (5, 6)),
    Network("tokens", Tokens, (5,), (6,), tokens=True),
    Network("sorted", Sorted, (4,), (5,)),
    Network("single", Single, (4,), (5,)),
    Network("tied", tied, (3,), (4,)),
]
