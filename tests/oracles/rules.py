"""Every update rule a second time: float64 numpy, one vector, written from the papers' equations.

Each function returns ``step(x, g, t)``: weights, gradient, number of the update from 1 -> new weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Step = Callable[[Vector, Vector, int], Vector]


def gd(lr: float) -> Step:
    return lambda x, g, t: x - lr * g


def polyak(lr: float, beta: float, dampening: float = 0.0) -> Step:
    """The notes: v = -g + beta v, x + lr v; dampening as torch has it."""
    v: Any = 0.0

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal v
        v = beta * v - (g if t == 1 else (1 - dampening) * g)
        return x + lr * v

    return step


def heavy_ball(lr: float, beta: float) -> Step:
    """Polyak 1964 in two iterates; equals both parametrisations at a constant rate."""
    before: Any = None

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal before
        new = x - lr * g + (beta * (x - before) if before is not None else 0.0)
        before = x
        return new

    return step


def nesterov(lr: float, beta: float) -> Step:
    """Nesterov's method on (z, v); the weights shown are the look-ahead points z - beta v."""
    v: Any = 0.0
    z: Any = None

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal v, z
        z = x if z is None else z
        v = beta * v + lr * g
        z = z - v
        return z - beta * v

    return step


def newton(lr: float, damping: float, hessian: Vector) -> Step:
    inverse = np.linalg.inv(hessian + damping * np.eye(len(hessian)))
    return lambda x, g, t: x - lr * inverse @ g


def adagrad(lr: float, eps: float, l1: float = 0.0, initial_sum: float = 0.0) -> Step:
    """Duchi et al., composite mirror descent: soft threshold of x - lr g/H, coordinate by coordinate."""
    s: Any = initial_sum

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal s
        s = s + g**2
        new = np.empty_like(x)
        for i in range(len(x)):
            h = eps + np.sqrt(s[i])
            u = x[i] - lr * g[i] / h
            new[i] = np.sign(u) * max(abs(u) - lr * l1 / h, 0.0)
        return new

    return step


def dual_averaging(lr: float, eps: float, l1: float = 0.0, initial_sum: float = 0.0) -> Step:
    """Duchi et al., primal-dual: sign(-gbar) (lr t/H) [|gbar| - l1]_+, from a start of 0."""
    past: list[Vector] = []

    def step(x: Vector, g: Vector, t: int) -> Vector:
        past.append(g)
        mean = np.mean(past, axis=0)
        h = eps + np.sqrt(initial_sum + np.sum(np.square(past), axis=0))
        return np.sign(-mean) * (lr * t / h) * np.maximum(np.abs(mean) - l1, 0.0)

    return step


def adagrad_literal(lr: float) -> Step:
    """The notes as printed: the current gradient's square t - 1 times."""

    def step(x: Vector, g: Vector, t: int) -> Vector:
        total = np.zeros_like(g)
        for _ in range(t - 1):
            total += g**2
        return x - lr * g / np.sqrt(total)

    return step


def adagrad_past(lr: float, initial_sum: float) -> Step:
    """The notes as meant: the squares of gradients 1 .. t - 1."""
    past: list[Vector] = []

    def step(x: Vector, g: Vector, t: int) -> Vector:
        new = x - lr * g / np.sqrt(initial_sum + np.sum(np.square(past), axis=0))
        past.append(g)
        return new

    return step


def adagrad_full(lr: float, eps: float) -> Step:
    s: Any = 0.0

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal s
        s = s + np.outer(g, g)
        u, d, _ = np.linalg.svd(s, hermitian=True)
        return x - lr * np.linalg.inv(eps * np.eye(len(g)) + (u * np.sqrt(d)) @ u.T) @ g

    return step


def rmsprop(
    lr: float,
    beta: float,
    eps: float = 0.0,
    momentum: float = 0.0,
    centred: bool = False,
    inside: bool = False,
) -> Step:
    v: Any = 0.0
    m: Any = 0.0
    b: Any = 0.0

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal v, m, b
        v = beta * v + (1 - beta) * g**2
        m = beta * m + (1 - beta) * g
        spread = v - m**2 if centred else v
        b = momentum * b + g / (np.sqrt(spread + eps) if inside else np.sqrt(spread) + eps)
        return x - lr * b

    return step


def adam(
    lr: float, beta1: float, beta2: float, eps: float = 0.0, eps_root: float = 0.0, corrected: bool = True
) -> Step:
    m: Any = 0.0
    v: Any = 0.0

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal m, v
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t) if corrected else m
        v_hat = v / (1 - beta2**t) if corrected else v
        return x - lr * m_hat / (np.sqrt(v_hat + eps_root) + eps)

    return step


def adamax(lr: float, beta1: float, beta2: float, eps: float) -> Step:
    m: Any = 0.0
    u: Any = 0.0

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal m, u
        m = beta1 * m + (1 - beta1) * g
        u = np.maximum(beta2 * u, np.abs(g) + eps)
        return x - (lr / (1 - beta1**t)) * m / u

    return step


def amsgrad(lr: float, beta1: float, beta2: float, eps: float, form: str) -> Step:
    """All moments from the whole history: m_t = (1-b1) sum_j b1^(t-j) g_j, and so on."""
    past: list[Vector] = []
    seconds: list[Vector] = []

    def step(x: Vector, g: Vector, t: int) -> Vector:
        past.append(g)
        m = (1 - beta1) * sum(beta1 ** (t - 1 - j) * old for j, old in enumerate(past))
        v = (1 - beta2) * sum(beta2 ** (t - 1 - j) * old**2 for j, old in enumerate(past))
        seconds.append(v / (1 - beta2**t) if form == "optax" else v)
        largest = np.max(seconds, axis=0)
        if form == "paper":
            return x - lr * m / (np.sqrt(largest) + eps)
        if form == "torch":
            largest = largest / (1 - beta2**t)
        return x - lr * (m / (1 - beta1**t)) / (np.sqrt(largest) + eps)

    return step


def adamnc(lr: float, beta1: float, eps: float) -> Step:
    """Reddi et al., Corollary 2: v_t is the average of the squared gradients."""
    past: list[Vector] = []

    def step(x: Vector, g: Vector, t: int) -> Vector:
        past.append(g)
        m = (1 - beta1) * sum(beta1 ** (t - 1 - j) * old for j, old in enumerate(past))
        return x - lr * m / (np.sqrt(np.mean(np.square(past), axis=0)) + eps)

    return step


def l2(step: Step, weight_decay: float) -> Step:
    return lambda x, g, t: step(x, g + weight_decay * x, t)


def decoupled(step: Step, lr: float, weight_decay: float) -> Step:
    return lambda x, g, t: step((1 - lr * weight_decay) * x, g, t)


def clipped(step: Step, clip: float) -> Step:
    return lambda x, g, t: step(x, g * min(1.0, clip / (np.linalg.norm(g) + 1e-6)), t)


def boxed(step: Step, box: float) -> Step:
    return lambda x, g, t: np.clip(step(x, g, t), -box, box)
