"""The contract of an update rule: equations on stacked weights, hyperparameters per member."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from losslab.errors import LosslabError, unknown
from losslab.rules.curvature import Curvature, check

if TYPE_CHECKING:
    from losslab.rules.adapter import TorchOptimizer

Weights = Mapping[str, Tensor]
"""Parameter name -> tensor ``[N, *shape]``: the same parameter of N networks."""

State = dict[str, dict[str, Tensor]]
"""Slot (``"m"``, ``"v"``, ...) -> parameter name -> tensor with the leading member axis."""

Schedule = Callable[[int], "float | Tensor"]
"""Step (0 at the first update) -> value, or one value a member."""

Hyper = float | Sequence[float] | Tensor | Schedule
"""A hyperparameter: one number, one number a member, or a schedule."""


class Coefficients:
    """The hyperparameters of one step: floats, or float64 tensors ``[N]`` where members differ.

    Coefficients derived from them (``1 - h.beta1 ** t``) are computed in float64 and only then cast to the
    dtype of the weights, because ``1 - 0.999`` in float32 is already wrong in the fifth digit.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this rule has no hyperparameter {name!r}")


def cast(value: float | Tensor, like: Tensor) -> Any:
    """A coefficient ready to multiply ``like``: a tensor ``[N]`` becomes ``[N, 1, ...]`` of its dtype."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


def root(value: float | Tensor) -> Any:
    """Square root of a coefficient, float or tensor."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """An optimizer as a value: it holds hyperparameters and no state.

    A family (a subclass) writes its equation once, in `leaf`, for one stacked tensor ``x`` of shape
    ``[N, *shape]`` with gradient ``g`` of the same shape; everything else is shared here: L2 and decoupled
    weight decay, clipping of each member's gradient, schedules, hyperparameters that differ between members.

    Args:
        lr: Learning rate.
        weight_decay: Coefficient ``w`` of the decay.
        decay: ``"l2"`` adds ``w x`` to the gradient (torch's Adam, SGD); ``"decoupled"`` multiplies the
            weights by ``1 - lr w`` before the step (AdamW, Loshchilov & Hutter 2019).
        clip: Largest norm of a member's whole gradient; longer gradients are scaled down to it. Torch's
            ``clip_grad_norm_`` on a stack would mix the members; this one never does. Like torch it
            divides by ``norm + 1e-6``.
        box: Projects every weight onto ``|x| <= box`` after the step. Coordinatewise clipping is the
            projection in any diagonal metric, so also the one of AdaGrad's, Adam's and AMSGrad's papers.

    Raises:
        LosslabError: An unknown variant, or a hyperparameter outside of its range.
    """

    lr: Hyper
    weight_decay: Hyper = 0.0
    decay: str = "l2"
    clip: Hyper | None = None
    box: Hyper | None = None

    # What a family tells about itself: its page, then names and limits, then what it asks of the caller.
    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    notes: ClassVar[str] = ""
    variants: ClassVar[Mapping[str, str]] = {}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    torch_names: ClassVar[Mapping[str, str]] = {}  # slot -> torch.optim's key for the same quantity
    full_batch: ClassVar[bool] = False  # wants the whole training set when no batch size is given
    whole_vector: ClassVar[bool] = False  # `leaf` sees a member's weights as one vector, x is [N, P]
    needs_curvature: ClassVar[bool] = False  # `leaf` finds in h.curvature what it may ask
    largest: ClassVar[int] = 5000  # most weights P a member for a rule with a P x P matrix

    def __post_init__(self) -> None:
        """Turns sequences into float64 tensors and checks variants and ranges."""
        if self.decay not in ("l2", "decoupled"):
            raise unknown("weight decay", self.decay, ("l2", "decoupled"))
        if self.variants and getattr(self, "variant", None) not in self.variants:
            raise unknown(f"variant of {self.name}", getattr(self, "variant", None), self.variants)
        for name in self.hyperparameters():
            value = getattr(self, name)
            if callable(value) or (value is None and name in ("clip", "box")):
                continue
            value = _as_number_or_members(self.name, name, value)
            _check_range(self.name, name, value, *self.ranges.get(name, (0.0, math.inf)))
            object.__setattr__(self, name, value)

    # -- what a family provides -----------------------------------------------------------------------

    def slots(self) -> tuple[str, ...]:
        """Names of the state tensors kept for each weight, all starting at zero."""
        return ()

    def asks(self) -> tuple[str, ...]:
        """Methods of `Landscape` that `leaf` calls, where it needs curvature."""
        return ("hessian",)

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation: new ``x`` and state from gradient ``g`` ``[N, ...]`` at update ``t`` (from 1)."""
        raise NotImplementedError

    # -- what everyone uses ---------------------------------------------------------------------------

    @classmethod
    def hyperparameters(cls) -> tuple[str, ...]:
        """Names of the numeric hyperparameters: what may differ between members or follow a schedule."""
        return _hyperparameters(cls)  # type: ignore[arg-type]  # classes are hashable, mypy looks at instances

    def replace(self, **changes: Any) -> Rule:
        """The same rule with other hyperparameters."""
        return dataclasses.replace(self, **changes)

    def members(self) -> int | None:
        """How many members the hyperparameters speak of, None when every one is a single value.

        Raises:
            LosslabError: Two hyperparameters speak of different numbers.
        """
        sizes = {name: value.shape[0] for name, value in self._per_member().items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size} values" for name, size in sizes.items())
            raise LosslabError(f"{self.name}: {told}: give each the same number, one value a member")
        return next(iter(sizes.values()), None)

    def check_members(self, members: int) -> None:
        """Raises LosslabError when a hyperparameter's shape does not fit a population of ``members``."""
        for name, value in self._per_member().items():
            if value.shape != (members,):
                raise LosslabError(
                    f"{name} has shape {tuple(value.shape)}, the population has {members} members: "
                    "pass a scalar or one value per member"
                )

    def _per_member(self) -> dict[str, Tensor]:
        return {n: v for n, v in vars(self.at(0)).items() if isinstance(v, Tensor)}

    def select(self, index: Sequence[int]) -> Rule:
        """The rule of some members: hyperparameters given per member are reduced to those in ``index``."""
        picked = list(index)
        changes: dict[str, Any] = {
            name: value[picked]
            for name in self.hyperparameters()
            if isinstance(value := getattr(self, name), Tensor)
        }
        for name in self.hyperparameters():
            if callable(value := getattr(self, name)):
                changes[name] = _Selected(value, picked)
        return self.replace(**changes) if changes else self

    @functools.cached_property
    def _fixed(self) -> dict[torch.device | None, Coefficients]:
        return {}

    def at(self, step: int, device: torch.device | None = None) -> Coefficients:
        """Every hyperparameter's value at a step (0 at the first update); one object while none changes."""
        if device in self._fixed:
            return self._fixed[device]
        values = {}
        for name in self.hyperparameters():
            value = getattr(self, name)
            if callable(value):
                value = value(step)
                value = float(value) if not isinstance(value, Tensor) or value.dim() == 0 else value.double()
            if isinstance(value, Tensor) and device is not None:
                value = value.to(device)
            values[name] = value
        told = Coefficients(values)
        if not any(callable(getattr(self, name)) for name in self.hyperparameters()):
            self._fixed[device] = told
        return told

    def init(self, weights: Weights) -> State:
        """The state before the first update: zeros for every slot."""
        if self.whole_vector:
            self._check_size(weights)
            return {slot: {"": self.initial(slot, _matrix(weights))} for slot in self.slots()}
        return {slot: {n: self.initial(slot, x) for n, x in weights.items()} for slot in self.slots()}

    def initial(self, slot: str, x: Tensor) -> Tensor:
        """The start of one slot for one weight (or the whole vector); zeros unless a family differs."""
        return torch.zeros_like(x, requires_grad=False, memory_format=torch.contiguous_format)

    def update(
        self,
        gradients: Weights,
        state: State,
        weights: Weights,
        step: int,
        curvature: Curvature | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """One update of every member; pure: the arguments are left as they are.

        Args:
            gradients: Gradient of each member's loss, name -> ``[N, ...]``.
            state: What `init` or the last `update` returned.
            weights: Name -> ``[N, ...]``.
            step: 0 at the first update.
            curvature: Asked by second-order rules only; a `Landscape` answers all of them.

        Returns:
            New weights and new state.

        Raises:
            LosslabError: A second-order rule was given no curvature or one that lacks an answer, or a rule
                that keeps a matrix of all weights too many of them.
        """
        if self.needs_curvature:
            check(curvature, self.name, self.asks())
        names = list(weights)
        h = self.at(step, weights[names[0]].device if names else None)
        with torch.no_grad():
            gradients = self.prepared(gradients, weights, h)
            if not self.whole_vector:
                return self._leafwise(gradients, state, weights, h, step + 1)
            self._check_size(weights)
            h = Coefficients({**vars(h), "curvature": curvature})
            x = _decayed(_matrix(weights), h, self.decay)
            s = {slot: tensors[""] for slot, tensors in state.items()}
            x, s = self.leaf(_matrix(gradients), x, s, h, step + 1)
            x = self._projected(x, h)
            return _unmatrix(x, weights), {slot: {"": t.to(state[slot][""].dtype)} for slot, t in s.items()}

    def as_torch(self, params: Iterable[Any]) -> TorchOptimizer:
        """This rule as a ``torch.optim.Optimizer`` of ordinary parameters, see `TorchOptimizer`."""
        from losslab.rules.adapter import TorchOptimizer

        return TorchOptimizer(params, self)

    def prepared(self, gradients: Weights, weights: Weights, h: Any) -> Weights:
        """The gradients the equation sees: clipped per member, L2 decay added."""
        if self.clip is not None:
            norm = member_norm(gradients)
            scale = torch.clamp(_on(h.clip, norm) / (norm + 1e-6), max=1.0)
            gradients = {n: g * cast(scale, g) for n, g in gradients.items()}
        if self.decay == "l2" and _nonzero(h.weight_decay):
            gradients = {n: g + cast(h.weight_decay, g) * weights[n] for n, g in gradients.items()}
        return gradients

    def _leafwise(
        self, gradients: Weights, state: State, weights: Weights, h: Any, t: int
    ) -> tuple[dict[str, Tensor], State]:
        new_weights: dict[str, Tensor] = {}
        new_state: State = {slot: {} for slot in state}
        for name, x in weights.items():
            s = {slot: tensors[name] for slot, tensors in state.items()}
            x, s = self.leaf(gradients[name], _decayed(x, h, self.decay), s, h, t)
            new_weights[name] = self._projected(x, h).to(weights[name].dtype)
            for slot, tensor in s.items():
                new_state[slot][name] = tensor.to(state[slot][name].dtype)
        return new_weights, new_state

    def _check_size(self, weights: Weights) -> None:
        size = sum(x.shape[1:].numel() for x in weights.values())  # there may be no member left
        if size > self.largest:
            raise LosslabError(
                f"{self.name} got {size} weights, whose matrix takes {size * size * 8:,} bytes a member, "
                f"and is meant for at most {self.largest}: take a smaller network or a diagonal rule"
            )

    def _projected(self, x: Tensor, h: Any) -> Tensor:
        if self.box is None:
            return x
        limit = cast(h.box, x)
        return torch.clamp(x, -limit, limit)

    def describe(self) -> dict[str, Any]:
        """Every field as plain values, for tables, checkpoints and provenance."""
        told: dict[str, Any] = {"rule": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            told[field.name] = value.tolist() if isinstance(value, Tensor) else value
            if callable(value):
                told[field.name] = repr(value)
        return told


class _Selected:
    """A schedule restricted to some members, should it give one value a member."""

    def __init__(self, schedule: Schedule, index: list[int]) -> None:
        self.schedule, self.index = schedule, index

    def __call__(self, step: int) -> float | Tensor:
        value = self.schedule(step)
        return value[self.index] if isinstance(value, Tensor) and value.dim() else value

    def __repr__(self) -> str:
        return repr(self.schedule)


@functools.cache
def _hyperparameters(cls: type[Rule]) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls) if "Hyper" in str(f.type))


def member_norm(tensors: Weights) -> Tensor:
    """Euclidean norm of each member's whole vector, ``[N]``."""
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in _with_axis(tensors)]
    return torch.linalg.vector_norm(torch.stack(squares), dim=0)


