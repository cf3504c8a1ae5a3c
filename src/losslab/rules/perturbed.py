"""Gradient descent that shakes itself where the gradient is small."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class PerturbedGD(Rule):
    """Perturbed gradient descent: near a critical point the weights are moved to a random point close by.

    Where ``|g| <= threshold`` and the last perturbation is more than ``wait`` updates ago,
    ``x = x + radius u`` with u uniform in the unit ball; then ``x = x - lr g``. The step uses the gradient
    that was given, taken before the perturbation (it is at most ``threshold`` long), where the paper takes a
    new one.

    Plain descent needs, near some saddles, exponentially many steps in the dimension; with the
    perturbation the number grows like a power of the logarithm.

    Args:
        lr: Learning rate.
        radius: Radius of the ball.
        threshold: Length of a member's gradient that counts as small.
        wait: Updates between two perturbations.
        seed: Of the perturbations: a function of the seed and of the update. Members with equal seeds are
            moved alike; pass one seed a member for independent ones.

    Source: Jin et al., How to Escape Saddle Points Efficiently (2017), algorithm 1 (without its stopping
    rule). Not in torch or optax.

    Example:
        >>> w, g = {"x": torch.zeros(1, 2)}, {"x": torch.zeros(1, 2)}
        >>> rule = PerturbedGD(radius=0.1)
        >>> moved = rule.update(g, rule.init(w), w, step=0)[0]["x"]
        >>> 0 < moved.norm() <= 0.1
        tensor(True)
    """

    lr: Hyper = 1e-2
    radius: Hyper = 1e-3
    threshold: Hyper = 1e-3
    wait: Hyper = 50.0
    seed: Hyper = 0

    name: ClassVar[str] = "perturbed-gd"
    title: ClassVar[str] = "Perturbed gradient descent"
    equation: ClassVar[str] = (
        "x ← x + radius · u where |g| ≤ threshold, u uniform in the unit ball\nx ← x - lr · g"
    )
    source: ClassVar[str] = "Jin et al. 2017, alg. 1"
    notes: ClassVar[str] = (
        "The notes leave it to the mini-batch's noise to leave a saddle; this rule brings its own, in every "
        "direction. The paper takes the gradient after the perturbation. Not in torch or optax."
    )
    full_batch: ClassVar[bool] = True
    whole_vector: ClassVar[bool] = True
    largest: ClassVar[int] = 2**62  # no matrix is kept

    def slots(self) -> tuple[str, ...]:
        """Updates since the last perturbation, ``[N, 1]``."""
        return ("since",)

    def initial(self, slot: str, x: Tensor) -> Tensor:
        """Long ago."""
        return torch.full_like(x[:, :1], torch.inf)

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        small = torch.linalg.vector_norm(g, dim=1, keepdim=True) <= cast(h.threshold, x)
        shaken = small & (s["since"] > cast(h.wait, x))
        if bool(shaken.any()):
            x = torch.where(shaken, x + cast(h.radius, x) * _in_ball(h.seed, t, x), x)
        return x - cast(h.lr, x) * g, {"since": torch.where(shaken, 1.0, s["since"] + 1)}


def _in_ball(seed: float | Tensor, t: int, like: Tensor) -> Tensor:
    """One point of the unit ball a member, a function of its seed and the update."""
    seeds = seed.tolist() if isinstance(seed, Tensor) else [seed] * len(like)
    drawn = {s: in_ball(int(s), t, like.shape[1]).to(like) for s in dict.fromkeys(seeds)}
    return torch.stack([drawn[s] for s in seeds])


def in_ball(seed: int, t: int, dimension: int) -> Tensor:
    """A point of the unit ball, ``[dimension]`` in float64."""
    told = hashlib.blake2b(f"perturbation/{seed}/{t}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(told, "little"))
    z = torch.randn(dimension, generator=generator, dtype=torch.float64)
    length = torch.rand((), generator=generator, dtype=torch.float64) ** (1 / dimension)
    return z / z.norm() * length
