"""How one update is carried out: a rule's equation, its fused kernel, or somebody else's optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from losslab.engine.points import Stack
from losslab.errors import LosslabError, first_line
from losslab.rules import Rule, stepper
from losslab.rules.rule import Curvature, State, Weights

Closure = Callable[[int, list[Tensor]], Tensor]
"""(member, its weights) -> its loss on the current batch, with gradients left on the weights."""


class TorchRule:
    """A `torch.optim` class in place of a rule: one optimizer a member, each on its own slice of the stack.

    Args:
        optimizer: A subclass of `torch.optim.Optimizer`, or a `functools.partial` of one.
        hyper: Its arguments; a list or tensor gives one value a member.

    Example:
        >>> rule = TorchRule(torch.optim.SGD, lr=[0.1, 0.2], momentum=0.9)
        >>> rule.members(), rule.name
        (2, 'torch.SGD')
    """

    full_batch = False

    def __init__(self, optimizer: Any, **hyper: Any) -> None:
        if isinstance(optimizer, partial):
            hyper = {**optimizer.keywords, **hyper}
            optimizer = optimizer.func
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            kind = f"an instance of {type(optimizer).__name__}"
            name = kind if isinstance(optimizer, torch.optim.Optimizer) else repr(optimizer)
            raise LosslabError(
                f"{name} is no torch.optim class: pass one such as torch.optim.Adam, or a losslab rule"
            )
        self.optimizer = optimizer
        self.hyper = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in hyper.items()}
        self.name = f"torch.{optimizer.__name__}"

    @property
    def each(self) -> dict[str, list[Any]]:
        """Arguments that were given one value a member."""
        return {n: v for n, v in self.hyper.items() if isinstance(v, list)}

    def members(self) -> int | None:
        """How many members the arguments speak of, None if they are the same for all."""
        return next((len(v) for v in self.each.values()), None)

    def check_members(self, members: int) -> None:
        """Raises LosslabError when an argument does not fit a population of ``members``."""
        for name, values in self.each.items():
            if len(values) != members:
                raise LosslabError(
                    f"{name} has shape ({len(values)},), the population has {members} members: "
                    "pass a scalar or one value per member"
                )

    def select(self, index: Sequence[int]) -> TorchRule:
        """The arguments of some members."""
        picked = {n: [v[i] for i in index] for n, v in self.each.items()}
        return TorchRule(self.optimizer, **{**self.hyper, **picked})

    def describe(self) -> dict[str, Any]:
        """Name and arguments, for tables and checkpoints."""
        return {"rule": self.name, **self.hyper}

    def build(self, member: int, weights: list[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of one member."""
        told = {n: (v[member] if isinstance(v, list) else v) for n, v in self.hyper.items()}
        try:
            return self.optimizer(weights, **told)
        except (TypeError, ValueError) as error:
            raise LosslabError(
                f"{self.name} was refused its arguments ({error}): change {sorted(told)}"
            ) from error


class Updater:
    """Updates by a losslab rule: in place by a fused kernel where there is one, else by its equation."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.fused = stepper(rule)

    def init(self, weights: Stack) -> State:
        """The rule's state before the first step."""
        return self.rule.init(weights)

    def apply(
        self,
        gradients: Weights,
        state: State,
        weights: Stack,
        step: int,
        curvature: Curvature | None = None,
        closure: Closure | None = None,
    ) -> tuple[Stack, State]:
        """One update; the weights given may be changed in place or replaced."""
        if self.fused is not None:
            self.fused(gradients, state, weights, step)
            return weights, state
        return self.rule.update(gradients, state, weights, step, curvature)

    def load(self, state: State, weights: Stack) -> None:
        """Nothing to restore: the state is all there is."""

    def save(self) -> dict[str, Tensor]:
        """Nothing beside the state."""
        return {}


