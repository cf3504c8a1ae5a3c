"""Up to which curvature a rule is stable: its limit, and the metric in which the curvature is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losslab.curvature.operator import Operator
from losslab.engine import Points
from losslab.rules import SGD, AdaGrad, Adam, Momentum, Nesterov, PerturbedGD, RMSProp, Rule, State

Hypers = Mapping[str, Any]


@dataclass(frozen=True)
class Limit:
    """The stability of a rule at N points.

    Attributes:
        lr: The learning rate, ``[N]``.
        most: The eigenvalue above which the rule, its memory frozen, is unstable on a quadratic, ``[N]``: of
            the Hessian, or of ``D^(-1/2) H D^(-1/2)`` where there is a metric.
        metric: D, what the rule divides the gradient by, ``[N, P]``; None for the identity.
    """

    lr: Tensor
    most: Tensor
    metric: Tensor | None


class Preconditioned:
    """``D^(-1/2) M D^(-1/2)``: a matrix in the metric of an adaptive rule, at N points.

    Its eigenvalues are those of ``D^(-1) M``, which a step ``-lr D^(-1) g`` meets on a quadratic; the largest
    one of the Hessian is the preconditioned sharpness of Cohen et al. 2022.

    Args:
        operator: M.
        metric: D, ``[N, P]``, positive.

    Example:
        >>> from losslab.curvature import Hessian, eigenpairs
        >>> from losslab.engine import Objective
        >>> from losslab.tasks import function_task, quadratic
        >>> task = function_task(quadratic([1.0, 3.0], rotate=False))
        >>> hessian = Hessian(Objective(task), Points.from_modules([task.model()]))
        >>> eigenpairs(Preconditioned(hessian, torch.tensor([[0.1, 1.0]]))).values.round(decimals=6)
        tensor([10.], dtype=torch.float64)
    """

    def __init__(self, operator: Operator, metric: Tensor) -> None:
        self.operator = operator
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        root = metric.to(operator.dtype).rsqrt()
        self.root = root[0] if operator.members == 1 else root

    def __matmul__(self, vectors: Tensor) -> Tensor:
        root = self.root if vectors.dim() == self.root.dim() else self.root[..., None]
        return root * (self.operator @ (root * vectors))


def limit_of(rule: object, state: State, points: Points, step: int) -> Limit | None:
    """The limit of a losslab rule after ``step`` updates; None for rules whose limit is not known here.

    - descent: ``2 / lr``;
    - Polyak's momentum: ``2 (1 + beta) / lr``; with dampening d the rate is ``lr (1 - d)``;
    - Nesterov's: ``2 (1 + beta) / (lr (1 + 2 beta))``;
    - AdaGrad: ``2 / lr`` in the metric ``sqrt(s) + eps``; RMSProp alike with its mean of squares, times
      ``1 + momentum``;
    - Adam: ``2 (1 + beta1) / (lr (1 - beta1))`` in the metric ``(1 - beta1^t) (sqrt(v_hat) + eps)``.

    Source: Cohen et al. 2021, appendix B (momentum); Cohen et al. 2022 (adaptive rules), who observe training
    to settle at these limits.

    Example:
        >>> rule, points = Momentum(lr=[0.1, 0.2], beta=0.5), Points({"x": torch.ones(2, 3)}, {})
        >>> limit_of(rule, rule.init(points.weights), points, 0).most
        tensor([30., 15.], dtype=torch.float64)
    """
    if not isinstance(rule, Rule):
        return None
    h = vars(rule.at(max(step - 1, 0)))
    told = {name: _members(value, points) for name, value in h.items() if value is not None}
    slots = {
        slot: Points(dict(tensors), {}).matrix() if set(tensors) == set(points.weights) else None
        for slot, tensors in state.items()
    }
    found = _known(rule, told, slots, step)
    if found is None:
        return None
    most, metric = found
    return Limit(told["lr"], most / told["lr"], metric)


def limit_of_torch(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Limit | None:
    """The limit of torch's SGD, Adam, AdamW, RMSprop or Adagrad with one parameter group; else None."""
    if len(optimizer.param_groups) != 1:
        return None
    group, kind = optimizer.param_groups[0], type(optimizer).__name__
    states = [optimizer.state.get(p, {}) for p in parameters]
    keys = {
        "SGD": None,
        "Adam": "exp_avg_sq",
        "AdamW": "exp_avg_sq",
        "RMSprop": "square_avg",
        "Adagrad": "sum",
    }
    if kind not in keys or group.get("maximize"):
        return None
    key = keys[kind]
    squares = None
    if key is not None:
        if any(key not in state for state in states) or group.get("amsgrad") or group.get("centered"):
            return None
        squares = torch.cat([state[key].detach().reshape(-1) for state in states])[None]
    step = int(states[0].get("step", 0)) if states else 0
    rule = _as_rule(kind, group)
    points = Points({"": torch.cat([p.detach().reshape(-1) for p in parameters])[None]}, {})
    slot = "s" if kind == "Adagrad" else "v"
    return limit_of(rule, {} if squares is None else {slot: {"": squares}}, points, step)


