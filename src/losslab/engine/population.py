"""A population: N networks with their rule state, hyperparameters, seeds, data order and history."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from losslab.engine import checkpoints
from losslab.engine import masks as masking
from losslab.engine.history import History
from losslab.engine.plan import Plan
from losslab.engine.points import Points, Stack
from losslab.engine.updating import TorchRule
from losslab.errors import LosslabError
from losslab.rules import Rule
from losslab.rules.rule import State
from losslab.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from losslab.engine.execution import Execution

NEVER = -1


@dataclass(frozen=True, repr=False)
class Branch:
    """Where runs go on from: as `Population.branch` gives it.

    Attributes:
        points: Weights and buffers, N members.
        state: The rule's state, slot -> name -> ``[N, ...]``; empty for a rule that starts afresh.
        step: Updates done so far: batches and schedules go on from there.
    """

    points: Points
    state: State = field(default_factory=dict)
    step: int = 0


@dataclass(repr=False)
class Population:
    """N networks trained together. Index it for an ordinary module, read `history` for what happened.

    Attributes:
        task: What was minimised.
        rule: With one value a member where members differ.
        plan: The settings of the run.
        seeds: One a member: its initial weights, data order and dropout are functions of it.
        points: Weights and buffers of all members.
        state: The rule's state, slot -> name -> ``[N, ...]``.
        masks: True where a weight lives, name -> bool ``[N, ...]``; names without a mask live whole.
        step: Updates done.
        first: The step it began with, that of the branch it started from.
        diverged: Step at which a member's loss stopped being finite, ``[N]``; -1 for never. Its weights are
            NaN from there on.
        stopped: Step at which a member was stopped early, ``[N]``; -1 for never.
    """

    task: Task
    rule: Rule | TorchRule
    plan: Plan
    seeds: list[int]
    points: Points
    template: nn.Module
    log: History
    state: State = field(default_factory=dict)
    masks: Stack = field(default_factory=dict)
    optimizers: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    first: int = 0
    diverged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    stopped: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    best: dict[str, Tensor] = field(default_factory=dict)
    execution: Execution | None = None
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("diverged", "stopped"):
            if getattr(self, name).numel() == 0:
                setattr(self, name, torch.full((len(self.seeds),), NEVER, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.seeds)

    def __repr__(self) -> str:
        ended = [
            f"{int((t != NEVER).sum())} {how}"
            for how, t in (("diverged", self.diverged), ("stopped early", self.stopped))
            if bool((t != NEVER).any())
        ]
        told = ", ".join(
            [f"{len(self)} members", self.rule.name, self.task.name, f"step {self.step}", *ended]
        )
        return f"Population({told})"

    def __getitem__(self, member: int) -> nn.Module:
        """An ordinary module with one member's weights and buffers, in evaluation mode; a copy."""
        if not -len(self) <= member < len(self):
            raise IndexError(f"member {member} of {len(self)}: pass 0 to {len(self) - 1}")
        module = self.points.load_into(copy.deepcopy(self.template), member)
        return module.eval()

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(len(self)))

    @property
    def active(self) -> Tensor:
        """Indices of the members that still train: neither diverged nor stopped."""
        return torch.nonzero((self.diverged == NEVER) & (self.stopped == NEVER)).flatten()

    @property
    def hyperparameters(self) -> dict[str, list[Any]]:
        """Hyperparameters that differ between members, name -> one value a member."""
        told = self.rule.describe()
        return {n: v for n, v in told.items() if isinstance(v, list) and len(v) == len(self)}

    @property
    def history(self) -> pd.DataFrame:
        """One row a (step, member): step, epoch, member, seed, hyperparameters that differ, measurements.

        A row at step k speaks of the weights after k updates: ``loss`` and ``gradient_norm`` are of the
        mini-batch used for update k+1, ``update_norm`` is the length of that update, ``accuracy`` the same
        batch's (in evaluation mode); columns that begin with the name of a data set are over all of it.
        """
        return self.log.table(self.per_epoch, {"seed": list(self.seeds), **self.hyperparameters})

    @property
    def per_epoch(self) -> int:
        """Updates an epoch."""
        return 1 if self.task.train is None else self.plan.batches(len(self.task.train), self.seeds).per_epoch

    def summary(self) -> pd.DataFrame:
        """One row a member: seed, hyperparameters, its last measurements, and how it ended."""
        import pandas as pd

        columns: dict[str, Any] = {
            "member": list(range(len(self))),
            "seed": self.seeds,
            **self.hyperparameters,
        }
        for name, values in self.log.tensors().items():
            if name != "steps" and values.numel():
                columns[name] = [_last_finite(values[:, i]) for i in range(len(self))]
        columns["ended"] = [self._ending(i) for i in range(len(self))]
        return pd.DataFrame(columns)

    def _ending(self, i: int) -> str:
        if self.diverged[i] != NEVER:
            return f"diverged at step {int(self.diverged[i])}"
        if self.stopped[i] != NEVER:
            return f"stopped at step {int(self.stopped[i])}"
        return f"step {self.step}"

    def best_points(self) -> Points:
        """Weights and buffers of each member's best evaluation, where early stopping kept them.

        Raises:
            LosslabError: None were kept.
        """
        if "score" not in self.best or not any(n.startswith("weights/") for n in self.best):
            raise LosslabError('no best weights were kept: train with stop=EarlyStopping(restore="keep")')
        weights = {n: self.best[f"weights/{n}"] for n in self.points.weights}
        return Points(weights, {n: self.best[f"buffers/{n}"] for n in self.points.buffers})

    def branch(self, members: Sequence[int] | Tensor | None = None) -> Branch:
        """A place to start other runs from: weights, rule state and step of some members (all by default).

        Raises:
            LosslabError: The rule is a torch optimizer, whose state cannot be handed on.
        """
        if isinstance(self.rule, TorchRule) and self.step > self.first:
            raise LosslabError(
                f"the state of {self.rule.name} cannot be handed on: train with a losslab rule, or start "
                "from the weights alone (start=population.points)"
            )
        rows = torch.as_tensor(range(len(self)) if members is None else members, dtype=torch.long)
        state = {s: {n: t[rows.to(t.device)] for n, t in ts.items()} for s, ts in self.state.items()}
        return Branch(self.points.select(rows), state, self.step)

    # -- disk ------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as named tensors."""
        flat = {f"weights/{n}": t for n, t in self.points.weights.items()}
        flat |= {f"buffers/{n}": t for n, t in self.points.buffers.items()}
        flat |= {f"state/{slot}/{n}": t for slot, ts in self.state.items() for n, t in ts.items()}
        flat |= {f"optimizers/{n}": t for n, t in self.optimizers.items()}
        flat |= {f"history/{n}": t for n, t in self.log.tensors().items()}
        flat |= {f"best/{n}": t for n, t in self.best.items()}
        flat |= {f"masks/{n}": t for n, t in self.masks.items()}
        return flat | {"diverged": self.diverged, "stopped": self.stopped}

    def settings(self) -> dict[str, Any]:
        """What identifies the run, as JSON values: a checkpoint of other settings is refused."""
        train = self.task.train
        told = {
            "task": self.task.name,
            "examples": None if train is None else len(train),
            "parameters": {n: list(t.shape[1:]) for n, t in self.points.items()},
            "rule": self.rule.describe(),
            "seeds": self.seeds,
            "masks": masking.told(self.masks),
            "first": self.first or None,
            **self.plan.describe(),
        }
        # A function prints with its address, which is another in the process that resumes.
        return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(told, default=_plain)))

    def meta(self) -> dict[str, Any]:
        """The settings and the place reached, as JSON values."""
        from losslab.provenance import machine

        told: dict[str, Any] = {"settings": self.settings(), "step": self.step, "machine": machine()}
        told["columns"] = self.log.columns
        told["execution"] = None if self.execution is None else self.execution.describe()
        return told

    def save(self, path: str | Path) -> None:
        """Writes weights, state, history and settings to one safetensors file, atomically."""
        checkpoints.write(Path(path), self.tensors(), self.meta())

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Takes over what a checkpoint holds.

        Raises:
            LosslabError: The checkpoint is of other settings; the differing ones are named.
        """
        differing = _differences(meta["settings"], self.settings())
        if differing:
            raise LosslabError(
                f"the saved run has other settings ({'; '.join(differing)}): use the same, or another folder"
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        device = self.plan.device
        self.points = Points(
            {n: groups["weights"][n].to(device) for n in self.points.weights},
            {n: groups["buffers"][n].to(device) for n in self.points.buffers},
        )
        self.state = {}
        for name, tensor in groups.get("state", {}).items():
            slot, _, rest = name.partition("/")
            self.state.setdefault(slot, {})[rest] = tensor.to(device)
        self.state = {
            s: {n: ts[n] for n in [*self.points.weights, ""] if n in ts} for s, ts in self.state.items()
        }
        self.optimizers = groups.get("optimizers", {})
        self.best = groups.get("best", {})
        self.masks = {n: groups["masks"][n].to(device) for n in self.masks}
        self.log = History.from_tensors(
            len(self), {c: groups["history"][c] for c in ["steps", *meta["columns"]]}
        )
        self.diverged, self.stopped = tensors["diverged"], tensors["stopped"]
        self.step = int(meta["step"])


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _last_finite(column: Tensor) -> float:
    finite = column[torch.isfinite(column)]
    return float(finite[-1]) if finite.numel() else math.nan


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two settings, the rule's options told one by one."""
    told = []
    saved, wanted = saved | saved["rule"], wanted | wanted["rule"]
    for name in sorted({*saved, *wanted}):
        a, b = saved.get(name), wanted.get(name)
        if name == "steps" and isinstance(a, int) and isinstance(b, int) and b >= a:
            continue  # a finished run may be asked to go on
        if a != b:
            told.append(f"{name} was {_short(a)}, now {_short(b)}")
    return told


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


__all__ = ["NEVER", "Branch", "Population"]
