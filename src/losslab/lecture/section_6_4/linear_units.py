"""One linear unit and gradient descent, with and without batch normalisation, at many rates at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.layers import BatchNorm, standardise
from losslab.lecture.section_6_4.regression import steps_to
from losslab.rules import GD
from losslab.tasks import digits

if TYPE_CHECKING:
    import pandas as pd

STEPS = 300
ARRIVED = 0.1
"""Excess loss, in units of the loss of the best constant output, from which a run has converged."""

PLAIN, NORMALISED, ONE_RATE = "plain", "batch norm", "batch norm, one rate for all"
OWN_RATE = 0.5
"""The rate of gamma and beta in the arm `NORMALISED`; their curvature is 1, whatever the inputs."""


class Problems(NamedTuple):
    """S regressions of one size: inputs ``[S, n, d]`` and targets ``[S, n]``, float64."""

    x: Tensor
    y: Tensor

    def standardised(self) -> Problems:
        """The same with inputs of mean 0 and variance 1."""
        return Problems(torch.stack([standardise(x)(x) for x in self.x]), self.y)

    def floor(self) -> Tensor:
        """The least loss of each, ``[S]``."""
        u = torch.cat([self.x, torch.ones_like(self.x[..., :1])], dim=2).numpy()
        fits = [np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(u, self.y.numpy(), strict=True)]
        away = [((a @ w - b) ** 2).mean() / 2 for a, w, b in zip(u, fits, self.y.numpy(), strict=True)]
        return torch.tensor(away, dtype=torch.float64)


def even_digits(seeds: int, examples: int = 200) -> Problems:
    """Random raw digits; the target is +1 for the even ones and -1 for the others."""
    x, labels = digits(raw=True).train.all()
    generator = torch.Generator().manual_seed(42)
    picked = torch.stack([torch.randperm(len(x), generator=generator)[:examples] for _ in range(seeds)])
    return Problems(x.double()[picked], 1.0 - 2.0 * (labels[picked] % 2).double())


def scaled_inputs(seeds: int, examples: int = 200, dimension: int = 10, decades: float = 2.0) -> Problems:
    """Independent inputs with means and scales of their own, the scales 10^U(-decades, decades).

    A feature's mean is of the order of its deviation, and every feature has the same share in the target.
    """
    generator = torch.Generator().manual_seed(43)

    def normal(*shape: int) -> Tensor:
        return torch.randn(seeds, *shape, generator=generator, dtype=torch.float64)

    exponent = 2 * torch.rand(seeds, 1, dimension, generator=generator, dtype=torch.float64) - 1
    z = normal(examples, dimension)
    y = (z @ normal(dimension, 1)).squeeze(2) / dimension**0.5 + 0.3 * normal(examples)
    return Problems((z + normal(1, dimension)) * 10 ** (decades * exponent), y)


class Descents(NamedTuple):
    """Runs ``[S, R]``: the loss before each step, and whether the gradient turned by more than 90 degrees."""

    loss: Tensor  # [T + 1, S, R]
    turned: Tensor  # [T, S, R], bool; the first step cannot turn


def descend(problems: Problems, rates: Sequence[float], arm: str, steps: int, seed: int = 0) -> Descents:
    """Gradient descent on half the mean squared error of ``w . x + b``, or of ``BN(w . x)``.

    Each of the S x R units is one channel of a single batch-norm layer, so all of them are one network whose
    loss is the sum of theirs. The weights start from N(0, 1/d), the same for every rate.

    Args:
        problems: What is fitted.
        rates: R rates of w; with `PLAIN` and `ONE_RATE` also those of the bias, or of gamma and beta.
        arm: `PLAIN`, `NORMALISED` or `ONE_RATE`.
        steps: T.
        seed: Of the start.
    """
    x, y = problems
    members, n, d = x.shape
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(members, d, 1, generator=generator, dtype=torch.float64) / d**0.5
    weights = {"w": start.expand(members, d, len(rates)).permute(0, 2, 1).reshape(-1, d).contiguous()}
    units = members * len(rates)
    weights |= {"beta": torch.zeros(units, dtype=torch.float64)}
    if arm != PLAIN:
        weights |= {"gamma": torch.ones(units, dtype=torch.float64)}
    layer = BatchNorm(units, eps=1e-12, affine=False).double()
    lr = torch.tensor(rates, dtype=torch.float64).repeat(members)
    rules = {name: GD(lr=OWN_RATE if arm == NORMALISED and name != "w" else lr) for name in weights}
    target = y.T[:, :, None]

    def losses(w: Tensor, beta: Tensor, gamma: Tensor | None = None) -> Tensor:
        out = x @ w.view(members, -1, d).mT  # [S, n, R]
        flat = out.transpose(0, 1).reshape(n, units)
        flat = flat if gamma is None else layer(flat) * gamma
        return ((flat + beta).view(n, members, -1) - target).square().mean(0) / 2

    path, turned = [], []
    before = torch.zeros_like(weights["w"])
    for step in range(steps + 1):
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        loss = losses(**leaves)
        path.append(loss.detach())
        if step == steps:
            break
        gradients = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))
        turned.append(((gradients["w"] * before).sum(1) < 0).view(members, -1))
        before = gradients["w"]
        for name, rule in rules.items():
            here = {name: leaves[name].detach()}
            weights[name] = rule.update({name: gradients[name]}, {}, here, step)[0][name]
    return Descents(torch.stack(path), torch.stack(turned))


def sweep(name: str, problems: Problems, rates: Sequence[float], arms: Sequence[str]) -> pd.DataFrame:
    """Every arm at every rate.

    Returns:
        One row a (data, arm, seed, rate): ``excess`` in the end, in units of the loss of the best constant;
        ``steps`` until it is at most `ARRIVED` to stay, infinite for never; ``turning``, the share of the
        steps until then (of all where there is no then) on which the gradient turned by more than 90 degrees.
    """
    import pandas as pd

    floor = problems.floor()[:, None]
    scale = problems.y.var(1, correction=0)[:, None] / 2
    tables = []
    for arm in arms:
        found = descend(problems, rates, arm, STEPS)
        excess = ((found.loss - floor) / scale).nan_to_num(nan=torch.inf)
        # To stay: the largest excess from each step on.
        ahead = excess.flip(0).cummax(0).values.flip(0)
        steps = steps_to(ahead, ARRIVED)
        passed = torch.arange(STEPS)[:, None, None] < steps
        turning = (found.turned & passed).sum(0) / passed.sum(0).clamp(min=1)
        seeds = range(len(floor))
        places = pd.MultiIndex.from_product([seeds, rates], names=["seed", "rate"])
        columns = {"excess": excess[-1], "steps": steps, "turning": turning}
        table = pd.DataFrame({k: v.flatten().numpy() for k, v in columns.items()}, index=places).reset_index()
        tables.append(table.assign(data=name, arm=arm))
    return pd.concat(tables, ignore_index=True)
