"""The linear losses of Reddi, Kale & Kumar 2018: what theory says of Adam on them, and the runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.engine.randomness import generator
from losslab.rules import SGD, Adam, AdamNC, AMSGrad, Rule, stepper
from losslab.rules.schedules import inverse_sqrt

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

LARGE, SMALL, PERIOD = 1010.0, -10.0, 101
"""The gradients of the online sequence: the large one once a period, the small one otherwise."""

MEAN = (LARGE + (PERIOD - 1) * SMALL) / PERIOD
RANDOM_SHARE = 0.01
RANDOM_MEAN = RANDOM_SHARE * LARGE + (1 - RANDOM_SHARE) * SMALL
"""The mean gradients of the sequence and of its stochastic version; twice that is the regret of x = 1."""

BETA1, BETA2 = 0.9, 0.99
BETA2S = (0.9, 0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999, 0.99997, 0.99999)
OFFSETS = tuple(range(0, 100, 10))
RATE = 3.5  # `rate()`, rounded
RANDOM_RATE = 0.57  # `random_rate()`, rounded
PLAIN = "Adam, no correction"

Progress = Callable[[str], None]


def period(beta1: float, beta2: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Adam's ``m`` and ``v`` after each gradient of a period, the large one first, once they repeat."""
    k = np.arange(PERIOD, dtype=np.float64)
    peaks = [(1 - beta) * beta**k / (1 - beta**PERIOD) for beta in (beta1, beta2)]
    return SMALL + (LARGE - SMALL) * peaks[0], SMALL**2 + (LARGE**2 - SMALL**2) * peaks[1]


def drift(beta2: float, beta1: float = BETA1) -> float:
    """How far Adam moves towards the optimum -1 in a period, in units of the rate; negative: towards +1."""
    m, v = period(beta1, beta2)
    return float((m / np.sqrt(v)).sum())


def critical_beta2() -> float:
    """The decay at which Adam's drift changes its sign.

    Example:
        >>> round(critical_beta2(), 4)
        0.9995
    """
    from scipy.optimize import brentq

    return 1 - 10 ** float(brentq(lambda power: drift(1 - 10**power), -5, -2))


def rate() -> float:
    """The ``alpha`` in ``alpha/sqrt(t)`` at which every remedied rule can reach -1 and then stay near it.

    AMSGrad, the slowest, drifts by ``10 alpha_t/sqrt(v_max)`` a period, so by ``a alpha sqrt(T)`` in T steps;
    it must manage the 1.9 from +1 to -0.9. AdamNC, the widest, swings by ``b alpha_t`` within a period, which
    must be at most 0.1 at T. The bounds ``1.9/(a sqrt(T))`` and ``0.1 sqrt(T)/b`` have a geometric mean
    without T, and leave room from T = 1.2e5 on.

    Example:
        >>> round(rate(), 1)
        3.5
    """
    travel = 2 * MEAN / math.sqrt(period(BETA1, BETA2)[1].max())
    swing = (PERIOD - 1) * -SMALL / math.sqrt((LARGE**2 + (PERIOD - 1) * SMALL**2) / PERIOD)
    return math.sqrt(1.9 / travel * 0.1 / swing)


def random_rate(largest: float = 8.0) -> tuple[float, float]:
    """The same for AMSGrad on the stochastic version: ``alpha``, and the horizon from which there is room.

    With ``w`` the root of the largest v, AMSGrad drifts by 0.2/w and jitters by 101/w, in units of the rate,
    at each step. It must manage 1.9 in T steps, and the share above -0.9 of the stationary law at T, an
    exponential one with the mean ``101^2 alpha_T / (0.4 w)``, must be at most 1 %.

    Args:
        largest: The largest v over the horizon in units of the share of one large gradient; v is shot noise
            with one pulse a memory on average, and 8 is about the most that 10^7 steps show.

    Example:
        >>> alpha, horizon = random_rate()
        >>> round(alpha, 1), round(horizon / 1e6, 1)
        (0.6, 5.6)
    """
    w = math.sqrt(largest * (1 - BETA2) * LARGE**2)
    square = RANDOM_SHARE * LARGE**2 + (1 - RANDOM_SHARE) * SMALL**2
    travel = 2 * RANDOM_MEAN / w
    spread_out = square / (2 * RANDOM_MEAN * w) * math.log(100)
    return math.sqrt(1.9 / travel * 0.1 / spread_out), 1.9 / travel / (0.1 / spread_out)


