"""Schedules: hyperparameters as functions of the step.

Each is a value times a factor that depends on the step. The value is one number, one number a member, or
another schedule, so that schedules compose: ``warmup(cosine(0.1, steps=1000), steps=100)``. They are called
with the step, 0 at the first update, and the papers' ``t`` is ``step + 1``. Like `functools.partial` they
are classes that read as functions; two with the same arguments are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.rules.rule import Hyper


@dataclass(frozen=True)
class constant:
    """The value itself at every step; the base of the other schedules.

    Args:
        value: One number, one number a member, or another schedule.

    Raises:
        LosslabError: The value is none of these.

    Example:
        >>> constant(0.1)(step=7)
        0.1
        >>> constant([0.1, 0.2])(step=7)
        tensor([0.1000, 0.2000], dtype=torch.float64)
    """

    value: Hyper

    def __post_init__(self) -> None:
        """Turns sequences into tuples, and checks the other arguments."""
        if not callable(self.value):
            try:
                value = torch.as_tensor(self.value, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError) as error:
                raise self._wrong("value", "a number, one number a member, or another schedule") from error
            plain = value.tolist() if value.dim() < 2 else None
            if plain is None:
                raise self._wrong("value", "a scalar or one value per member")
            object.__setattr__(self, "value", tuple(plain) if isinstance(plain, list) else plain)
        self.check()

    def check(self) -> None:
        """Raises LosslabError for arguments that make no schedule."""

    def factor(self, step: int) -> float:
        """What the value is multiplied by at a step."""
        return 1.0

    def __call__(self, step: int) -> float | Tensor:
        """The hyperparameter at a step, 0 at the first update."""
        value: Any = self.value
        if callable(value):
            value = value(step)
        elif isinstance(value, tuple):
            value = torch.tensor(value, dtype=torch.float64)
        return value * self.factor(step)

    def _wrong(self, argument: str, wanted: str) -> LosslabError:
        return LosslabError(
            f"schedule {type(self).__name__} got {argument} = {getattr(self, argument)!r}, "
            f"it must be {wanted}: change {argument}"
        )

    def _positive(self, *arguments: str) -> None:
        for argument in arguments:
            if not getattr(self, argument) >= 1:
                raise self._wrong(argument, "at least 1")


@dataclass(frozen=True)
class inverse_sqrt(constant):
    """``value / sqrt(t)``: the rate of the regret bounds of AdaGrad, Adam and AMSGrad.

    Example:
        >>> inverse_sqrt(0.5)(step=3)
        0.25
    """

    def factor(self, step: int) -> float:
        """``1 / sqrt(t)``."""
        return 1 / math.sqrt(step + 1)


@dataclass(frozen=True)
class inverse(constant):
    """``value / t``: the rate of stochastic approximation (Robbins & Monro 1951).

    Example:
        >>> inverse(0.5)(step=4)
        0.1
    """

    def factor(self, step: int) -> float:
        """``1 / t``."""
        return 1 / (step + 1)


@dataclass(frozen=True)
class exponential(constant):
    """``value * rate^(t-1)``: also Adam's decaying ``beta1`` (Kingma & Ba 2015, section 4).

    Example:
        >>> exponential(0.8, rate=0.5)(step=2)
        0.2
    """

    rate: float = 0.99

    def check(self) -> None:
        """The rate is positive."""
        if not self.rate > 0:
            raise self._wrong("rate", "positive")

    def factor(self, step: int) -> float:
        """``rate^(t-1)``."""
        return self.rate**step


@dataclass(frozen=True)
class step_decay(constant):
    """The value times ``by`` once for every ``every`` steps, or once at each of the ``milestones``.

    Args:
        value: The value before the first drop.
        by: Factor of one drop.
        every: Steps between drops.
        milestones: Steps at which drops happen; give these or ``every``.

    Example:
        >>> [step_decay(1.0, by=0.5, every=2)(step) for step in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
        >>> [step_decay(1.0, by=0.5, milestones=(1, 4))(step) for step in range(5)]
        [1.0, 0.5, 0.5, 0.5, 0.25]
    """

    by: float = 0.1
    every: int | None = None
    milestones: tuple[int, ...] | None = None

    def check(self) -> None:
        """Exactly one of the two ways to say when."""
        if (self.every is None) == (self.milestones is None):
            raise LosslabError(
                f"schedule step_decay got every = {self.every} and milestones = {self.milestones}, "
                "it wants one of the two: pass every= or milestones="
            )
        if self.every is not None:
            self._positive("every")
        else:
            object.__setattr__(self, "milestones", tuple(self.milestones or ()))

    def factor(self, step: int) -> float:
        """``by`` to the number of drops so far."""
        if self.every is not None:
            return self.by ** (step // self.every)
        return self.by ** sum(step >= milestone for milestone in self.milestones or ())


@dataclass(frozen=True)
class linear(constant):
    """A straight line from the value at the first step to ``final`` times the value after ``steps`` steps.

    Example:
        >>> [linear(1.0, steps=4)(step) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    steps: int = 1
    final: float = 0.0

    def check(self) -> None:
        """At least one step."""
        self._positive("steps")

    def factor(self, step: int) -> float:
        """From 1 to ``final``."""
        return 1 + (self.final - 1) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class warmup(constant):
    """The value reached in ``steps`` equal steps: ``value * t / steps``, then the value.

    Example:
        >>> [warmup(1.0, steps=4)(step) for step in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    steps: int = 1

    def check(self) -> None:
        """At least one step."""
        self._positive("steps")

    def factor(self, step: int) -> float:
        """From ``1/steps`` to 1."""
        return min((step + 1) / self.steps, 1.0)


@dataclass(frozen=True)
class cosine(constant):
    """Half a cosine from the value to ``final`` times the value (Loshchilov & Hutter 2017, without restarts).

    Args:
        value: The value at the top.
        steps: Step from which the end value is kept, counted from the first update.
        warmup: Steps of linear warm-up before the descent, out of ``steps``.
        final: The end value, as a fraction of the value.

    Example:
        >>> [round(cosine(1.0, steps=4)(step), 4) for step in range(6)]
        [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """

    steps: int = 1
    warmup: int = 0
    final: float = 0.0

    def check(self) -> None:
        """Time left after the warm-up."""
        self._positive("steps")
        if not 0 <= self.warmup < self.steps:
            raise self._wrong("warmup", f"at least 0 and below steps = {self.steps}")

    def factor(self, step: int) -> float:
        """From 1 to ``final``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min((step - self.warmup) / (self.steps - self.warmup), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2
