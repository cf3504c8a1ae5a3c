"""An optimum that jumps: how long AdaGrad and RMSProp take to find it again, for C24."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.lecture.driving import drive
from losslab.lecture.tuning import rates, tune
from losslab.rules import AdaGrad, RMSProp, Rule

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

ARMS: dict[str, tuple[type[Rule], list[float]]] = {
    "AdaGrad": (AdaGrad, rates(0.03, 3.0)),
    "RMSProp": (RMSProp, rates(1e-3, 0.1)),
}
"""The rules, and the rates tried first."""

TORCH_DEFAULT = 0.01
"""The default rate of torch's Adagrad and of its RMSprop."""


class Jumping:
    """``|x - c|^2 / 2`` in ten dimensions with standard normal gradient noise, whose optimum c jumps once.

    Args:
        seeds: One a member: draws the two optima and the noise.
        jumps: The step of each member's jump.
        steps: How long a run may be.
    """

    def __init__(self, seeds: Sequence[int], jumps: Sequence[int], steps: int, dimension: int = 10) -> None:
        self.jumps = torch.tensor(jumps)
        names = sorted(set(seeds))
        which = torch.tensor([names.index(seed) for seed in seeds])
        drawn = []
        for seed in names:
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randn(steps + 2, dimension, generator=generator, dtype=torch.float64))
        numbers = torch.stack(drawn, dim=1)
        self.optima, self.noise, self.which = numbers[:2, which], numbers[2:], which

    def run(self, rule: Rule, steps: int) -> Tensor:
        """The loss without noise of every member before each step, ``[steps, N]``."""
        moves = drive(rule, self._gradient, torch.zeros_like(self.optima[0]), steps)
        return torch.stack([(move.before - self._optimum(move.step)).square().sum(1) / 2 for move in moves])

    def _gradient(self, x: Tensor, step: int) -> Tensor:
        return x - self._optimum(step) + self.noise[step][self.which]

    def _optimum(self, step: int) -> Tensor:
        return torch.where((step < self.jumps)[:, None], self.optima[0], self.optima[1])


def recoveries(seeds: Sequence[int], jumps: Sequence[int], horizon: int) -> dict[str, pd.DataFrame]:
    """Steps after the jump until the excess loss is below a tenth of what the jump made it.

    Each arm runs at the rate with the least mean excess over the longest time before a jump, tuned on other
    seeds, and at torch's default. A run that takes longer than ``horizon`` has not recovered: inf.
    """
    import pandas as pd

    tables, tunings, traces = [], [], []
    for arm, (rule, grid) in ARMS.items():
        calm = max(jumps)

        def score(lrs: list[float], members: list[int], rule: type[Rule] = rule, calm: int = calm) -> Tensor:
            return Jumping(members, [calm] * len(members), calm).run(rule(lr=lrs), calm).mean(0)

        tuning = tune(score, grid, seeds=[1000, 1001, 1002])
        tunings.append(tuning.table.assign(arm=arm, chosen=tuning.lr, at_edge=tuning.at_edge))
        choices = {"tuned": tuning.lr, "default": TORCH_DEFAULT}
        settings = [(choice, lr, jump, s) for choice, lr in choices.items() for jump in jumps for s in seeds]
        table = pd.DataFrame(settings, columns=["choice", "lr", "jump", "seed"]).assign(arm=arm)
        problem = Jumping(table.seed.tolist(), table.jump.tolist(), calm + horizon)
        excess = problem.run(rule(lr=table.lr.tolist()), calm + horizon).numpy()
        tables.append(table.assign(steps=_recovered(excess, table.jump.to_numpy(), horizon)))
        shown = np.arange(max(0, calm - 200), calm + min(horizon, 2000), 10)
        for choice in choices:
            (member, *_) = table.index[(table.choice == choice) & (table.jump == calm)]
            trace = pd.DataFrame({"since": shown - calm, "excess": excess[shown, member]})
            traces.append(trace.assign(arm=arm, choice=choice))
    return {
        "recovery": pd.concat(tables, ignore_index=True),
        "recovery_trace": pd.concat(traces, ignore_index=True),
        "recovery_tuning": pd.concat(tunings, ignore_index=True),
    }


def _recovered(excess: NDArray[np.float64], jumps: NDArray[np.int64], horizon: int) -> list[float]:
    times = []
    for member, jump in enumerate(jumps):
        after = excess[jump : jump + horizon, member]
        low = np.flatnonzero(after < after[0] / 10)
        times.append(float(low[0]) if low.size else float("inf"))
    return times
