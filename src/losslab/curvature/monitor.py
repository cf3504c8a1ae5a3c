"""Curvature through training, at a stated cost: for `losslab.train` and for loops of your own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from losslab.curvature.eigen import eigenpairs
from losslab.curvature.finding import placed
from losslab.curvature.products import Hessian
from losslab.curvature.stability import Limit, Preconditioned, limit_of, limit_of_torch
from losslab.engine import Objective, Points, Population
from losslab.engine.randomness import generator
from losslab.errors import LosslabError
from losslab.tasks import Data

if TYPE_CHECKING:
    import pandas as pd

PARTS = 8
"""Small batches into which the examples are cut for the gradient noise."""


class CurvatureMonitor:
    """Sharpness and its relatives as training goes on, never more often than a budget allows.

    Give it to `losslab.train` as ``watch=monitor, record=monitor.when``; in a loop of your own make it by
    `attached` and call `after_step` once an update. It looks when all its looks so far, and one more like
    the last, take at most ``budget`` of the time that training took; the first look comes at once. What it
    looks at is always the same examples; nothing of the networks or of torch's random state moves. Where
    time decides, two runs look at different steps; ``every`` fixes the steps instead.

    The columns of `table`, one row a (step, member):

    - ``loss``: on the examples of the monitor.
    - ``sharpness``: the largest eigenvalue of the Hessian, by Lanczos started from the last one's vector;
      ``bound``: how far off it may be; NaN where the search did not converge.
    - ``preconditioned``: the same of ``D^(-1/2) H D^(-1/2)``, D the adaptive rule's metric; equal to the
      sharpness for rules without one, NaN where the metric is not known.
    - ``limit``: the stability limit of the rule in use, ``2/lr`` for descent, see `stability.limit_of`;
      ``ratio``: preconditioned / limit; above 1 a quadratic of this curvature would diverge.
    - ``critical``: the critical sharpness ``2 / lr_c``, where lr_c is the least rate at which a step along
      ``-D^(-1) g`` would raise the loss; 0 where none up to 1000 lr does. At most the preconditioned
      sharpness on a quadratic, and known from values alone.
    - ``noise``: the gradient noise scale ``tr(Sigma) / |g|^2``, an estimate from batches of an eighth of
      the examples: the batch size at which noise and gradient weigh the same (McCandlish et al. 2018).
    - ``alpha``: where a step ``-lr D^(-1) g`` ends on the parabola through the slopes at its ends: -1 at its
      start, 0 at the bottom, 1 as high as the start on the other side (Schneider et al. 2021).
    - ``seconds``: what the look took.

    Args:
        budget: Share of the training time that looks may take.
        every: Steps between looks, in place of the budget.
        examples: Training examples looked at: their number, or examples themselves.
        tol: Residual of the eigenvalue, relative to it.

    Raises:
        LosslabError: A budget or a number of steps that is not positive.

    Example:
        >>> from losslab import train
        >>> from losslab.tasks import mlp, supervised
        >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> task = supervised(mlp(3, 8, 2, activation="tanh"), train=(x, (x[:, 0] > 0).long()))
        >>> monitor = CurvatureMonitor(every=10)
        >>> _ = train(task, "gd", seeds=2, steps=31, watch=monitor, record=monitor.when, progress=False)
        >>> monitor.steps, bool((monitor.table.sharpness > 0).all())
        ([1, 11, 21, 31], True)
    """

    def __init__(
        self, budget: float = 0.05, every: int | None = None, examples: int | Any = 512, tol: float = 1e-2
    ) -> None:
        if not budget > 0 or (every is not None and every < 1):
            raise LosslabError(f"budget is {budget} and every is {every}: pass positive numbers")
        self.budget, self.every, self.examples, self.tol = budget, every, examples, tol
        self.rows: list[dict[str, Any]] = []
        self.spent, self.last = 0.0, 0.0
        self.began: float | None = None
        self.due = False
        self.vectors: dict[str, Tensor] = {}
        self.objective: Objective | None = None
        self.operator: Any = None
        self.module: nn.Module | None = None
        self.count = 0

    # -- when ------------------------------------------------------------------------------------------

    def when(self, step: int) -> bool:
        """For ``record=``: whether the update after ``step`` others is to be looked at."""
        now = time.monotonic()
        if self.began is None:
            self.began = now
        if self.every is not None:
            self.due = step % self.every == 0
        else:
            trained = now - self.began - self.spent
            self.due = not self.rows or self.spent + self.last <= self.budget * trained
        return self.due

    @property
    def overhead(self) -> float:
        """What looking took so far, as a share of the time that training itself took."""
        if self.began is None:
            return 0.0
        trained = time.monotonic() - self.began - self.spent
        return self.spent / trained if trained > 0 else float("inf")

    @property
    def steps(self) -> list[int]:
        """The steps that were looked at."""
        return list(dict.fromkeys(row["step"] for row in self.rows))

    @property
    def table(self) -> pd.DataFrame:
        """One row a (step, member), see the class."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    # -- who is looked at ------------------------------------------------------------------------------

    def __call__(self, population: Population) -> None:
        """One look at a population, if `when` said so."""
        if not self.due:
            return
        start = time.monotonic()
        if self.objective is None:
            data = self._probe(population.task.train)
            self.objective = Objective(population.task, data, module=population.template)
        alive = population.active.tolist()
        if alive:
            points = population.points.select(alive)
            state = {s: {n: t[alive] for n, t in ts.items()} for s, ts in population.state.items()}
            limit = limit_of(population.rule.select(alive), state, points, population.step)
            self._look(points, limit, population.step, alive)
        self._pay(start)

    @classmethod
    def attached(cls, module: nn.Module, loss: Any, examples: Any, **settings: Any) -> CurvatureMonitor:
        """A monitor of one module in a loop of your own.

        Args:
            module: The module that is trained.
            loss: ``loss(module, batch)``, the mean over the batch's examples.
            examples: What it is looked at on: a batch, or anything that `Data.of` reads.
            **settings: As for the class.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> x = torch.ones(8, 2)
            >>> monitor = CurvatureMonitor.attached(model, lambda m, b: m(b).square().mean(), x)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> for _ in range(2):
            ...     model(x).square().mean().backward()
            ...     optimizer.step()
            ...     monitor.after_step(optimizer)
            >>> monitor.table.limit.round(6).tolist()[0]
            20.0
        """
        monitor = cls(examples=examples, **settings)
        monitor.module = module
        monitor.objective = Objective.of(module, loss, Data.of(examples))
        return monitor

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """To be called after each update of the module; looks when it is time.

        Args:
            optimizer: Of the module, for the limit and the metric; both are unknown without it.
        """
        if self.module is None:
            raise LosslabError("the monitor has no module: make it by CurvatureMonitor.attached(module, ...)")
        self.count += 1
        if not self.when(self.count - 1):
            return
        start = time.monotonic()
        points = Points.from_modules([self.module])
        parameters: list[Tensor] = [p for p in self.module.parameters() if p.requires_grad]
        limit = None if optimizer is None else limit_of_torch(optimizer, parameters)
        if bool(torch.isfinite(points.matrix()).all()):
            self._look(points, limit, self.count, [0])
        self._pay(start)

    def _probe(self, train: Data | None) -> Any:
        if not isinstance(self.examples, int):
            return self.examples
        return "train" if train is None else train.head(min(len(train), self.examples))

    def _pay(self, start: float) -> None:
        self.last = time.monotonic() - start
        self.spent += self.last
        self.due = False

    # -- what is measured ------------------------------------------------------------------------------

    def _look(self, points: Points, limit: Limit | None, step: int, members: list[int]) -> None:
        start = time.monotonic()
        assert self.objective is not None
        self.operator = Hessian(self.objective, points) if self.operator is None else self.operator.at(points)
        loss, gradient = self.objective.gradient(points)
        slope = gradient.matrix()
        sharpness, bound = self._top("plain", self.operator, members)
        nothing = torch.full_like(sharpness, torch.nan)
        told = {"loss": loss, "sharpness": sharpness, "bound": bound, "noise": self._noise(points, slope)}
        if limit is None:
            told |= dict.fromkeys(("preconditioned", "limit", "ratio", "critical", "alpha"), nothing)
        else:
            top = sharpness
            if limit.metric is not None:
                top = self._top("metric", Preconditioned(self.operator, limit.metric), members)[0]
            told |= {"preconditioned": top, "limit": limit.most, "ratio": top / limit.most}
            move = -limit.lr.to(slope)[:, None] * (slope if limit.metric is None else slope / limit.metric)
            told |= self._along(points, loss, slope, move, limit.lr)
        self.operator.release()
        seconds = time.monotonic() - start
        columns = {name: value.detach().cpu().double().tolist() for name, value in told.items()}
        for i, member in enumerate(members):
            row = {name: column[i] for name, column in columns.items()}
            self.rows.append({"step": step, "member": member, **row, "seconds": seconds})

    def _top(self, name: str, matrix: Any, members: list[int]) -> tuple[Tensor, Tensor]:
        """The largest eigenvalue at each point and its bound, ``[N]``."""
        key = f"{name} {members}"
        start = self.vectors.get(key)
        found = eigenpairs(
            matrix, 1, tol=self.tol, start=start, second_look=start is None, generator=generator(0, "monitor")
        )
        self.vectors = {k: v for k, v in self.vectors.items() if not k.startswith(name)}
        self.vectors[key] = found.vectors.nan_to_num()
        values, residuals, sure = (
            t.reshape(len(members), -1)[:, 0] for t in (found.values, found.residuals, found.converged)
        )
        return torch.where(sure, values, torch.nan), residuals

    def _noise(self, points: Points, slope: Tensor) -> Tensor:
        """``tr(Sigma) / |g|^2`` from the gradients of all examples and of eighths of them."""
        assert self.objective is not None
        data = self.objective.data
        if data is None or len(data) < 2 * PARTS:
            return torch.full((points.members,), torch.nan)
        small = len(data) // PARTS
        squares = torch.zeros(points.members, dtype=torch.float64)
        for k in range(PARTS):
            index = torch.arange(k * small, (k + 1) * small, device=slope.device)
            part = self.objective.on(data.take(index)).gradient(points)[1].matrix()
            squares += part.double().square().sum(1).cpu() / PARTS
        whole, big = slope.double().square().sum(1).cpu(), small * PARTS
        trace = (squares - whole) / (1 / small - 1 / big)
        signal = (big * whole - small * squares) / (big - small)
        return torch.where(signal > 0, trace / signal, torch.inf)

    def _along(
        self, points: Points, loss: Tensor, slope: Tensor, move: Tensor, lr: Tensor
    ) -> dict[str, Tensor]:
        """The critical sharpness and alpha of the step ``move``."""
        assert self.objective is not None
        theta = points.matrix()
        first = (slope * move).sum(1)
        after = self.objective.gradient(placed(points, theta + move))[1].matrix()
        alpha = -(after * move).sum(1) / first
        low, high = torch.zeros_like(first), torch.full_like(first, torch.inf)
        length = torch.ones_like(first)
        for _ in range(14):
            value = self.objective.value(placed(points, theta + length[:, None] * move))
            rises = ~(value < loss)
            high, low = torch.where(rises, length, high), torch.where(rises, low, length)
            open_ = torch.isinf(high)
            length = torch.where(
                open_, (4 * length).clamp(max=1000.0), (low.clamp(min=high / 64) * high).sqrt()
            )
        critical = torch.where(torch.isinf(high), 0.0, 2 / (high.double().cpu() * lr.cpu()))
        return {"critical": critical, "alpha": alpha}
