"""The networks of Glorot and Bengio before training: signals, gradients and Jacobians layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losslab.engine.randomness import generator
from losslab.layers import standard, xavier_uniform
from losslab.lecture.section_6_5.networks import drawn, gaussian_rows, passage
from losslab.signals import mean_field

if TYPE_CHECKING:
    import pandas as pd

INITIALISATIONS = {"standard": standard(), "normalised": xavier_uniform()}
"""U[±1/√fan-in], and Xavier's uniform form, by the paper's names."""

CLASSES = 10


def spread_of(init: str, inputs: int, outputs: int) -> float:
    """The variance of a weight."""
    return 1 / (3 * inputs) if init == "standard" else 2 / (inputs + outputs)


def at_start(widths: Sequence[int], draws: int, examples: int) -> pd.DataFrame:
    """Hidden tanh layers of random networks on unit-variance Gaussian inputs, under a softmax cost.

    Returns:
        One row a (init, draw, layer): ``std`` of the activations, ``gradient``, the root mean square of the
        cost's gradient at the pre-activations, and ``weight_gradient``, that of its gradient in the weights,
        both in units of the last hidden layer; ``std_theory`` and ``gradient_theory`` by the recursion.
    """
    import pandas as pd

    rows = []
    for init, value in INITIALISATIONS.items():
        std, gradient = theory(init, widths)
        for draw in range(draws):
            weights = drawn(value, widths, 1, seed=draw)
            x = gaussian_rows(examples, widths[0], seed=draw)
            labels = torch.randint(CLASSES, (examples,), generator=generator(draw, "labels"))
            passed = passage(weights, x, _softmax_gradient(weights, x, labels), torch.tanh)
            back, steep = ([_rms(t) for t in part[:-1]] for part in (passed.back, passed.weights))
            for layer, h in enumerate(passed.ahead[:-1]):
                told = {
                    "init": init, "draw": draw, "layer": layer + 1,
                    "std": float(torch.tanh(h).double().std()), "std_theory": std[layer],
                    "gradient": back[layer] / back[-1], "gradient_theory": gradient[layer],
                    "weight_gradient": steep[layer] / steep[-1],
                }  # fmt: skip
                rows.append(told)
    return pd.DataFrame(rows)


def theory(init: str, widths: Sequence[int]) -> tuple[list[float], list[float]]:
    """For each hidden layer the std of the activations, and the gradient's in units of the last one's."""
    pairs = list(pairwise(widths))
    spreads = [spread_of(init, i, o) for i, o in pairs]
    ahead = [i * s for (i, _), s in zip(pairs, spreads, strict=True)]
    behind = [o * s for (_, o), s in zip(pairs, spreads, strict=True)]
    found = mean_field.recursion("tanh", len(pairs), ahead, behind)
    hidden = found.gradient[:-1]
    return list(found.std[:-1]), [math.sqrt(g / hidden[-1]) for g in hidden]


def jacobians(width: int, depth: int, draws: int) -> pd.DataFrame:
    """Mean singular values of the Jacobians between neighbouring hidden layers, and of the weights alone.

    The Jacobian of a_{l+1} = tanh(W a_l) is diag(tanh'(h_{l+1})) W, here at one Gaussian input a network.

    Returns:
        One row a (init, draw, layer): ``jacobian``; and for the first layer of each draw (NaN in the others)
        ``weights``, ``weights_theory`` = 8/(3 pi) times the root of width times the variance of a weight, and
        ``squares``, the mean squared singular value of W.
    """
    import pandas as pd

    rows = []
    for init, value in INITIALISATIONS.items():
        reach = math.sqrt(width * spread_of(init, width, width))
        for draw in range(draws):
            g = generator(draw, f"jacobians {init}")
            a = torch.randn(width, generator=g)
            for layer in range(depth):
                w = drawn(value, (width, width), 1, seed=1000 * draw + layer)[0][0]
                a = torch.tanh(w @ a)
                if layer:
                    values = torch.linalg.svdvals(w).double() if layer == 1 else torch.tensor([math.nan])
                    told = {
                        "init": init, "draw": draw, "layer": layer,
                        "jacobian": float(torch.linalg.svdvals((1 - a.square())[:, None] * w).mean()),
                        "weights": float(values.mean()), "weights_theory": 8 / (3 * math.pi) * reach,
                        "squares": float(values.square().mean()),
                    }  # fmt: skip
                    rows.append(told)
    return pd.DataFrame(rows)


def _softmax_gradient(weights: Sequence[Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """d(mean cross-entropy) / d(outputs), ``[1, B, classes]``."""
    a = x
    for w in weights[:-1]:
        a = torch.tanh(a @ w[0].T)
    output = a @ weights[-1][0].T
    return ((output.softmax(1) - torch.nn.functional.one_hot(labels, CLASSES)) / len(x))[None]


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())
