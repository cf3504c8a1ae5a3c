"""All rules by name, and what each tells about itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from losslab.errors import unknown
from losslab.rules.adagrad import AdaGrad, FullAdaGrad
from losslab.rules.adam import Adam, AdaMax, AdamNC, AMSGrad
from losslab.rules.auto_rate import AutoRate
from losslab.rules.cubic import CubicNewton
from losslab.rules.descent import GD, SGD
from losslab.rules.gauss_newton import DiagonalLM, GaussNewton
from losslab.rules.momentum import Momentum, Nesterov
from losslab.rules.newton import Newton, SaddleFree
from losslab.rules.newton_cg import NewtonCG
from losslab.rules.perturbed import PerturbedGD
from losslab.rules.rmsprop import RMSProp
from losslab.rules.rule import Rule

_ALL: tuple[type[Rule], ...] = (
    GD,
    SGD,
    Momentum,
    Nesterov,
    PerturbedGD,
    AutoRate,
    Newton,
    NewtonCG,
    SaddleFree,
    CubicNewton,
    GaussNewton,
    DiagonalLM,
    AdaGrad,
    FullAdaGrad,
    RMSProp,
    Adam,
    AdaMax,
    AMSGrad,
    AdamNC,
)

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in _ALL}
"""Every rule's class by its name, from plain descent to Adam's relatives."""


def make(name: str, **settings: Any) -> Rule:
    """A rule by its name.

    Args:
        name: A key of `RULES`, in any case.
        **settings: Hyperparameters and options of that rule.

    Raises:
        LosslabError: An unknown rule, option or variant (the nearest names are told), a value out of range.

    Example:
        >>> make("adam", lr=[1e-3, 1e-2], variant="lecture").members()
        2
        >>> make("adam", beta=0.9)
        Traceback (most recent call last):
        ...
        losslab.errors.LosslabError: no option of adam is named 'beta': did you mean 'beta2', 'beta1'?
    """
    rule = _find(name)
    known = [field.name for field in dataclasses.fields(rule)]
    for option in settings:
        if option not in known:
            raise unknown(f"option of {rule.name}", option, known)
    return rule(**settings)


@dataclass(frozen=True)
class Page:
    """What ``losslab rules NAME`` prints; ``str(page)`` is the plain text of it.

    Args:
        name: The rule's name.
        title: Its name in print.
        equation: One line an assignment.
        source: Papers and section of the notes.
        defaults: Option -> default value.
        variants: Variant -> what it does; the first is the default.
        differences: How the notes, torch and optax differ.
    """

    name: str
    title: str
    equation: str
    source: str
    defaults: dict[str, Any]
    variants: dict[str, str]
    differences: str

    def __str__(self) -> str:
        parts = [f"{self.title} ({self.name})", _indented(self.equation.splitlines())]
        parts.append(
            "defaults\n" + _indented(f"{option} = {value}" for option, value in self.defaults.items())
        )
        if self.variants:
            parts.append("variants\n" + _indented(f"{name}: {what}" for name, what in self.variants.items()))
        parts += ["differences\n" + _indented([self.differences]), "source\n" + _indented([self.source])]
        return "\n\n".join(parts)


def page(name: str) -> Page:
    """The page of one rule.

    Raises:
        LosslabError: No rule has this name; the nearest names are told.

    Example:
        >>> print(page("gd").equation)
        x ← x - lr · g, g the gradient of the whole training loss
    """
    rule = _find(name)
    defaults = {field.name: field.default for field in dataclasses.fields(rule)}
    own = [n for n in defaults if n in vars(rule) or n == "lr"]
    ordered = {n: defaults[n] for n in [*own, *(n for n in defaults if n not in own)]}
    return Page(rule.name, rule.title, rule.equation, rule.source, ordered, dict(rule.variants), rule.notes)


def table() -> list[dict[str, str]]:
    """One row a rule: name, title, variants, defaults (of its own options), source.

    Example:
        >>> table()[1]["name"], table()[1]["defaults"]
        ('sgd', 'lr=0.01')
    """
    shared = {field.name for field in dataclasses.fields(Rule)} - {"lr"}
    rows = []
    for name in RULES:
        told = page(name)
        own = {n: v for n, v in told.defaults.items() if n not in shared and n != "variant"}
        rows.append(
            {
                "name": name,
                "title": told.title,
                "variants": ", ".join(told.variants),
                "defaults": ", ".join(f"{n}={v:g}" if v is not False else f"{n}={v}" for n, v in own.items()),
                "source": told.source,
            }
        )
    return rows


def _find(name: str) -> type[Rule]:
    if not isinstance(name, str) or name.lower() not in RULES:
        raise unknown("rule", name, RULES)
    return RULES[name.lower()]


def _indented(lines: Any) -> str:
    return "\n".join(f"  {line}" for line in lines)
