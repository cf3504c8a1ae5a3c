"""Functions of a few variables with known minima and saddles, to watch a rule move on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losslab.errors import LosslabError
from losslab.tasks.task import Batch, Task

Point = tuple[float, ...]


@dataclass(frozen=True)
class Function:
    """A function of d variables.

    Attributes:
        name: Its name.
        f: ``[..., d] -> [...]``, in the dtype of its argument, with gradients and Hessians by autograd.
        dimension: d.
        start: Where a run starts unless told otherwise.
        domain: ``(low, high)`` for each variable: the box worth drawing.
        minima: The global minima; where a function is even in each variable, those with positive coordinates
            only.
        saddles: The strict saddle points, under the same rule.
        source: Where it comes from.

    Example:
        >>> saddle.f(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
        tensor([ 0.0000, -0.2500])
    """

    name: str
    f: Callable[[Tensor], Tensor]
    dimension: int
    start: Point
    domain: tuple[tuple[float, float], ...]
    minima: tuple[Point, ...]
    saddles: tuple[Point, ...]
    source: str


def _saddle(x: Tensor) -> Tensor:
    a, b = x[..., 0], x[..., 1]
    return a**2 / 2 - b**2 / 2 + b**4 / 4


def _rosenbrock(x: Tensor) -> Tensor:
    a, b = x[..., 0], x[..., 1]
    return (1 - a) ** 2 + 100 * (b - a**2) ** 2


def _double_well(x: Tensor) -> Tensor:
    a, b = x[..., 0], x[..., 1]
    return (a**2 - 1) ** 2 + b**2


#: ``x^2/2 - y^2/2 + y^4/4``: a strict saddle at 0 with stable manifold y = 0, between the minima (0, +-1).
saddle = Function(
    name="saddle",
    f=_saddle,
    dimension=2,
    start=(1.0, 1e-3),
    domain=((-1.5, 1.5), (-1.5, 1.5)),
    minima=((0.0, -1.0), (0.0, 1.0)),
    saddles=((0.0, 0.0),),
    source="Nesterov, Introductory Lectures on Convex Optimization (2004), chapter 1",
)

#: ``(1 - x)^2 + 100 (y - x^2)^2``: a curved valley with the condition number 2508 at its minimum (1, 1).
rosenbrock = Function(
    name="rosenbrock",
    f=_rosenbrock,
    dimension=2,
    start=(-1.2, 1.0),
    domain=((-2.0, 2.0), (-1.0, 3.0)),
    minima=((1.0, 1.0),),
    saddles=(),
    source="Rosenbrock, An Automatic Method for Finding the Greatest or Least Value of a Function (1960)",
)

#: ``(x^2 - 1)^2 + y^2``: two minima, and the saddle 0 at height 1 on the straight way between them.
double_well = Function(
    name="double_well",
    f=_double_well,
    dimension=2,
    start=(0.1, 1.0),
    domain=((-1.6, 1.6), (-1.2, 1.2)),
    minima=((-1.0, 0.0), (1.0, 0.0)),
    saddles=((0.0, 0.0),),
    source="the standard example",
)


def octopus(dimension: int, L: float = math.e, gamma: float = 1.0, tau: float = math.e) -> Function:
    """The octopus of Du et al. (2017): gradient descent passes d saddles, each slower than the one before.

    The paper defines f on tubes. With a = abs(x), coordinate i still on its way (``a_i <= 2 tau``), those
    before it arrived (``2 tau <= a_j <= 6 tau``) and those after it at rest (``a_j <= tau``)::

        f = sum_{j<i} L (a_j - 4 tau)^2 - (i-1) nu  +  { -gamma a_i^2 + L a_{i+1}^2     a_i <= tau
                                                       { g1(a_i) + g2(a_i) a_{i+1}^2    tau <= a_i <= 2 tau
            + sum_{j>i+1} L a_j^2
        g1(a) = -gamma a^2 + (10 gamma - 14 L)/(3 tau) (a - tau)^3 + (5 L - 3 gamma)/(2 tau^2) (a - tau)^4
        g2(a) = -gamma - (L + gamma) (10 u^3 + 15 u^4 + 6 u^5),   u = (a - 2 tau) / tau
        nu    = 4 L tau^2 - g1(2 tau)

    All of this is one chain. With the profile h (``-gamma a^2``, then g1, then ``L (a - 4 tau)^2 - nu``) and
    the share theta = (g2 + gamma) / (L + gamma), which falls from 1 at tau to 0 at 2 tau::

        f = h(a_1) + sum_j  theta(a_j) L a_{j+1}^2 + (1 - theta(a_j)) h(a_{j+1})

    equals the paper's f on every tube. Outside of them the paper only shows that an extension exists; here
    the chain itself is the extension, twice continuously differentiable on all of R^d.

    Args:
        dimension: d.
        L: The curvature across a tube and at the minima (the Hessian there is 2 L).
        gamma: The escape curvature at the saddles (the Hessian is -2 gamma along the way out).
        tau: The length scale: the minima are at abs(x_j) = 4 tau.

    Returns:
        The function; of the 2^d minima and the mirrored saddles only those with coordinates >= 0 are listed.

    Raises:
        LosslabError: If the dimension is below 1, or not ``L >= gamma > 0`` and ``tau > 0``.

    Example:
        >>> octopus(3, L=2.0, tau=1.0).saddles
        ((0.0, 0.0, 0.0), (4.0, 0.0, 0.0), (4.0, 4.0, 0.0))
    """
    if dimension < 1 or not L >= gamma > 0 or not tau > 0:
        raise LosslabError(
            f"octopus got dimension={dimension}, L={L}, gamma={gamma}, tau={tau}: pass dimension >= 1, "
            "L >= gamma > 0 and tau > 0"
        )

    def g1(a: Tensor) -> Tensor:
        s = (a - tau) / tau
        return -gamma * a**2 + tau**2 * ((10 * gamma - 14 * L) / 3 * s**3 + (5 * L - 3 * gamma) / 2 * s**4)

    nu = tau**2 * (37 * L + 13 * gamma) / 6

    def profile(x: Tensor) -> Tensor:
        # x^2 where a^2 is meant: autograd takes the second derivative of abs at 0 to be 0, and 0 is a saddle.
        a = x.abs()
        way = torch.where(a <= tau, -gamma * x**2, g1(a.clamp(tau, 2 * tau)))
        return torch.where(a < 2 * tau, way, L * (a - 4 * tau) ** 2 - nu)

    def f(x: Tensor) -> Tensor:
        before, after = x[..., :-1], x[..., 1:]
        v = ((2 * tau - before.abs()) / tau).clamp(0, 1)
        theta = v**3 * (10 - 15 * v + 6 * v**2)
        chain = theta * L * after**2 + (1 - theta) * profile(after)
        return profile(x[..., 0]) + chain.sum(-1)

    way = tuple((4 * tau,) * i + (0.0,) * (dimension - i) for i in range(dimension + 1))
    return Function(
        name=f"octopus({dimension})",
        f=f,
        dimension=dimension,
        start=(1.0,) * dimension,
        domain=((-6 * tau, 6 * tau),) * dimension,
        minima=way[-1:],
        saddles=way[:-1],
        source="Du et al., Gradient Descent Can Take Exponential Time to Escape Saddle Points (2017)",
    )


class Position(nn.Module):
    """A module whose one parameter ``x`` [d] is a point."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start.clone())


def function_task(function: Function, start: Sequence[float] | Tensor | None = None) -> Task:
    """The task of minimising a function: one parameter ``x`` [d], no data.

    Args:
        function: What to minimise.
        start: Where every run starts; ``function.start`` if None. A floating tensor keeps its dtype, other
            numbers take torch's default dtype.

    Raises:
        LosslabError: If the start has not d coordinates.

    Example:
        >>> task = function_task(rosenbrock)
        >>> model = task.model()
        >>> model.x.tolist(), round(task.loss(model, None).item(), 2)
        ([-1.2000000476837158, 1.0], 24.2)
    """
    point = torch.as_tensor(function.start if start is None else start).detach()
    if not point.is_floating_point():
        point = point.to(torch.get_default_dtype())
    if point.shape != (function.dimension,):
        raise LosslabError(
            f"the start has shape {tuple(point.shape)}, {function.name} has {function.dimension} variables: "
            f"pass {function.dimension} numbers"
        )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return function.f(model.x)  # type: ignore[arg-type]

    return Task(model=lambda: Position(point), loss=loss, train=None, name=function.name)