def contestants(alpha: float, beta2s: tuple[float, ...], members: int) -> dict[str, Rule]:
    """The rules of the comparison; Adam has as many members for each decay as there are streams."""
    lr = inverse_sqrt(alpha)
    sweep = torch.tensor(beta2s, dtype=torch.float64).repeat_interleave(members)
    decay = sweep if len(beta2s) > 1 else beta2s[0]
    root = math.sqrt(period(BETA1, BETA2)[1].max())
    return {
        "Adam": Adam(lr=lr, beta1=BETA1, beta2=decay, eps=0.0, box=1.0),
        PLAIN: Adam(lr=lr, beta1=BETA1, beta2=BETA2, eps=0.0, box=1.0, variant="uncorrected"),
        "AMSGrad": AMSGrad(lr=lr, beta1=BETA1, beta2=BETA2, eps=0.0, box=1.0),
        "AdamNC": AdamNC(lr=lr, beta1=BETA1, eps=0.0, box=1.0),
        "SGD": SGD(lr=inverse_sqrt(alpha / root), box=1.0),
    }


def online(start: int, stop: int, offsets: tuple[int, ...] = OFFSETS) -> Tensor:
    """Gradients of steps ``start`` to ``stop - 1``, ``[steps, offsets]``; an offset shifts the sequence."""
    at = torch.arange(start, stop)[:, None] + torch.tensor(offsets)
    return torch.where(at % PERIOD == 0, LARGE, SMALL).double()


def random_stream(start: int, stop: int, seeds: int) -> Tensor:
    """The stochastic version: the large gradient with probability 0.01, ``[steps, seeds]``."""
    columns = [
        torch.rand(stop - start, generator=generator(seed, "stream", start)) < RANDOM_SHARE
        for seed in range(seeds)
    ]
    return torch.where(torch.stack(columns, dim=1), LARGE, SMALL).double()


