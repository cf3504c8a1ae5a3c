"""Gradient descent and SGD at saddles of networks: W = 0, identical neurons, a small start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from losslab.engine import Points
from losslab.engine.points import Stack
from losslab.lecture.training import trained
from losslab.rules import GD, SGD
from losslab.tasks import Task, digits_task, half_mse, linear_net, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd

PLATEAU = 0.9 * math.log(10)
"""Training loss below which a classifier of ten digits has left the plateau at log 10."""

PLATEAU_RATE = 0.1


# -- (iii) the origin of a deep linear network ---------------------------------------------------------


def linear_origin(seeds: int, steps: int, kick: float = 0.1) -> pd.DataFrame:
    """A linear network of three layers trained from W = 0, and from a Gaussian kick away from it.

    Returns:
        One row a (rule, start, seed): ``moved``, the largest weight in the end less its start, and ``loss``,
        the training loss in the end in units of that at W = 0.
    """
    import pandas as pd

    task = _rotation_task()
    zeros = {f"{k}.weight": torch.zeros(seeds, 5, 5, dtype=torch.float64) for k in range(3)}
    generator = torch.Generator().manual_seed(3)
    kicked = {n: kick * torch.randn(w.shape, dtype=w.dtype, generator=generator) for n, w in zeros.items()}
    tables = []
    for rule, size in ((GD(lr=0.05), None), (SGD(lr=0.05), 1)):
        for start, weights in (("W = 0", zeros), ("kicked", kicked)):
            population = trained(
                task,
                rule,
                seeds=seeds,
                steps=steps,
                batch_size=size,
                dtype="float64",
                evaluate=[0, steps],
                evaluate_on=["train"],
                start=Points(weights, {}),
            )
            history = population.history
            final = history[history.step == steps].train_loss.to_numpy()
            moved = [(population.points[n] - w).abs().flatten(1).amax(1) for n, w in weights.items()]
            table = pd.DataFrame({"seed": range(seeds), "moved": torch.stack(moved).amax(0).numpy()})
            assert task.train is not None
            origin = float(task.train.all()[1].square().sum(1).mean() / 2)
            tables.append(table.assign(rule=rule.name, start=start, loss=final / origin))
    return pd.concat(tables, ignore_index=True)


def _rotation_task(examples: int = 100, dimension: int = 5) -> Task:
    """Learn a rotation of standard normal inputs."""
    rng = np.random.default_rng(30)
    x = rng.standard_normal((examples, dimension))
    rotation = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0]
    pairs = tuple(torch.from_numpy(values).float() for values in (x, x @ rotation.T))
    return supervised(linear_net(*[dimension] * 4), pairs, criterion=half_mse, name="rotation")


# -- (iv) identical neurons ----------------------------------------------------------------------------


class Elementwise(nn.Module):
    """A tanh network of one hidden layer whose sums run in the same order for every hidden unit.

    A matrix product may add up different columns in different orders, and then rounding alone tells identical
    neurons apart; products and sums along one axis do not.
    """

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(hidden, inputs))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.second = nn.Parameter(torch.zeros(classes, hidden))
        self.offset = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of inputs ``[batch, inputs]``."""
        hidden = torch.tanh((x.unsqueeze(1) * self.first).sum(-1) + self.bias)
        return (hidden.unsqueeze(1) * self.second).sum(-1) + self.offset


MATMUL_NAMES = {"first": "0.weight", "bias": "0.bias", "second": "2.weight", "offset": "2.bias"}


