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


def newton_searched(lr: float, damping: float, hessian: Vector) -> Step:
    """Armijo's backtracking on the quadratic of the Hessian; the gradient where Newton's step goes up."""
    inverse = np.linalg.inv(hessian + damping * np.eye(len(hessian)))

    def step(x: Vector, g: Vector, t: int) -> Vector:
        d = -lr * inverse @ g
        d = d if g @ d < 0 else -lr * g
        return x + armijo(lambda y: y @ hessian @ y / 2, x, d, g)

    return step


def armijo(value: Callable[[Vector], float], x: Vector, d: Vector, g: Vector) -> Vector:
    for k in range(31):
        if value(x + d / 2**k) <= value(x) + 1e-4 * (g @ d) / 2**k + 1e-15 * abs(value(x)):
            return d / 2**k
    return 0 * d


def saddle_free(lr: float, damping: float, hessian: Vector) -> Step:
    """|H| as the root of H^2."""
    values, vectors = np.linalg.eigh(hessian @ hessian)
    root = (vectors * np.sqrt(values)) @ vectors.T
    return lambda x, g, t: x - lr * np.linalg.inv(root + damping * np.eye(len(g))) @ g


def cubic_newton(lr: float, penalty: float, hessian: Vector) -> Step:
    """The first-order condition (H + M |d| I / 2) d = -g, as a root in |d| by Brent's method."""
    from scipy.optimize import brentq

    def step(x: Vector, g: Vector, t: int) -> Vector:
        def shifted(r: float) -> Vector:
            return -np.linalg.solve(hessian + penalty * r / 2 * np.eye(len(g)), g)

        least = max(0.0, -2 * np.linalg.eigvalsh(hessian)[0] / penalty) * (1 + 1e-13)
        r = brentq(lambda r: np.linalg.norm(shifted(r)) - r, least, 1e3 + 10 * least, xtol=1e-15, rtol=1e-15)
        return x + lr * shifted(r)

    return step


def gauss_newton(lr: float, damping: float, hessian: Vector, adaptive: bool = False) -> Step:
    """Levenberg-Marquardt with the ratio of the fall of x^T H x / 2 to the model's."""

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal damping
        d = -lr * np.linalg.inv(hessian + damping * np.eye(len(g))) @ g
        if not adaptive:
            return x + d
        fall = (x + d) @ hessian @ (x + d) / 2 - x @ hessian @ x / 2
        ratio = fall / (g @ d + d @ hessian @ d / 2)
        damping *= 4 if ratio < 0.25 else 0.25 if ratio > 0.75 else 1
        return x + d if fall < 0 else x

    return step


def diagonal_lm(lr: float, mu: float, gamma: float, hessian: Vector) -> Step:
    """The diagonal is the same at every step here, and so is its average."""
    return lambda x, g, t: x - lr * g / (np.diag(hessian) + mu)


def newton_cg(lr: float, damping: float, hessian: Vector) -> Step:
    """Nocedal and Wright's algorithm 7.1, as printed there."""
    matrix = hessian + damping * np.eye(len(hessian))

    def step(x: Vector, g: Vector, t: int) -> Vector:
        enough = min(0.5, np.sqrt(np.linalg.norm(g))) * np.linalg.norm(g)
        z, r, d = np.zeros_like(g), g, -g
        for j in range(50):
            if d @ matrix @ d <= 0:
                z = -g if j == 0 else z
                break
            alpha = r @ r / (d @ matrix @ d)
            z, new = z + alpha * d, r + alpha * matrix @ d
            if np.linalg.norm(new) <= enough:
                break
            d, r = -new + (new @ new) / (r @ r) * d, new
        return x + armijo(lambda y: y @ hessian @ y / 2, x, lr * z, g)

    return step


def perturbed_gd(lr: float, radius: float, threshold: float, wait: float, ball: Any) -> Step:
    """Jin et al., algorithm 1; ``ball(t)`` is the point of the unit ball drawn at update t."""
    last = -np.inf

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal last
        if np.linalg.norm(g) <= threshold and t - last > wait:
            x, last = x + radius * ball(t), t
        return x - lr * g

    return step


def auto_rate(lr: float, alpha: float, gamma: float, hessian: Vector, start: Vector) -> Step:
    """On a quadratic the difference of two gradients is the product itself, whatever alpha."""
    psi = start
    for _ in range(20):
        psi = hessian @ psi / np.linalg.norm(psi)

    def step(x: Vector, g: Vector, t: int) -> Vector:
        nonlocal psi
        psi = (1 - gamma) * psi + gamma * hessian @ psi / np.linalg.norm(psi)
        return x - lr * g / np.linalg.norm(psi)

    return step