def _as_rule(kind: str, group: Mapping[str, Any]) -> Rule:
    lr = float(group["lr"])
    if kind == "SGD":
        beta = float(group["momentum"])
        if group["nesterov"]:
            return Nesterov(lr=lr, beta=beta)
        return Momentum(lr=lr, beta=beta, dampening=float(group["dampening"]) if beta else 0.0)
    if kind == "RMSprop":
        return RMSProp(
            lr=lr, beta=float(group["alpha"]), eps=float(group["eps"]), momentum=float(group["momentum"])
        )
    if kind == "Adagrad":
        return AdaGrad(lr=lr, eps=float(group["eps"]))
    beta1, beta2 = (float(b) for b in group["betas"])
    return Adam(lr=lr, beta1=beta1, beta2=beta2, eps=float(group["eps"]))


def _members(value: Any, points: Points) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).expand(points.members).clone()


def _known(
    rule: Rule, h: dict[str, Tensor], slots: Mapping[str, Tensor | None], step: int
) -> tuple[Tensor, Tensor | None] | None:
    """The limit in units of 1/lr, and the metric."""
    one = torch.ones_like(h["lr"])
    if isinstance(rule, (SGD, PerturbedGD)):
        return 2 * one, None
    if isinstance(rule, Momentum):
        return 2 * (1 + h["beta"]) / (1 - h["dampening"]), None
    if isinstance(rule, Nesterov):
        return 2 * (1 + h["beta"]) / (1 + 2 * h["beta"]), None
    squares = slots.get("s" if isinstance(rule, AdaGrad) else "v")
    if squares is None or step == 0:
        return None
    if isinstance(rule, AdaGrad) and rule.variant == "mirror":
        return 2 * one, squares.sqrt() + _column(h["eps"], squares)
    if isinstance(rule, RMSProp) and not rule.centred:
        return 2 * (1 + h["momentum"]), _root(squares, h["eps"], rule.variant)
    if isinstance(rule, Adam):
        return _adam(rule, h, squares, step)
    return None


def _adam(rule: Adam, h: dict[str, Tensor], squares: Tensor, step: int) -> tuple[Tensor, Tensor]:
    first, second = torch.ones_like(h["lr"]), torch.ones_like(h["lr"])
    if rule.variant == "kingma-ba":
        first, second = 1 - h["beta1"] ** step, 1 - h["beta2"] ** step
    eps = torch.zeros_like(h["lr"]) if rule.variant == "lecture" else h["eps"]
    root = (squares / _column(second, squares) + _column(h["eps_root"], squares)).sqrt()
    metric = _column(first, squares) * (root + _column(eps, squares))
    return 2 * (1 + h["beta1"]) / (1 - h["beta1"]), metric


def _root(squares: Tensor, eps: Tensor, variant: str) -> Tensor:
    if variant == "inside":
        return (squares + _column(eps, squares)).sqrt()
    return squares.sqrt() + (0.0 if variant == "lecture" else _column(eps, squares))


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like)[:, None]