def identical_neurons(seeds: int, steps: int, hidden: int = 10, kick: float = 1e-3) -> pd.DataFrame:
    """Single-sample SGD on digits from hidden units that are all alike.

    Three arms with the same start and the same samples: ``"identical"``; ``"kicked"``, with Gaussian noise
    on the start; ``"matrix products"``, identical again, with the hidden layers as ordinary linear layers.

    Returns:
        One row a (arm, seed): ``difference``, the largest one between the weights of two hidden units in the
        end, and ``loss``, the training loss.
    """
    import pandas as pd

    start = _identical(seeds, hidden)
    generator = torch.Generator().manual_seed(41)
    kicked = {
        n: w + kick * torch.randn(w.shape, dtype=w.dtype, generator=generator) for n, w in start.items()
    }
    pair = {n: torch.cat([w, kicked[n]]) for n, w in start.items()}
    plain = {MATMUL_NAMES[n]: w for n, w in start.items()}
    elementwise = digits_task(lambda: Elementwise(64, hidden, 10))
    tables = [
        _spread(elementwise, pair, [*range(seeds)] * 2, steps).assign(
            arm=np.repeat(["identical", "kicked"], seeds)
        ),
        _spread(digits_task(mlp(64, hidden, 10, activation="tanh")), plain, [*range(seeds)], steps).assign(
            arm="matrix products"
        ),
    ]
    return pd.concat(tables, ignore_index=True)


def _identical(seeds: int, hidden: int) -> Stack:
    """One random hidden unit for each seed, ``hidden`` times over."""
    generator = torch.Generator().manual_seed(40)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(seeds, *shape, dtype=torch.float64, generator=generator)

    return {
        "first": draw(1, 64).expand(seeds, hidden, 64).contiguous(),
        "bias": torch.zeros(seeds, hidden, dtype=torch.float64),
        "second": draw(10, 1).expand(seeds, 10, hidden).contiguous(),
        "offset": torch.zeros(seeds, 10, dtype=torch.float64),
    }


def _spread(task: Task, start: Stack, seeds: list[int], steps: int) -> pd.DataFrame:
    import pandas as pd

    population = trained(
        task,
        SGD(lr=0.05),
        seeds=seeds,
        steps=steps,
        batch_size=1,
        dtype="float64",
        evaluate=[steps],
        evaluate_on=["train"],
        start=Points(start, {}),
    )
    first, bias, second, _ = population.points.weights.values()
    differences = [
        (w - w.narrow(axis, 0, 1)).abs().flatten(1).amax(1)
        for w, axis in ((first, 1), (bias, 1), (second, 2))
    ]
    history = population.history
    return pd.DataFrame(
        {
            "seed": seeds,
            "difference": torch.stack(differences).amax(0).numpy(),
            "loss": history[history.step == steps].train_loss.to_numpy(),
        }
    )


# -- (v) a start of scale 1/1000 -----------------------------------------------------------------------


def plateau(sizes: Sequence[int | None], seeds: int, steps: int, every: int = 4) -> pd.DataFrame:
    """The training loss of a digits network on its way off the plateau, from weights of scale 1e-3.

    Args:
        sizes: Batch sizes; None for gradient descent. All have the rate 0.1 and the same starts.
        seeds: Replicates.
        steps: Updates allowed.
        every: Updates between two looks at the training loss.

    Returns:
        One row a (arm, seed, step).
    """
    import pandas as pd

    task = digits_task(mlp(64, 32, 10, activation="tanh"))
    start = small_start(task, seeds)
    tables = []
    for size in sizes:
        rule = (GD if size is None else SGD)(lr=PLATEAU_RATE)
        population = trained(
            task,
            rule,
            seeds=seeds,
            steps=steps,
            batch_size=size,
            evaluate=every,
            evaluate_on=["train"],
            start=start,
        )
        rows = population.history[["step", "seed", "train_loss"]]
        tables.append(rows.assign(arm="GD" if size is None else f"B = {size}"))
    return pd.concat(tables, ignore_index=True)


def small_start(task: Task, seeds: int, scale: float = 1e-3) -> Points:
    """Weights drawn from N(0, scale^2), biases 0."""
    like = trained(task, SGD(), seeds=seeds, steps=0).points
    generator = torch.Generator().manual_seed(50)
    return Points(
        {
            n: torch.zeros_like(w) if w.dim() == 2 else scale * torch.randn(w.shape, generator=generator)
            for n, w in like.weights.items()
        },
        {},
    )


def escape_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """The first step of each seed below `PLATEAU`, infinite for never: one column an arm."""
    below = rows[rows.train_loss < PLATEAU].groupby(["seed", "arm"]).step.min().unstack()
    return below.reindex(index=rows.seed.unique(), columns=rows.arm.unique()).astype(float).fillna(math.inf)
