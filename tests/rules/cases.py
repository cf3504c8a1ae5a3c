"""One table of rules under test; every property test runs over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tests.oracles import rules as oracle
from torch import Tensor

from losslab.rules import Rule, make
from losslab.rules.perturbed import in_ball

MEMBERS = 4
SHAPES: dict[str, tuple[int, ...]] = {"scale": (), "bias": (3,), "weight": (2, 4)}
SIZE = 12


@dataclass(frozen=True)
class Case:
    """A rule with hyperparameters, its oracle, and the torch optimizer that equals it.

    ``first`` is the step a run starts from where the first would divide by zero; ``zeros`` tells whether
    coordinates whose gradient is always 0 are defined; ``origin`` whether the oracle wants to start at 0;
    ``own`` whether it keeps an iterate of its own, out of reach for a decay or projection of the weights;
    ``started`` names the hyperparameters that matter at the start only.
    """

    rule: str
    settings: dict[str, Any]
    oracle: Callable[..., oracle.Step]
    torch: Callable[[list[Any]], torch.optim.Optimizer] | None = None
    told: dict[str, Any] = field(default_factory=dict)
    kernel: bool = False
    first: int = 0
    zeros: bool = True
    origin: bool = False
    own: bool = False
    started: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = ",".join(str(v) if k == "variant" else f"{k}={v}" for k, v in self.settings.items())
        return f"{self.rule}({told})"

    def make(self, **changes: Any) -> Rule:
        return make(self.rule, **{**self.settings, **changes})

    def numbers(self) -> dict[str, float]:
        """The hyperparameters that are numbers."""
        return {k: v for k, v in self.settings.items() if isinstance(v, float)}

    def reference(self, **changes: float) -> oracle.Step:
        """The oracle at these hyperparameters."""
        told = {**self.told, **self.numbers(), **changes}
        if self.make().needs_curvature:
            told["hessian"] = Bowl.matrix.numpy()
        return self.oracle(**told)


class Bowl:
    """The curvature that second-order rules are given here: one fixed, well conditioned Hessian."""

    matrix = torch.from_numpy(
        np.diag(np.linspace(1, 4, SIZE)) + 0.1 * np.cos(np.add.outer(np.arange(SIZE), np.arange(SIZE)))
    )

    def __init__(self, members: int) -> None:
        self.members = members

    def hessian(self) -> Tensor:
        return self.matrix.expand(self.members, SIZE, SIZE)

    gauss_newton = hessian

    def products(self, vectors: Tensor) -> Tensor:
        return (vectors.double() @ self.matrix).to(vectors)

    gradient = products

    def value(self, weights: Tensor) -> Tensor:
        return (weights.double() * self.products(weights.double())).sum(1) / 2


def _adam(**told: Any) -> Callable[[list[Any]], torch.optim.Optimizer]:
    return lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-6, **told)


def _sgd(**told: Any) -> Callable[[list[Any]], torch.optim.Optimizer]:
    return lambda p: torch.optim.SGD(p, lr=0.1, **told)


def _rmsprop(**told: Any) -> Callable[[list[Any]], torch.optim.Optimizer]:
    return lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.9, eps=1e-6, **told)


MOMENTUM = {"lr": 0.1, "beta": 0.8}
SUMS = {"lr": 0.3, "eps": 1e-3}
RMS = {"lr": 0.05, "beta": 0.9, "eps": 1e-6}
ADAM = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
START = make("auto-rate").initial("psi", torch.zeros(1, SIZE, dtype=torch.float64))[0].numpy()
NO_EPS = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95}

CASES = [
    Case("gd", {"lr": 0.1}, oracle.gd, _sgd(), kernel=True),
    Case("sgd", {"lr": 0.1}, oracle.gd, _sgd(), kernel=True),
    Case("momentum", MOMENTUM, oracle.polyak, _sgd(momentum=0.8), kernel=True),
    Case("momentum", MOMENTUM, oracle.heavy_ball, kernel=True, own=True),
    Case("momentum", {**MOMENTUM, "beta": 0.0}, oracle.polyak, _sgd(), kernel=True),
    Case(
        "momentum",
        {**MOMENTUM, "dampening": 0.5},
        oracle.polyak,
        _sgd(momentum=0.8, dampening=0.5),
        kernel=True,
    ),
    Case("momentum", {**MOMENTUM, "variant": "sutskever"}, oracle.polyak, _sgd(momentum=0.8)),
    Case("nesterov", MOMENTUM, oracle.nesterov, _sgd(momentum=0.8, nesterov=True), kernel=True, own=True),
    Case(
        "nesterov",
        {**MOMENTUM, "variant": "lookahead"},
        oracle.nesterov,
        _sgd(momentum=0.8, nesterov=True),
        own=True,
    ),
    Case("newton", {"lr": 0.5, "damping": 0.0}, oracle.newton),
    Case("newton", {"lr": 1.0, "damping": 0.3}, oracle.newton),
    Case("newton", {"lr": 1.0, "damping": 0.3, "variant": "searched"}, oracle.newton_searched),
    Case("newton-cg", {"lr": 1.0, "damping": 0.3}, oracle.newton_cg),
    Case("saddle-free", {"lr": 0.5, "damping": 0.1}, oracle.saddle_free),
    Case("cubic-newton", {"lr": 0.8, "penalty": 1.5}, oracle.cubic_newton),
    Case("gauss-newton", {"lr": 0.5, "damping": 0.1}, oracle.gauss_newton),
    Case(
        "gauss-newton",
        {"lr": 1.0, "damping": 0.1, "variant": "adaptive"},
        oracle.gauss_newton,
        told={"adaptive": True},
        started=("damping",),
    ),
    Case("diagonal-lm", {"lr": 0.5, "mu": 0.1, "gamma": 0.2}, oracle.diagonal_lm),
    Case("auto-rate", {"lr": 0.5, "alpha": 0.1, "gamma": 0.2}, oracle.auto_rate, told={"start": START}),
    Case(
        "perturbed-gd",
        {"lr": 0.1, "radius": 0.3, "threshold": 4.5, "wait": 3.0},
        oracle.perturbed_gd,
        told={"ball": lambda t: in_ball(0, t, SIZE).numpy()},
    ),
    Case("adagrad", SUMS, oracle.adagrad, lambda p: torch.optim.Adagrad(p, lr=0.3, eps=1e-3), kernel=True),
    Case(
        "adagrad",
        {**SUMS, "initial_sum": 0.5},
        oracle.adagrad,
        lambda p: torch.optim.Adagrad(p, lr=0.3, eps=1e-3, initial_accumulator_value=0.5),
        kernel=True,
    ),
    Case("adagrad", {**SUMS, "l1": 0.2}, oracle.adagrad),
    Case("adagrad", {**SUMS, "variant": "dual"}, oracle.dual_averaging, origin=True),
    Case("adagrad", {**SUMS, "l1": 0.2, "variant": "dual"}, oracle.dual_averaging, origin=True),
    Case("adagrad", {"lr": 0.3, "variant": "lecture"}, oracle.adagrad_literal, first=1, zeros=False),
    Case("adagrad", {"lr": 0.3, "initial_sum": 0.5, "variant": "lecture-past"}, oracle.adagrad_past),
    Case("adagrad-full", {"lr": 0.3, "eps": 0.1}, oracle.adagrad_full),
    Case("rmsprop", RMS, oracle.rmsprop, _rmsprop(), kernel=True),
    Case("rmsprop", {**RMS, "variant": "inside"}, oracle.rmsprop, told={"inside": True}),
    Case("rmsprop", {**RMS, "momentum": 0.7}, oracle.rmsprop, _rmsprop(momentum=0.7)),
    Case(
        "rmsprop", {**RMS, "centred": True}, oracle.rmsprop, _rmsprop(centered=True), told={"centred": True}
    ),
    Case(
        "rmsprop",
        {**RMS, "centred": True, "momentum": 0.7},
        oracle.rmsprop,
        _rmsprop(centered=True, momentum=0.7),
        told={"centred": True},
    ),
    Case(
        "rmsprop",
        {"lr": 0.05, "beta": 0.9, "variant": "lecture"},
        oracle.rmsprop,
        lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.9, eps=0.0),
        kernel=True,
        zeros=False,
    ),
    Case("adam", ADAM, oracle.adam, _adam(), kernel=True),
    Case("adam", {**ADAM, "eps_root": 1e-4}, oracle.adam),
    Case("adam", {**ADAM, "variant": "uncorrected"}, oracle.adam, told={"corrected": False}, kernel=True),
    Case(
        "adam",
        {**NO_EPS, "variant": "lecture"},
        oracle.adam,
        told={"corrected": False},
        kernel=True,
        zeros=False,
    ),
    Case(
        "adamax",
        ADAM,
        oracle.adamax,
        lambda p: torch.optim.Adamax(p, lr=0.05, betas=(0.8, 0.95), eps=1e-6),
    ),
    Case("amsgrad", ADAM, oracle.amsgrad, told={"form": "paper"}, kernel=True),
    Case(
        "amsgrad",
        {**ADAM, "variant": "torch"},
        oracle.amsgrad,
        _adam(amsgrad=True),
        told={"form": "torch"},
        kernel=True,
    ),
    Case("amsgrad", {**ADAM, "variant": "optax"}, oracle.amsgrad, told={"form": "optax"}),
    Case("adamnc", {"lr": 0.05, "beta1": 0.8, "eps": 1e-6}, oracle.adamnc),
]
SECOND_ORDER = [case.rule for case in CASES if case.make().needs_curvature]
KERNELS = [case for case in CASES if case.kernel]
TORCH = [case for case in CASES if case.torch is not None]


def draw(seed: int, steps: int = 0, members: int = MEMBERS, dtype: torch.dtype = torch.float64) -> Any:
    """Weights of `SHAPES`, or a list of ``steps`` gradients for them."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> dict[str, Tensor]:
        return {
            name: torch.randn(members, *shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in SHAPES.items()
        }

    return [one() for _ in range(steps)] if steps else one()


def run(
    rule: Rule, weights: dict[str, Tensor], gradients: list[dict[str, Tensor]], first: int = 0
) -> tuple[dict[str, Tensor], Any]:
    """Weights and state after one update for each gradient."""
    state = rule.init(weights)
    curvature = Bowl(len(weights["scale"])) if rule.needs_curvature else None
    for step, g in enumerate(gradients, first):
        weights, state = rule.update(g, state, weights, step, curvature)
    return weights, state


def flat(weights: dict[str, Tensor]) -> Tensor:
    """``[N, P]``, in the order of `SHAPES`."""
    return torch.cat(
        [weights[name].flatten(1) if weights[name].dim() > 1 else weights[name][:, None] for name in SHAPES],
        1,
    )


def alone(weights: dict[str, Tensor], member: int) -> dict[str, Tensor]:
    """A stack of one."""
    return {name: w[member : member + 1] for name, w in weights.items()}


def per_member(case: Case) -> dict[str, list[float]]:
    """Every number of a case, different for each member."""
    return {name: [value * f for f in (1.0, 0.9, 0.7, 0.4)] for name, value in case.numbers().items()}
