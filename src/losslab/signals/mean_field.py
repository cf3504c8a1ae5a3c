"""What theory expects of signals in wide random networks, layer by layer.

In a fully connected network ``h_l = W_l a_{l-1} + b_l``, ``a_l = f(h_l)``, with independent weights of mean 0
and wide layers, every ``h_l`` is Gaussian with mean 0 over the draws of the weights, and its variance ``q_l``
and that of the gradient ``d_l`` of the loss with respect to ``h_l`` obey

- forward   ``q_l = (n_{l-1} Var W_l) E f(sqrt(q_{l-1}) z)^2 + Var b_l``,
- backward  ``Var d_l = (n_{l+1} Var W_{l+1}) E f'(sqrt(q_l) z)^2 Var d_{l+1}``,

with z standard normal and n_l the width of layer l (Poole et al., Exponential expressivity in deep neural
networks through transient chaos, 2016, eq. 3; Schoenholz et al., Deep information propagation, 2017, eqs. 3
and 13). The linear case is Glorot & Bengio 2010, eqs. 5 and 6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from losslab.errors import LosslabError, unknown
from losslab.tasks.models import ACTIVATIONS

Activation = str | Callable[[Tensor], Tensor]
"""A name of `losslab.tasks.ACTIVATIONS`, or an elementwise function."""

_REACH = 12.0  # beyond, the normal density is below 1e-32
_FINEST = 2.0**-20
_NODES = 24
_TINY = 1e-30  # stands for the limit of vanishing variance
_SETTLED = 1e-13  # relative growth a layer that is rounding
_EXTREMES = (1e-12, 1e12)  # a variance below counts as 0, above as infinite


def expectation(function: Activation, variance: float = 1.0, kinks: Sequence[float] = (0.0,)) -> float:
    """``E f(x)`` for ``x ~ N(0, variance)``, to rounding for a function that is smooth between its kinks.

    Gauss-Legendre quadrature on pieces that end at the kinks and shrink towards 0 and towards each kink, so
    that neither a corner nor a step that is narrow beside the spread of x is stepped over.

    Args:
        function: Elementwise; or an activation's name.
        variance: Of x, at least 0.
        kinks: The x at which the function or one of its derivatives jumps.

    Raises:
        LosslabError: A variance that is negative or not finite, an unknown name, or a function that is not
            elementwise.

    Example:
        >>> round(expectation(lambda x: x.tanh() ** 2), 5), round(expectation("relu", 2 * torch.pi), 9)
        (0.39429, 1.0)
    """
    if not 0 <= variance < math.inf:
        raise LosslabError(f"variance is {variance}: pass a finite number of at least 0")
    scale = math.sqrt(variance)
    apart = tuple(sorted({abs(kink) / scale for kink in kinks})) if scale else ()
    z, weight = _rule(tuple(k for k in apart if 0 < k < _REACH))
    values = _function(function)(z * scale)
    if not isinstance(values, Tensor) or values.shape != z.shape:
        raise LosslabError("the function does not give one number for each: pass an elementwise function")
    return float(values.double() @ weight)


def derivative(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The derivative of an elementwise function, by autograd.

    Example:
        >>> derivative("tanh")(torch.tensor([0.0]))
        tensor([1.])
    """
    function = _function(activation)

    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x).sum(), x)[0]

    return slope


def mean_square(activation: Activation, variance: float = 1.0) -> float:
    """``E f(x)^2`` for ``x ~ N(0, variance)``.

    Example:
        >>> round(mean_square("relu", 2.0), 9), round(mean_square("lecun_tanh"), 4)
        (1.0, 0.7504)
    """
    function = _function(activation)
    return expectation(lambda x: function(x).square(), variance)


def mean_square_slope(activation: Activation, variance: float = 1.0) -> float:
    """``E f'(x)^2`` for ``x ~ N(0, variance)``; at variance 0 its limit from above.

    Example:
        >>> round(mean_square_slope("relu"), 9), round(mean_square_slope("tanh"), 3)
        (0.5, 0.464)
    """
    slope = derivative(activation)
    return expectation(lambda x: slope(x).square(), max(variance, _TINY))


