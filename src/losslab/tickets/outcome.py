"""What came of a lottery: tables, paired comparisons, verdicts, and the tickets themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from losslab.engine import Branch, Points, checkpoints, randomness
from losslab.engine.points import Stack
from losslab.errors import LosslabError, unknown
from losslab.rules import State
from losslab.tasks import Task
from losslab.tasks.check import build
from losslab.tickets import comparing
from losslab.tickets.plan import Plan
from losslab.tickets.prunable import Layers

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Outcome:
    """One level of a lottery, one member a replicate.

    Attributes:
        level: Rounds of pruning.
        rows: One a network: arm, replicate, how many weights are left, the early-stop step, measurements
            there and (``final_``) at the end.
        curves: One a (network, evaluation).
        masks: Of the tickets, name -> bool ``[N, *shape]``.
        start: Where the tickets started, unmasked.
        final: Where they ended.
        best: Where their validation loss was least.
        state: The rule's state at the end.
    """

    level: int
    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    masks: Stack
    start: Branch
    final: Points
    best: Points
    state: State = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """To one file, atomically."""
        tensors: dict[str, Tensor] = {f"masks/{n}": m for n, m in self.masks.items()}
        for kind, points in (("start", self.start.points), ("final", self.final), ("best", self.best)):
            tensors |= {f"{kind}/weights/{n}": t for n, t in points.weights.items()}
            tensors |= {f"{kind}/buffers/{n}": t for n, t in points.buffers.items()}
        for kind, state in (("begun", self.start.state), ("state", self.state)):
            tensors |= {f"{kind}/{slot}/{n}": t for slot, ts in state.items() for n, t in ts.items()}
        meta = {"level": self.level, "rows": self.rows, "curves": self.curves, "step": self.start.step}
        # A file keeps no order, and draws for the controls go weight by weight.
        meta["order"] = [*self.final.weights, *self.final.buffers, *self.masks]
        checkpoints.write(path, tensors, meta)

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """What `write` wrote.

        Raises:
            LosslabError: The file is damaged or is not a level of a lottery.
        """
        tensors, meta = checkpoints.read(path)
        if "rows" not in meta:
            raise LosslabError(f"{path} is no level of a lottery: pass the folder of one")
        groups: dict[str, Any] = {}
        place = {name: k for k, name in reversed(list(enumerate(meta["order"])))}
        mask_place = {name: k for k, name in enumerate(meta["order"])}

        def rank(name: str) -> int:
            group, _, rest = name.partition("/")
            return mask_place[rest] if group == "masks" else place.get(rest.partition("/")[2], -1)

        for name, tensor in sorted(tensors.items(), key=lambda item: rank(item[0])):
            group, _, rest = name.partition("/")
            if group == "masks":
                groups.setdefault(group, {})[rest] = tensor
            else:
                part, _, rest = rest.partition("/")
                groups.setdefault(group, {}).setdefault(part, {})[rest] = tensor

        def points(kind: str) -> Points:
            return Points(groups[kind]["weights"], groups[kind].get("buffers", {}))

        start = Branch(points("start"), groups.get("begun", {}), meta["step"])
        state = groups.get("state", {})
        told = (meta["level"], meta["rows"], meta["curves"], groups["masks"], start)
        return cls(*told, points("final"), points("best"), state)


@dataclass
class Lottery:
    """A lottery's levels so far.

    Attributes:
        task: As it was trained, validation data included.
        plan: The plan.
        layers: What was pruned.
        levels: Level by level.
    """

    task: Task
    plan: Plan
    layers: Layers
    levels: list[Outcome]

    @property
    def table(self) -> pd.DataFrame:
        """One row a network: level, arm, replicate, ``remaining`` (P_m), ``stop_step``, measurements.

        ``validation_``, ``test_`` columns are at the early-stop step; ``final_`` ones at the last.
        """
        import pandas as pd

        return pd.DataFrame([row for level in self.levels for row in level.rows])

    @property
    def curves(self) -> pd.DataFrame:
        """One row a (network, evaluation): level, arm, replicate, step, validation measurements."""
        import pandas as pd

        return pd.DataFrame([row for level in self.levels for row in level.curves])

    @property
    def score(self) -> str:
        """The column that tickets are judged by: test accuracy, or minus what there is instead."""
        return comparing.score_of(self.levels[0].rows[0])

    def compare(self, level: int) -> pd.DataFrame:
        """Tickets of a level against the dense networks and against each control, pair by pair.

        Returns:
            One row an opponent: mean difference of `score` (ticket minus opponent; losses with their sign
            turned) with its 95 % t interval over replicates, and the mean ratio of early-stop steps
            (opponent / ticket; above 1 the ticket was faster) with its interval, by the logarithm. Networks
            that diverged count with their best look before, and have no early stop.

        Raises:
            LosslabError: The level has no tickets.
        """
        if not 1 <= level < len(self.levels):
            raise LosslabError(f"level {level} has no tickets: pass 1 to {len(self.levels) - 1}")
        return comparing.compare(self.table, level)

    def verdict(self, level: int) -> str:
        """``"winning ticket"``: no worse than dense within the tolerance, and better than every control.

        Each by its 95 % interval of paired differences, level by level, not corrected for the number of
        levels. ``"no winning ticket"`` where an interval lies wholly on the wrong side; ``"undecided"`` in
        between, and where there are no controls.
        """
        return comparing.decide(self.compare(level), self.plan.tolerance)

    def verdicts(self) -> pd.DataFrame:
        """One row a level: P_m, score and early-stop step of tickets (means), and the verdict."""
        return comparing.verdicts(self.table, self.plan.tolerance)

    def sentences(self) -> list[str]:
        """What was found, in sentences."""
        return comparing.sentences(self.table, self.plan.tolerance)

    def line(self, level: int) -> str:
        """A level in a line."""
        row = self.verdicts().iloc[level]
        return (
            f"level {level}: {row.remaining:.2%} of the weights, {self.score.replace('_', ' ')} "
            f"{row[self.score]:.4f}, early stop at {row.stop_step:.0f}, {row.verdict}"
        )

    def masks(self, level: int, replicate: int = 0) -> Stack:
        """One ticket's masks, name -> bool ``[*shape]``."""
        return {n: m[replicate].clone() for n, m in self.outcome(level).masks.items()}

    def outcome(self, level: int) -> Outcome:
        """One level.

        Raises:
            LosslabError: It has not been drawn.
        """
        if not 0 <= level < len(self.levels):
            raise LosslabError(f"level {level} was not drawn: pass 0 to {len(self.levels) - 1}")
        return self.levels[level]

    def instability(self, level: int, at: Sequence[int], **options: Any) -> pd.DataFrame:
        """How stable a level's tickets are to the order of their batches, from their own start.

        Args:
            level: Rounds of pruning; at 0 the dense networks.
            at: As for `losslab.tickets.instability`, which also tells what comes back.
            **options: As there: ``points``, ``data``, ``batch_norm``, ``execution``.
        """
        from losslab.tickets.stability import instability

        drawn, plan = self.outcome(level), self.plan
        given: dict[str, Any] = {
            "steps": plan.steps_at(level)[1],
            "batch_size": plan.batch_size,
            "masks": drawn.masks,
        }
        given |= {"replicates": plan.replicates, "start": drawn.start}
        return instability(self.task, plan.rule, at=at, **given, **options)

    def ticket(self, level: int, replicate: int = 0, weights: str = "best") -> nn.Module:
        """One ticket as an ordinary module whose pruned weights are zero, in evaluation mode.

        Args:
            level: Rounds of pruning.
            replicate: Which.
            weights: ``"start"`` (as the ticket was drawn), ``"best"`` (least validation loss), ``"final"``.
        """
        at = self.outcome(level)
        places = {"start": at.start.points, "best": at.best, "final": at.final}
        if weights not in places:
            raise unknown("weights of a ticket", weights, places)
        with randomness.seeded(self.plan.seeds[replicate], "init"):
            module = build(self.task)
        places[weights].load_into(module, replicate)
        with torch.no_grad():
            for name, mask in self.masks(level, replicate).items():
                module.get_parameter(name).mul_(mask)
        return module.eval()