def _with_axis(tensors: Weights) -> list[Tensor]:
    return [g if g.dim() > 1 else g[:, None] for g in tensors.values()]


def _matrix(weights: Weights) -> Tensor:
    return torch.cat([x.flatten(1) for x in _with_axis(weights)], dim=1)


def _unmatrix(matrix: Tensor, like: Weights) -> dict[str, Tensor]:
    sizes = [x.shape[1:].numel() for x in like.values()]
    parts = matrix.split(sizes, dim=1)
    return {n: p.reshape(x.shape).to(x.dtype) for p, (n, x) in zip(parts, like.items(), strict=True)}


def _nonzero(value: float | Tensor) -> bool:
    return bool((value != 0).any()) if isinstance(value, Tensor) else value != 0


def _on(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def _decayed(x: Tensor, h: Any, decay: str) -> Tensor:
    if decay != "decoupled" or not _nonzero(h.weight_decay):
        return x
    return x * cast(1 - h.lr * h.weight_decay, x)


def _as_number_or_members(rule: str, name: str, value: Any) -> float | Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LosslabError(
            f"{rule}: {name} is {value!r}, no number: pass a number, one number a member, or a schedule"
        ) from error
    if tensor.dim() > 1 or tensor.numel() == 0:
        raise LosslabError(
            f"{rule}: {name} has shape {tuple(tensor.shape)}: pass a scalar or one value per member"
        )
    return tensor.clone() if tensor.dim() else float(tensor)


def _check_range(rule: str, name: str, value: float | Tensor, low: float, high: float) -> None:
    """Values lie in ``[low, high)``: a decay of 1 would never forget, and its correction divides by 0."""
    for v in value.tolist() if isinstance(value, Tensor) else [value]:
        if math.isnan(v) or not low <= v < high:
            wanted = f"at least {low:g} and " + ("finite" if high == math.inf else f"below {high:g}")
            raise LosslabError(f"{rule}: {name} is {v:g}, it must be {wanted}: change {name}")