def preserving_gain(activation: Activation, variance: float = 1.0) -> float:
    """The gain on `losslab.layers.lecun` that keeps the variance of zero-mean pre-activations, without bias.

    ``sqrt(variance / E f(sqrt(variance) z)^2)``. For ReLU it is sqrt 2 at every variance.

    Raises:
        LosslabError: The activation is zero almost everywhere.

    Example:
        >>> round(preserving_gain("relu") ** 2, 9), round(preserving_gain("tanh"), 4)
        (2.0, 1.5925)
    """
    kept = mean_square(activation, variance)
    if not kept > 0:
        raise LosslabError(f"the activation keeps nothing of variance {variance:g}: no gain makes up for it")
    return math.sqrt(variance / kept)


@dataclass(frozen=True)
class Recursion:
    """Moments of the layers 1 to L of a wide random network.

    Attributes:
        variance: Of the pre-activations, q_l.
        mean_square: Of the activations, E f(h_l)^2; what the next layer's forward factor multiplies.
        mean: Of the activations, E f(h_l).
        slope: E f'(h_l)^2.
        gradient: The variance of the gradient with respect to h_l, in units of that with respect to h_L.
        chi: What a gradient's variance is multiplied by on its way from layer l+1 to layer l; L - 1 numbers.
    """

    variance: tuple[float, ...]
    mean_square: tuple[float, ...]
    mean: tuple[float, ...]
    slope: tuple[float, ...]
    gradient: tuple[float, ...]
    chi: tuple[float, ...]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviations of the activations, over units and draws of the weights."""
        pairs = zip(self.mean_square, self.mean, strict=True)
        return tuple(math.sqrt(max(0.0, square - mean**2)) for square, mean in pairs)


def recursion(
    activation: Activation,
    depth: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] | None = None,
    bias: float | Sequence[float] = 0.0,
    inputs: float = 1.0,
) -> Recursion:
    """The moments of every layer of a wide random network; see the module's equations.

    Args:
        activation: f, the same in every layer.
        depth: Layers L.
        forward: ``n_{l-1} Var W_l``, fan-in times the variance of a weight; one number, or one a layer.
        backward: ``n_l Var W_l``, fan-out times the variance, the same way; as ``forward`` by default, which
            is right for layers of equal width.
        bias: ``Var b_l``, the same way.
        inputs: Mean square of the network's inputs.

    Raises:
        LosslabError: A depth below 1, lists of another length, negative numbers, an unknown activation.

    Example:
        >>> tanh = recursion("tanh", depth=3)
        >>> [round(q, 4) for q in tanh.variance], [round(g, 4) for g in tanh.gradient]
        ([1.0, 0.3943, 0.2365], [0.2956, 0.6365, 1.0])
    """
    if depth < 1:
        raise LosslabError(f"depth is {depth}: pass at least 1 layer")
    ahead, shift = _each("forward", forward, depth), _each("bias", bias, depth)
    back = ahead if backward is None else _each("backward", backward, depth)
    (square,) = _each("inputs", inputs, 1)
    variances, squares, means, slopes = [], [], [], []
    for factor, added in zip(ahead, shift, strict=True):
        q = factor * square + added
        square = mean_square(activation, q) if q < math.inf else math.inf
        variances.append(q)
        squares.append(square)
        means.append(expectation(activation, q) if q < math.inf else math.nan)
        slopes.append(mean_square_slope(activation, q) if q < math.inf else math.nan)
    chi = [factor * slope for factor, slope in zip(back[1:], slopes, strict=False)]
    gradient = [*itertools.accumulate(reversed(chi), lambda total, factor: total * factor, initial=1.0)]
    return Recursion(*map(tuple, (variances, squares, means, slopes, reversed(gradient), chi)))


@dataclass(frozen=True)
class FixedPoint:
    """Where the variance settles with depth, and what becomes of gradients there.

    Attributes:
        variance: q*; 0 where it lies below 1e-12, infinite where above 1e12.
        chi: ``forward E f'(sqrt(q*) z)^2``: below 1 gradients vanish with depth, above 1 they explode; NaN
            where q* is infinite.
    """

    variance: float
    chi: float


def fixed_point(
    activation: Activation, forward: float = 1.0, bias: float = 0.0, start: float = 1.0
) -> FixedPoint:
    """The variance that the recursion of equal layers tends to from a start.

    The variance moves up or down from the start and settles at the first fixed point on its way, which holds
    for every activation whose ``E f(sqrt(q) z)^2`` grows with q. It is found by bracketing, not by iterating,
    whose last digits may take forever: tanh with ``forward = 1`` approaches 0 like 1 / (2 depth).

    Args:
        activation: f.
        forward: Width times the variance of a weight.
        bias: Variance of a bias.
        start: The variance of the first layer, positive.

    Raises:
        LosslabError: A negative factor, or a start that is not positive.

    Example:
        >>> fixed_point("relu", forward=2.0).variance, fixed_point("tanh").variance
        (1.0, 0.0)
        >>> round(fixed_point("tanh", forward=25 / 9).variance, 4)
        1.1785
    """
    (factor,), (added,) = _each("forward", forward, 1), _each("bias", bias, 1)
    if not 0 < start < math.inf:
        raise LosslabError(f"start is {start}: pass a positive number")

    def growth(log_q: float) -> float:
        q = math.exp(log_q)
        return (factor * mean_square(activation, q) + added) / q - 1.0

    last = here = math.log(start)
    sign = math.copysign(1.0, growth(here))
    if abs(growth(here)) <= _SETTLED:
        return FixedPoint(start, factor * mean_square_slope(activation, start))
    while sign * growth(here) > -_SETTLED:
        last, here = here, here + sign
        if here > math.log(_EXTREMES[1]):
            return FixedPoint(math.inf, math.nan)
        if here < math.log(_EXTREMES[0]):
            return FixedPoint(0.0, factor * mean_square_slope(activation, 0.0))
    settled = last
    if sign * growth(last) > 0:
        from scipy.optimize import brentq

        settled = brentq(growth, last, here, xtol=1e-14)
    variance = math.exp(settled)
    return FixedPoint(variance, factor * mean_square_slope(activation, variance))


# -- parts ---------------------------------------------------------------------------------------------


def _function(activation: Activation) -> Callable[[Tensor], Tensor]:
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation]()


@lru_cache(maxsize=256)
def _rule(kinks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Nodes and weights for integrals against the standard normal density: both float64.

    Panels have at most width 1/2; towards 0 and towards each kink, given by its distance from 0, they shrink
    by halves.
    """
    graded = [2.0**-k for k in range(1, round(-math.log2(_FINEST)) + 1)]
    edges = {0.0, *(0.5 * k for k in range(1, round(2 * _REACH) + 1)), *graded}
    for kink in kinks:
        edges |= {kink, *(kink + g * kink for g in graded), *(kink - g * kink for g in graded)}
    ends = torch.tensor(sorted(e for e in edges if e <= _REACH), dtype=torch.float64)
    nodes, weights = _legendre()
    middle, half = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    z = (middle[:, None] + half[:, None] * nodes).flatten()
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    w = (half[:, None] * weights).flatten() * density
    return torch.cat([z, -z]), torch.cat([w, w]) / (2 * w.sum())


@lru_cache(maxsize=1)
def _legendre() -> tuple[Tensor, Tensor]:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _each(name: str, value: float | Sequence[float], depth: int) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * depth
    if len(values) != depth or not all(0 <= v < math.inf for v in values):
        raise LosslabError(
            f"{name} is {value}: pass one finite number of at least 0, or {depth} of them, one a layer"
        )
    return values
