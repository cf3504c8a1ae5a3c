"""Initialisations as values: how the weights of a network start, whatever the network is.

An :class:`Initialisation` draws the weights of every linear and convolutional layer anew and sets their
biases to zero; all other parameters, batch norm's among them, stay as their layers made them. With
``fan-in`` the inputs of one unit and ``fan-out`` the units that one input feeds, the standard deviation of a
weight is

==================  ====================================  =============================================
``lecun``           gain / sqrt(fan-in)                   LeCun et al., Efficient BackProp, eq. 16
``xavier``          gain sqrt(2 / (fan-in + fan-out))     Glorot & Bengio 2010, eqs. 12 and 16
``he``              gain / sqrt(fan-in), gain = sqrt 2    He et al. 2015, eq. 10
``standard``        gain / sqrt(3 fan-in)                 Glorot & Bengio 2010, eq. 1
``orthogonal``      gain / sqrt(max(rows, columns))       Saxe, McClelland & Ganguli 2014
``gaussian(std)``   std
==================  ====================================  =============================================

`losslab.layers.lsuv` rescales them on data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from losslab.errors import LosslabError, unknown
from losslab.tasks.models import Factory

SQRT_2 = math.sqrt(2.0)

GAINS: dict[str, float] = {
    "identity": 1.0,
    "linear": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "lecun_tanh": 1.0,
    "relu": SQRT_2,
    "leaky_relu": math.sqrt(2 / (1 + 0.01**2)),
    "softsign": 2.3375,
    "gelu": 1.5335,
    "silu": 1.6765,
    "elu": 1.2452,
}
"""Activation -> the gain that `gain_of` gives."""


class Fans(NamedTuple):
    """How many inputs one unit of a layer has, and how many units one input feeds."""

    fan_in: int
    fan_out: int


Draw = Callable[[Tensor, Fans, Generator | None], Tensor]
"""An empty CPU tensor of a weight's shape, the fans, a generator or None -> the tensor, filled."""


def gain_of(activation: str) -> float:
    """The factor on a standard deviation that makes up for what an activation takes from the signal.

    For ReLU and its leaky variant (slope 0.01) it is the one that keeps the mean square of zero-mean
    pre-activations, ``1 / sqrt(E f(z)^2)`` with ``z ~ N(0, 1)``, whatever their scale. For softsign, GELU,
    SiLU and ELU it is the same number, which is exact at unit variance only. For tanh and sigmoid it is
    torch's rule of thumb, 5/3 and 1 (`torch.nn.init.calculate_gain`): keeping unit variance would take 1.593
    and 1.846. For ``1.7159 tanh(2x / 3)``, scaled so as to need none, it is 1 (Efficient BackProp, section
    4.4).

    Raises:
        LosslabError: The activation is unknown.

    Example:
        >>> gain_of("relu") == 2**0.5, round(gain_of("tanh"), 4)
        (True, 1.6667)
    """
    if activation not in GAINS:
        raise unknown("gain", activation, GAINS)
    return GAINS[activation]


