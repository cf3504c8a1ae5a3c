"""C36: what batch normalisation computes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from losslab.engine.randomness import generator, seeded
from losslab.layers import BatchNorm
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables
from losslab.lecture.figures import figure, lines
from losslab.lecture.statistics import max_relative_error
from losslab.lecture.verdicts import identity
from losslab.tasks import digits, mlp

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

CHECKS = {
    "equation": "y = γ (x − mean) / √(var + ε) + β, summed value by value",
    "torch": "equals torch's BatchNorm1d and BatchNorm2d",
    "moments": "the output has mean β and standard deviation |γ| √(var / (var + ε))",
    "bias": "a bias before the normalisation changes nothing",
    "maps": "a feature map has one γ and β, and one mean and variance over examples and positions",
}
"""What is checked on every instance, ``maps`` on convolutional ones: column value -> name of the finding."""


class Instance(NamedTuple):
    """A random layer with a random input, float64.

    Attributes:
        layer: In training mode.
        gamma: Its scale, drawn; the layer's own parameter.
        beta: Its shift.
        x: ``[B, C]`` or ``[B, C, height, width]``; channels differ in mean and spread.
        g: A gradient to send back, of the same shape.
    """

    layer: BatchNorm
    gamma: Tensor
    beta: Tensor
    x: Tensor
    g: Tensor

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that a channel is normalised over."""
        return (0, *range(2, self.x.dim()))

    def columns(self, channels: Tensor) -> Tensor:
        """A number a channel, shaped so that it broadcasts with x."""
        return channels.reshape(-1, *[1] * (self.x.dim() - 2))


def instance(index: int, purpose: str, eps: float | None = None) -> Instance:
    """Odd ones are convolutional; 5 to 40 examples, 1 to 6 channels, up to 4 x 4 positions."""
    g = generator(index, purpose)
    batch, channels, height, width = (
        int(torch.randint(low, high, (), generator=g)) for low, high in ((5, 41), (1, 7), (1, 5), (1, 5))
    )
    shape = (batch, channels, height, width) if index % 2 else (batch, channels)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    layer = BatchNorm(channels, eps=(1e-5, 1e-3, 0.1)[index % 3] if eps is None else eps).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(draw(channels))
    each = (channels, *[1] * (len(shape) - 2))
    x = draw(*shape) * draw(*each).exp() + 3 * draw(*each)
    gamma, beta = layer.parameters()
    return Instance(layer, gamma, beta, x, draw(*shape))


def errors(index: int) -> dict[str, float]:
    """The relative error of each check of `CHECKS` on one instance."""
    made = instance(index, "C36")
    layer, x = made.layer, made.x
    gamma, beta = made.gamma.detach(), made.beta.detach()
    with torch.no_grad():
        y = layer(x)
        shift = made.columns(torch.linspace(-3, 3, x.shape[1], dtype=x.dtype))
        theirs = F.batch_norm(x, None, None, gamma, beta, training=True, eps=layer.eps)
        var = x.var(made.axes, correction=0)
        wanted = torch.cat([beta, gamma.abs() * (var / (var + layer.eps)).sqrt()])
        moments = torch.cat([y.mean(made.axes), y.std(made.axes, correction=0)])
        found = {
            "equation": max_relative_error(y, by_hand(x.numpy(), gamma.numpy(), beta.numpy(), layer.eps)),
            "torch": max_relative_error(y, theirs),
            "moments": max_relative_error(moments, wanted),
            "bias": max_relative_error(y, layer(x + shift)),
        }
        if x.dim() > 2:
            rows = x.movedim(1, -1).reshape(-1, x.shape[1])
            found["maps"] = max_relative_error(y.movedim(1, -1).reshape(rows.shape), layer(rows))
    return found


def by_hand(x: NDArray, gamma: NDArray, beta: NDArray, eps: float) -> NDArray:
    """The equation, channel by channel, with exactly rounded sums."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c].ravel().tolist()
        mean = math.fsum(values) / len(values)
        var = math.fsum((v - mean) ** 2 for v in values) / len(values)
        y[:, c] = gamma[c] * (x[:, c] - mean) / math.sqrt(var + eps) + beta[c]
    return y


def hidden_units() -> pd.DataFrame:
    """Means and deviations over the digits of a fresh network's first layer, before and behind batch norm."""
    import pandas as pd

    x, _ = digits(raw=True).train.all()
    with seeded(0, "C36"), torch.no_grad():
        raw = mlp(64, 30, 10)().get_submodule("0")(x)
    rows = []
    for stage, values in (("W x", raw), ("behind batch norm", BatchNorm(30)(raw).detach())):
        mean, deviation = values.mean(0), values.std(0, correction=0)
        for unit in range(30):
            rows.append({"stage": stage, "unit": unit, "mean": float(mean[unit])})
            rows[-1]["deviation"] = float(deviation[unit])
    return pd.DataFrame(rows)


def experiment(lab: Lab) -> Tables:
    """Random layers and inputs, fully connected and convolutional."""
    import pandas as pd

    count = lab.pick(200, 2000)
    rows = [
        {"instance": i, "check": check, "error": error}
        for i in range(count)
        for check, error in errors(i).items()
    ]
    return {"instances": pd.DataFrame(rows), "units": hidden_units()}


def judge(tables: Tables) -> list[Finding]:
    """V1 on every check."""
    rows = tables["instances"]
    return [identity(name, rows[rows.check == check].error) for check, name in CHECKS.items()]


def figures(tables: Tables) -> list[Drawing]:
    """Every unit of a layer as a point, before and behind batch norm."""
    drawn = figure("Hidden units over the digits", "mean", "standard deviation")
    lines(drawn, tables["units"], "mean", "deviation", by="stage", mode="markers")
    return [
        Drawing(
            drawn,
            "First layer of a fresh 64-30-10 network on raw pixels: each of the 30 units has a mean and a "
            "spread of its own before the normalisation. Behind it, with γ = 1 and β = 0, all have mean 0 "
            "and standard deviation 1.",
        )
    ]


C36 = Claim(
    id="C36",
    section="6.4.1",
    title="Batch norm: subtract the batch's mean, divide by its deviation, scale and shift",
    statement="A batch-norm layer subtracts each unit's mean over the mini-batch, divides by its standard "
    "deviation, and applies a learned scale γ and shift β.",
    source="Notes §6.4.1; Ioffe & Szegedy 2015, algorithm 1 and section 3.2",
    experiment=experiment,
    judge=judge,
    figures=figures,
    caveats=(
        "The variance is the biased one and ε stands under the root, so that the output's variance falls "
        "short of γ² by the factor var / (var + ε).",
        "The normalisation acts on W x before the non-linearity; a bias there is subtracted again, and β "
        "takes its place.",
        "A fully connected layer cannot normalise a batch of one example: its variance is zero.",
    ),
)