def drive(
    rules: Mapping[str, Rule],
    gradients: Callable[[int, int], Tensor],
    steps: int,
    mean: float,
    progress: Progress,
    chunk: int = 100 * PERIOD,
) -> pd.DataFrame:
    """Runs every rule from x = 0 on linear losses ``g_t x`` over [-1, 1].

    Args:
        rules: By name. One with more members than there are streams takes the streams again and again.
        gradients: ``(start, stop) -> [stop - start, streams]``.
        steps: The horizon T.
        mean: The mean gradient, positive, so that -1 is the best fixed point.
        progress: Told now and then.
        chunk: Steps between two looks at the trajectories.

    Returns:
        At about 40 steps a decade, T/10 and T: the point ``x`` played at that step, the average regret so
        far against -1 (``exact``), and the same with the mean gradient in place of each (``expected``).
    """
    import pandas as pd

    kept = np.unique(np.r_[np.logspace(0, np.log10(steps), int(40 * np.log10(steps))), steps / 10, steps])
    kept = np.unique(kept.astype(int)) - 1
    width = gradients(0, 1).shape[1]
    xs = {name: {"x": torch.zeros(rule.members() or width).double()} for name, rule in rules.items()}
    states = {name: rule.init(xs[name]) for name, rule in rules.items()}
    sums = {name: torch.zeros(2, xs[name]["x"].numel()).double() for name in rules}
    tables = []
    for start in range(0, steps, chunk):
        stop = min(start + chunk, steps)
        progress(f"step {start:,} of {steps:,}")
        now = kept[(kept >= start) & (kept < stop)]
        stream = gradients(start, stop)
        for name, rule in rules.items():
            g = stream.repeat(1, xs[name]["x"].numel() // width)
            path, xs[name], states[name] = _advance(rule, g, xs[name], states[name], start)
            total = torch.stack([g * (path + 1), mean * (path + 1)]).cumsum(1) + sums[name][:, None]
            sums[name] = total[:, -1]
            at = torch.from_numpy(now - start)
            tables.append(_rows(name, rule, now + 1, path[at], total[:, at], width))
    return pd.concat(tables, ignore_index=True)


def _advance(
    rule: Rule, gradients: Tensor, x: dict[str, Tensor], state: dict[str, dict[str, Tensor]], start: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The points before each update, and where and in what state the rule ends; the box is [-1, 1]."""
    kernel = stepper(rule.replace(box=None)) if rule.members() is None else None
    path = []
    with torch.inference_mode():  # a tenth faster, and these points are never differentiated
        for step, g in enumerate(gradients.unbind(0), start):
            if kernel is None:
                path.append(x["x"])
                x, state = rule.update({"x": g}, state, x, step)
            else:
                path.append(x["x"].clone())
                kernel({"x": g}, state, x, step)
                x["x"].clamp_(-1.0, 1.0)
        return torch.stack(path), x, state


def _rows(
    name: str, rule: Rule, steps: NDArray[np.int64], x: Tensor, sums: Tensor, width: int
) -> pd.DataFrame:
    import pandas as pd

    members = x.shape[1]
    beta2 = np.broadcast_to(np.asarray(getattr(rule, "beta2", np.nan), dtype=np.float64), members)
    average = sums / torch.from_numpy(steps)[:, None]
    return pd.DataFrame(
        {
            "rule": name,
            "beta2": np.tile(beta2, len(steps)),
            "run": np.tile(np.arange(members) % width, len(steps)),
            "step": np.repeat(steps, members),
            "x": x.flatten().numpy(),
            "exact": average[0].flatten().numpy(),
            "expected": average[1].flatten().numpy(),
        }
    )


def theorem_1(instances: int = 100, steps: int = 3000, seed: int = 0) -> pd.DataFrame:
    """How far Adam is from the worst point +1 at the start of each period of Theorem 1's sequence, at most.

    ``C x`` at every third step, ``-x`` otherwise; beta1 = 0, beta2 = 1/(1 + C^2), start +1, and random
    C > 2 and alpha < sqrt(1 - beta2).
    """
    import pandas as pd

    u, v = torch.rand(2, instances, generator=generator(seed, "theorem 1"), dtype=torch.float64)
    large = 2 + 18 * u.clamp(min=1e-3)
    beta2 = 1 / (1 + large**2)
    alpha = 0.99 * v.clamp(min=1e-3) * (1 - beta2).sqrt()
    lr = inverse_sqrt(alpha.tolist())
    rule = Adam(lr=lr, beta1=0.0, beta2=beta2, eps=0.0, box=1.0, variant="uncorrected")
    x = {"x": torch.ones_like(large)}
    gradients = torch.stack([large if step % 3 == 0 else -torch.ones_like(large) for step in range(steps)])
    path, _, _ = _advance(rule, gradients, x, rule.init(x), 0)
    gap = (path[::3] - 1).abs().amax(0)
    return pd.DataFrame({"C": large.numpy(), "alpha": alpha.numpy(), "deviation": gap.numpy()})


_ONLINE: dict[int, pd.DataFrame] = {}


def sequence(steps: int, progress: Progress) -> pd.DataFrame:
    """The online run, which C31 and C32 judge both: done once a process."""
    if steps not in _ONLINE:
        _ONLINE[steps] = drive(contestants(RATE, BETA2S, len(OFFSETS)), online, steps, MEAN, progress)
    return _ONLINE[steps]