@dataclass(frozen=True, repr=False)
class Initialisation:
    """How weights start; prints and compares as the expression that made it.

    Attributes:
        expression: ``"xavier()"``.
        draw: Fills a weight.
        finish: What is done to the module after all weights are drawn, if anything.

    Example:
        >>> layer = xavier().apply(nn.Linear(300, 100), torch.Generator().manual_seed(0))
        >>> round(float(layer.weight.detach().var()), 4), layer.bias.detach().unique().tolist()
        (0.005, [0.0])
    """

    expression: str
    draw: Draw = field(compare=False)
    finish: Callable[[nn.Module], None] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return self.expression

    def apply(self, module: nn.Module, generator: Generator | None = None) -> nn.Module:
        """Draw the weights of every linear and convolutional layer anew, in place; biases become 0.

        The numbers are drawn on the CPU, in float32 or the weight's own longer precision, layer by layer in
        the order of ``module.modules()``: a seed gives the same weights on every device. A weight that two
        layers share is drawn once.

        Args:
            module: Any network.
            generator: Where the draws come from; the global CPU generator if None.

        Returns:
            The module itself.

        Raises:
            LosslabError: No linear or convolutional layer, or one whose weight has no shape yet or is
                computed from other parameters.
        """
        layers = weighted_layers(module)
        if not layers:
            kind = type(module).__name__
            raise LosslabError(
                f"{kind} has no linear or convolutional layer to initialise: pass a network that has one"
            )
        drawn: set[int] = set()
        with torch.no_grad():
            for name, layer in layers.items():
                weight = weight_of(name, layer)
                if id(weight) not in drawn:
                    drawn.add(id(weight))
                    weight.copy_(self._values(weight, fans(layer), generator))
                if layer.bias is not None:
                    layer.bias.zero_()
        if self.finish is not None:
            self.finish(module)
        return module

    def on(self, factory: Callable[[], nn.Module]) -> Factory:
        """The factory of the same networks, started so: a task's model.

        The draws come from the global generator, which the engine seeds for every member.
        """
        return Factory(f"{self!r}.on({factory!r})", lambda: self.apply(factory()))

    def _values(self, weight: Tensor, size: Fans, generator: Generator | None) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        device = "cpu" if generator is None else generator.device
        return self.draw(torch.empty(weight.shape, dtype=dtype, device=device), size, generator)


# -- the family ----------------------------------------------------------------------------------------


def lecun(gain: float = 1.0) -> Initialisation:
    """``w ~ N(0, gain^2 / fan-in)``: unit-variance inputs give unit-variance outputs, on average over w.

    LeCun, Bottou, Orr & Mueller, Efficient BackProp (1998), section 4.6.
    """
    return _scaled("lecun", gain, lambda size: size.fan_in)


def lecun_uniform(gain: float = 1.0) -> Initialisation:
    """`lecun` drawn uniformly: ``w ~ U[-a, a]`` with ``a = gain sqrt(3 / fan-in)``."""
    return _scaled("lecun_uniform", gain, lambda size: size.fan_in, uniform=True)


def xavier(gain: float = 1.0) -> Initialisation:
    """``w ~ N(0, 2 gain^2 / (fan-in + fan-out))``: a compromise of keeping signals forward and backward.

    Both are kept only where fan-in equals fan-out (Glorot & Bengio 2010, eq. 12). torch's ``xavier_normal_``
    counts all output channels of a grouped convolution in the fan-out; here it is those of one group.
    """
    return _scaled("xavier", gain, lambda size: (size.fan_in + size.fan_out) / 2)


def xavier_uniform(gain: float = 1.0) -> Initialisation:
    """`xavier` drawn uniformly: ``U[-a, a]``, ``a = gain sqrt(6 / (fan-in + fan-out))``.

    Glorot & Bengio 2010, eq. 16, the paper's "normalized initialization". The interval is symmetric: its
    variance ``a^2 / 3`` is that of `xavier`.
    """
    return _scaled("xavier_uniform", gain, lambda size: (size.fan_in + size.fan_out) / 2, uniform=True)


def he(gain: float = SQRT_2) -> Initialisation:
    """``w ~ N(0, gain^2 / fan-in)`` with gain sqrt 2: ReLU loses half of the mean square, this restores it.

    He, Zhang, Ren & Sun, Delving Deep into Rectifiers (2015), eq. 10.
    """
    return _scaled("he", gain, lambda size: size.fan_in, usual=SQRT_2)


def he_uniform(gain: float = SQRT_2) -> Initialisation:
    """`he` drawn uniformly: ``U[-a, a]`` with ``a = gain sqrt(3 / fan-in)``."""
    return _scaled("he_uniform", gain, lambda size: size.fan_in, uniform=True, usual=SQRT_2)


