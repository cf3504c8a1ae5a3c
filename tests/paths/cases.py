"""Functions with known passes, and small trained networks, for the tests of paths."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from losslab.engine import Points, Population, train
from losslab.rules import make
from losslab.tasks import Function, Task, function_task, mlp, supervised


def _bent(x: Tensor) -> Tensor:
    a, b = x[..., 0], x[..., 1]
    return (a**2 - 1) ** 2 + 4 * (b - 1 + a**2) ** 2


#: Two minima on a parabola; the pass (0, 1) at height 1 lies far off the straight way, which climbs to 5.
bent = Function(
    "bent",
    _bent,
    2,
    (1.0, 0.0),
    ((-2.0, 2.0), (-1.0, 2.0)),
    ((-1.0, 0.0), (1.0, 0.0)),
    ((0.0, 1.0),),
    "tests",
)


def at(*rows: tuple[float, ...]) -> Points:
    """Points of a function's task."""
    return Points({"x": torch.tensor(rows, dtype=torch.float64)}, {})


def bent_task() -> Task:
    return function_task(bent, torch.zeros(2, dtype=torch.float64))


def blobs(batch_norm: bool = False, examples: int = 96, width: int = 12) -> Task:
    """Three classes in the plane, with training and test data."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(2 * examples) % 3
    angle = y * 2.1 + 0.5 * torch.randn(2 * examples, generator=g)
    x = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 0.3 * torch.randn(2 * examples, 1, generator=g))
    factory = mlp(2, width, width, 3, batch_norm=batch_norm)
    return supervised(factory, (x[:examples], y[:examples]), (x[examples:], y[examples:]), name="blobs")


@functools.cache
def trained(batch_norm: bool = False, members: int = 4, width: int = 12) -> Population:
    """Networks that fit the blobs."""
    task = blobs(batch_norm, width=width)
    rule = make("adam", lr=0.02)
    return train(
        task, rule, seeds=members, steps=150, batch_size=32, dtype="float64", evaluate=None, progress=False,
        execution="stacked",
    )  # fmt: skip
