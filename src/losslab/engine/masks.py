"""Masks: weights that are held at zero, and know neither gradient nor decay nor moments."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from losslab.engine.gradients import Factored, Gradients
from losslab.engine.points import Stack
from losslab.errors import LosslabError
from losslab.rules import Rule
from losslab.rules.rule import State, Weights

_PROBED = (0, 1, 100)


def as_masks(masks: Mapping[str, Tensor], weights: Stack) -> Stack:
    """Masks as they are kept: name -> bool ``[N, *shape]``, True where the weight lives.

    Args:
        masks: True or 1 where a weight is kept, for some weights: ``[*shape]`` for all members alike, or
            ``[N, *shape]``.
        weights: What they are masks of, name -> ``[N, *shape]``.

    Raises:
        LosslabError: An unknown name, another shape, or values beside 0 and 1.

    Example:
        >>> as_masks({"w": torch.tensor([1.0, 0.0])}, {"w": torch.ones(2, 2)})["w"].tolist()
        [[True, False], [True, False]]
    """
    kept: Stack = {}
    for name, mask in masks.items():
        if name not in weights:
            raise LosslabError(
                f"a mask is for {name!r}, which the model has not: its weights are {', '.join(weights)}"
            )
        shape = tuple(weights[name].shape)
        if tuple(mask.shape) not in (shape, shape[1:]):
            raise LosslabError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the weights {shape}: "
                "pass masks of this model, one for all members or one each"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise LosslabError(f"the mask of {name!r} has values beside 0 and 1: pass True where one is kept")
        kept[name] = mask.to(weights[name].device).bool().expand(shape).contiguous()
    return {name: kept[name] for name in weights if name in kept}


def zeroed(tensors: Mapping[str, Tensor], masks: Stack) -> Stack:
    """The same tensors, zero where a mask says so; copies where there is a mask."""
    return {n: t.masked_fill(~masks[n], 0) if n in masks else t for n, t in tensors.items()}


def zeroed_state(state: State, masks: Stack) -> State:
    """A rule's state without what it holds of pruned weights."""
    return {slot: zeroed(tensors, masks) if "" not in tensors else tensors for slot, tensors in state.items()}


def told(masks: Stack) -> str | None:
    """A checksum, for a run's settings; None where nothing is masked."""
    if not masks:
        return None
    total = hashlib.blake2b(digest_size=8)
    for name, mask in masks.items():
        total.update(f"{name}:{tuple(mask.shape)};".encode())
        total.update(mask.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


class Pruning:
    """Keeps the masked weights of a working stack at zero through one rule's updates.

    A gradient that is zero keeps most rules' weights where they are, if that is zero, and their moments too:
    then one product a step is all it takes, and a large layer's gradient stays two factors until the fused
    kernel asks for it. Where that is not so (Adam without epsilon divides 0 by 0, noise is added, an update
    mixes the weights) the weights and the state are set to zero again after each update.

    Args:
        masks: Of the members of the stack, name -> bool ``[N, *shape]``.
        weights: The stack.
        rule: A losslab rule, or somebody else's.
        fused: Whether a kernel carries it out.
    """

    def __init__(self, masks: Stack, weights: Stack, rule: Any, fused: bool) -> None:
        self.masks = masks
        self.factors = {n: m.to(weights[n].dtype) for n, m in masks.items()}
        self.dead: Stack = {}
        if not (fused and stays_at_zero(rule)):
            self.dead = {n: ~m for n, m in masks.items()}
        self._flat: Tensor | None = None

    def gradients(self, grads: Weights) -> Weights:
        """The gradients, zero where a weight is pruned; those kept as factors stay so."""
        if not self.factors:
            return grads
        parts = dict(getattr(grads, "parts", grads))
        for name, factor in self.factors.items():
            part = parts[name]
            if isinstance(part, Factored):
                parts[name] = part.times(factor)
            else:  # a gradient is its receiver's to overwrite, unless members share its memory
                parts[name] = part.mul_(factor) if part.is_contiguous() else part * factor
        return Gradients(parts)

    @torch.no_grad()
    def after(self, weights: Stack, state: State) -> None:
        """Sets pruned weights and their state to zero, in place, where the rule might have moved them."""
        for name, dead in self.dead.items():
            weights[name].detach().masked_fill_(dead, 0)
            for tensors in state.values():
                if name in tensors and tensors[name].shape == dead.shape:
                    tensors[name].masked_fill_(dead, 0)

    def flat(self, weights: Stack) -> Tensor:
        """The masks of all weights as one bool matrix ``[N, P]``, in the order of the names."""
        if self._flat is None:
            whole = (self.masks.get(n, torch.ones_like(w, dtype=torch.bool)) for n, w in weights.items())
            self._flat = torch.cat([m.reshape(m.shape[0], -1) for m in whole], dim=1)
        return self._flat


class PrunedCurvature:
    """What a second-order rule asks, answered for the weights that are left.

    Matrices have the rows and columns of pruned weights replaced by the identity's, vectors are cut off
    there: with a gradient that is zero there too, the step is the one within the subspace.

    Args:
        whole: The curvature of all weights.
        keep: Which are left, bool ``[N, P]``.
    """

    def __init__(self, whole: Any, keep: Tensor) -> None:
        self.whole, self.keep = whole, keep

    def hessian(self) -> Tensor:
        """``[N, P, P]``."""
        return self._cut(self.whole.hessian())

    def gauss_newton(self) -> Tensor:
        """``[N, P, P]``."""
        return self._cut(self.whole.gauss_newton())

    def products(self, vectors: Tensor) -> Tensor:
        """``[N, P] -> [N, P]``."""
        return self.whole.products(vectors * self.keep) * self.keep

    def value(self, weights: Tensor) -> Tensor:
        """``[N, P] -> [N]``."""
        return self.whole.value(weights * self.keep)

    def gradient(self, weights: Tensor) -> Tensor:
        """``[N, P] -> [N, P]``."""
        return self.whole.gradient(weights * self.keep) * self.keep

    def _cut(self, matrix: Tensor) -> Tensor:
        both = self.keep[:, :, None] & self.keep[:, None, :]
        return torch.where(both, matrix, torch.eye(matrix.shape[-1]).to(matrix))


def stays_at_zero(rule: Any) -> bool:
    """Whether a rule leaves a weight that is zero, with a gradient that always is, at exactly zero.

    Found out by trying; rules that treat each weight on its own give one answer for all.
    """
    if not isinstance(rule, Rule) or rule.whole_vector or rule.needs_curvature:
        return False
    members = rule.members() or 1
    weights = {"x": torch.zeros(members, 1)}
    for first in _PROBED:
        state, x = rule.init(weights), weights
        for step in (first, first + 1):
            x, state = rule.update({"x": weights["x"]}, state, x, step)
        moved = [x["x"], *(tensors["x"] for tensors in state.values())]
        if any(t.shape == weights["x"].shape and not bool((t == 0).all()) for t in moved):
            return False
    return True