def standard(gain: float = 1.0) -> Initialisation:
    """``w ~ U[-a, a]`` with ``a = gain / sqrt(fan-in)``, so that ``fan-in Var w = gain^2 / 3``.

    The heuristic that Glorot & Bengio (2010, eq. 1) compare with; torch's own start of linear and
    convolutional layers, but for the biases, which torch draws too.
    """
    return _scaled("standard", gain, lambda size: 3 * size.fan_in, uniform=True)


def gaussian(std: float) -> Initialisation:
    """``w ~ N(0, std^2)``, whatever the size of the layer.

    Raises:
        LosslabError: The standard deviation is not a finite number of at least 0.
    """
    check_scale("std", std)
    return Initialisation(
        f"gaussian({std:g})", lambda empty, _, generator: empty.normal_(0.0, std, generator=generator)
    )


def orthogonal(gain: float = 1.0) -> Initialisation:
    """``W = gain Q``, Q uniform among the matrices with orthonormal rows or columns, whichever are fewer.

    A convolution's kernel counts as the matrix ``[channels out, channels in x kernel]``. Saxe, McClelland &
    Ganguli, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks (2014). The
    numbers are those of ``torch.nn.init.orthogonal_``.
    """
    check_scale("gain", gain)
    return Initialisation(
        call("orthogonal", gain),
        lambda empty, _, generator: nn.init.orthogonal_(empty, gain, generator=generator),
    )


# -- parts ---------------------------------------------------------------------------------------------


def weighted_layers(module: nn.Module) -> dict[str, nn.Linear | _ConvNd]:
    """The linear and convolutional layers of a network by name, in the order of ``module.modules()``."""
    return {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, _ConvNd))}


def fans(layer: nn.Linear | _ConvNd) -> Fans:
    """Fan-in and fan-out of a layer; strides and the borders of an image are not counted.

    Example:
        >>> fans(nn.Linear(5, 3)), fans(nn.Conv2d(4, 6, 3, groups=2))
        (Fans(fan_in=5, fan_out=3), Fans(fan_in=18, fan_out=27))
    """
    if isinstance(layer, nn.Linear):
        return Fans(layer.in_features, layer.out_features)
    field_size = math.prod(layer.kernel_size)
    return Fans(
        layer.in_channels // layer.groups * field_size, layer.out_channels // layer.groups * field_size
    )


def _scaled(
    name: str, gain: float, units: Callable[[Fans], float], uniform: bool = False, usual: float = 1.0
) -> Initialisation:
    """Weights of standard deviation ``gain / sqrt(units)``; a gain that is not the usual one is shown."""
    check_scale("gain", gain)

    def draw(empty: Tensor, size: Fans, generator: Generator | None) -> Tensor:
        std = gain / math.sqrt(units(size))
        if uniform:
            end = math.sqrt(3.0) * std
            return empty.uniform_(-end, end, generator=generator)
        return empty.normal_(0.0, std, generator=generator)

    return Initialisation(call(name, gain, usual), draw)


def call(name: str, gain: float, usual: float = 1.0, *arguments: str) -> str:
    """How a call prints; the usual gain is not shown."""
    given = (*arguments, *(() if gain == usual else (f"gain={gain:.4g}",)))
    return f"{name}({', '.join(given)})"


def check_scale(name: str, value: float) -> None:
    """Refuse a standard deviation or a gain that is negative or not finite."""
    if not 0 <= value < math.inf:
        raise LosslabError(f"{name} is {value}: pass a finite number of at least 0")


def weight_of(name: str, layer: nn.Linear | _ConvNd) -> nn.Parameter:
    """The weight of a layer as the parameter that can be written to; refuses one that has none."""
    weight = layer._parameters.get("weight")
    if weight is None:
        raise LosslabError(
            f"the weight of layer {name!r} is computed from other parameters: initialise before it is "
            "parametrised"
        )
    if isinstance(weight, UninitializedParameter):
        raise LosslabError(f"layer {name!r} is lazy and has no weight yet: run a batch through it first")
    return weight