class TorchUpdater:
    """Updates by one torch optimizer a member."""

    def __init__(self, rule: TorchRule) -> None:
        self.rule = rule
        self.optimizers: list[torch.optim.Optimizer] = []
        self.rows: list[list[Tensor]] = []
        parameter = inspect.signature(rule.optimizer.step).parameters.get("closure")
        self.needs_closure = parameter is not None and parameter.default is inspect.Parameter.empty

    def init(self, weights: Stack) -> State:
        """Builds the optimizers on views of the stack."""
        members = next(iter(weights.values())).shape[0]
        self.rows = [[w.detach()[i].requires_grad_() for w in weights.values()] for i in range(members)]
        self.optimizers = [self.rule.build(i, row) for i, row in enumerate(self.rows)]
        return {}

    def apply(
        self,
        gradients: Weights,
        state: State,
        weights: Stack,
        step: int,
        curvature: Curvature | None = None,
        closure: Closure | None = None,
    ) -> tuple[Stack, State]:
        """Steps each optimizer with its member's gradient."""
        for i, (row, optimizer) in enumerate(zip(self.rows, self.optimizers, strict=True)):
            for w, g in zip(row, gradients.values(), strict=True):
                w.grad = g[i]
            try:
                if self.needs_closure and closure is not None:
                    optimizer.step(partial(closure, i, row))  # type: ignore[arg-type]
                else:
                    optimizer.step()
            except RuntimeError as error:  # such as SparseAdam's, of gradients that are not sparse
                raise LosslabError(
                    f"{self.rule.name} cannot take this step ({first_line(error).rstrip('.')}): choose "
                    "another optimizer, or a losslab rule"
                ) from error
        return weights, state

    def save(self) -> dict[str, Tensor]:
        """Every tensor and number of every optimizer's state, by ``member/weight/name``."""
        told: dict[str, Tensor] = {}
        for i, optimizer in enumerate(self.optimizers):
            for w, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    told |= self._told(f"{i}/{w}/{key}", value)
        return told

    def _told(self, name: str, value: Any) -> dict[str, Tensor]:
        """A value as tensors: ``name#`` for a number, ``name[]`` for the length of a list."""
        if value is None:
            return {}
        if isinstance(value, Tensor):
            return {name: value}
        if isinstance(value, (bool, int, float)):
            kind = torch.float64 if isinstance(value, float) else torch.int64
            return {f"{name}#": torch.tensor(value, dtype=kind)}
        if not isinstance(value, (list, tuple)):
            raise LosslabError(
                f"{self.rule.name} keeps a {type(value).__name__} in its state, which a file cannot hold: "
                "use a losslab rule"
            )
        told = {f"{name}[]": torch.tensor(len(value))}
        for j, each in enumerate(value):
            told |= self._told(f"{name}[{j}]", each)
        return told

    def load(self, saved: dict[str, Tensor], weights: Stack) -> None:
        """Puts back what `save` told."""
        self.init(weights)
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self.optimizers]
        for name, tensor in saved.items():
            member, place, key = name.split("/", 2)
            value: Any = tensor.item() if key.endswith("#") else tensor.clone()
            states[int(member)].setdefault(int(place), {})[key.removesuffix("#")] = value
        for optimizer, row, state in zip(self.optimizers, self.rows, states, strict=True):
            # Not load_state_dict: it would cast the state to the dtype of the weights.
            for i, values in state.items():
                for name in [key for key in values if key.endswith("[]")]:
                    size, name = int(values.pop(name)), name.removesuffix("[]")
                    values[name] = [values.pop(f"{name}[{j}]", None) for j in range(size)]
                optimizer.state[row[i]] = values


def as_rule(rule: Any) -> Rule | TorchRule:
    """A losslab rule as it is, a torch.optim class or partial wrapped, a rule's name looked up."""
    from losslab.rules import make

    if isinstance(rule, (Rule, TorchRule)):
        return rule
    if isinstance(rule, str):
        return make(rule)
    if isinstance(rule, type) and issubclass(rule, Rule):
        return make(rule.name)
    return TorchRule(rule)


def updater(rule: Rule | TorchRule) -> Updater | TorchUpdater:
    """What carries out a rule's updates."""
    return TorchUpdater(rule) if isinstance(rule, TorchRule) else Updater(rule)
