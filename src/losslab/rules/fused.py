"""One pass over memory for the rules that torch has a fused kernel for: same numbers, in place.

An update written as tensor arithmetic reads and writes the weights a dozen times. Torch's fused kernels do
it once, but take one rate for everything; here they serve members that differ, and rules they were not
written for: Adam's kernel at step "infinity" has no bias correction, and with beta1 = 0 it is RMSProp.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from losslab.rules.adagrad import AdaGrad
from losslab.rules.adam import Adam, AMSGrad
from losslab.rules.descent import GD, SGD
from losslab.rules.momentum import Momentum, Nesterov
from losslab.rules.rmsprop import RMSProp
from losslab.rules.rule import Coefficients, Rule, State, Weights, _nonzero, cast

SLICED_FROM = 32768
"""Size of a member's tensor from which one kernel call a member beats one call on all and a scaled add."""

INFINITY = 1e30
"""A step count at which every correction ``1 - beta^t`` is exactly 1; finite, and a float32."""


def stepper(rule: Rule) -> Stepper | None:
    """An in-place update equal to ``rule.update`` up to rounding, or None where there is no kernel for it.

    Example:
        >>> rule, w = SGD(lr=0.5), {"x": torch.ones(1, 2)}
        >>> step = stepper(rule)
        >>> step({"x": torch.ones(1, 2)}, rule.init(w), w, 0)
        >>> w["x"]
        tensor([[0.5000, 0.5000]])
    """
    if rule.clip is not None or rule.box is not None:
        return None
    for kind in (_Descending, _Summing, _Averaging):
        if kind.serves(rule):
            return kind(rule)
    return None


class Stepper:
    """Changes weights and state in place; gradients are left as they are.

    Tensors must be contiguous, on one device and of one dtype. Members whose hyperparameters differ take one
    of two ways, whichever is faster: one kernel call with rate 1 into a zero buffer, then one scaled add; or
    one kernel call a member on slices of the stacks.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.buffers: list[Tensor] = []
        self.views: tuple[tuple[int, ...], list[list[Tensor]]] | None = None
        self._for: Any = None
        self._kept: dict[str, Any] = {}

    def _once(self, h: Any, name: str, make: Callable[[], Any]) -> Any:
        """Something derived from the hyperparameters, made anew only when these are another object."""
        if self._for is not h:
            self._for, self._kept = h, {}
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @staticmethod
    def serves(rule: Rule) -> bool:
        """Whether this kernel computes that rule."""
        raise NotImplementedError

    def kernel(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """The update where every hyperparameter is a float; L2 decay is left to it."""
        raise NotImplementedError

    def direction(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """The step at rate 1, written into ``x``."""
        torch._foreach_zero_(x)
        self.kernel(x, g, slots, h, t)

    @torch.no_grad()
    def __call__(self, gradients: Weights, state: State, weights: Weights, step: int) -> None:
        """One update of stacked tensors, ``step`` 0 at the first."""
        if not weights:
            return
        h = self.rule.at(step, next(iter(weights.values())).device)
        parts = getattr(gradients, "parts", gradients)  # gradients not written out yet stay as they are
        g = [part if hasattr(part := parts[n], "tensor") else part.contiguous() for n in weights]
        slots = [[state[slot][n] for n in weights] for slot in self.rule.slots()]
        self.apply(list(weights.values()), g, slots, h, step + 1)

    def apply(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """The same on lists: weights, gradients, state by slot; of any shape where ``h`` is all floats.

        The caller has switched gradients off.
        """
        if self.rule.decay == "decoupled" and _nonzero(h.weight_decay):
            for xi in x:
                xi.mul_(cast(1 - h.lr * h.weight_decay, xi))
            h = Coefficients({**vars(h), "weight_decay": 0.0})
        varying = {name for name, value in vars(h).items() if isinstance(value, Tensor)}
        if not varying and all(isinstance(gi, Tensor) for gi in g):
            self.kernel(x, g, slots, h, t)
            return
        large = [True] * len(x)
        if varying <= {"lr", "weight_decay"}:
            large = [w[0].numel() >= SLICED_FROM for w in x]
        for way, chosen in ((self._sliced, True), (self._buffered if varying else self.kernel, False)):
            if all(big is chosen for big in large):
                way(x, g, slots, h, t)
            elif chosen in large:
                part = [list(compress(ts, [big is chosen for big in large])) for ts in (x, g, *slots)]
                way(part[0], part[1], part[2:], h, t)

    def _buffered(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        if isinstance(h.weight_decay, Tensor) or h.weight_decay:  # the kernel takes no tensor, not even zeros
            g = [gi + cast(h.weight_decay, gi) * xi for gi, xi in zip(g, x, strict=True)]
            h = Coefficients({**vars(h), "weight_decay": 0.0})
        self._scaled(x, g, slots, h, t)

    def _scaled(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """One kernel call with rate 1 into a zero buffer, then one scaled add."""
        self.buffers = _like(self.buffers, x)
        unit = self._once(h, "unit", lambda: Coefficients({**vars(h), "lr": 1.0}))
        rates = self._once(h, "rates", lambda: [cast(h.lr, xi) for xi in x])
        self.direction(self.buffers, g, slots, unit, t)
        torch._foreach_addcmul_(x, self.buffers, rates)

    def _sliced(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        identity = tuple(tensor.data_ptr() for tensors in (x, *slots) for tensor in tensors)
        if self.views is None or self.views[0] != identity:
            self.views = (
                identity,
                [[t for w in tensors for t in w.detach().unbind(0)] for tensors in (x, *slots)],
            )
        fixed = self.views[1]
        moving = [w.unbind(0) for w in g]
        members = x[0].shape[0]
        table = {n: v.tolist() if isinstance(v, Tensor) else [v] * members for n, v in vars(h).items()}
        for i, values in enumerate(zip(*table.values(), strict=True)):
            mine = [tensors[i::members] for tensors in fixed]
            self.kernel(
                mine[0],
                [rows[i] for rows in moving],
                mine[1:],
                Coefficients(dict(zip(table, values, strict=True))),
                t,
            )


class _Averaging(Stepper):
    """Adam, AMSGrad and RMSProp by ``torch._fused_adam_``."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.clock: Tensor | None = None
        self.scratch: list[Tensor] = []
        self.named: tuple[Any, Coefficients] | None = None

    @staticmethod
    def serves(rule: Rule) -> bool:
        """Denominators of the form ``sqrt(v) + eps``, with torch's corrections or with none."""
        if type(rule) is RMSProp:
            return rule.variant != "inside" and not rule.centred and not rule.rolling
        if type(rule) is Adam:
            return isinstance(rule.eps_root, float) and rule.eps_root == 0.0
        return type(rule) is AMSGrad and rule.variant != "optax"

    def apply(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """As in the base, with the kernel's clock set and its names for RMSProp's decay."""
        variant = getattr(self.rule, "variant", "")
        if isinstance(self.rule, RMSProp):
            self.scratch = _like(self.scratch, x)
            slots = [self.scratch, *slots]
        if self.named is None or self.named[0] is not h:
            self.named = (h, self._named(h))
        if self.clock is None or self.clock.device != x[0].device:
            self.clock = torch.zeros((), device=x[0].device)
        self.clock.fill_(t if variant in ("kingma-ba", "torch") else INFINITY)
        super().apply(x, g, slots, self.named[1], t)

    def _named(self, h: Any) -> Coefficients:
        values = dict(vars(h))
        if isinstance(self.rule, RMSProp):
            values |= {"beta1": 0.0, "beta2": values.pop("beta")}
        if getattr(self.rule, "variant", "") == "lecture":
            values["eps"] = 0.0
        return Coefficients(values)

    def kernel(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """One call for all tensors."""
        self._call(torch._fused_adam_, x, g, slots, h, h.weight_decay)

    def direction(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """The step at rate 1: AdamW's kernel with decay 1 forgets ``x`` on the way, which saves a pass."""
        self._call(torch._fused_adamw_, x, g, slots, h, 1.0)

    def _call(
        self, fused: Any, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, decay: float
    ) -> None:
        assert self.clock is not None
        fused(
            x,
            g,
            slots[0],
            slots[1],
            slots[2] if len(slots) > 2 else [],
            [self.clock] * len(x),
            lr=h.lr,
            beta1=h.beta1,
            beta2=h.beta2,
            weight_decay=decay,
            eps=h.eps,
            amsgrad=len(slots) > 2,
            maximize=False,
        )


class _Summing(Stepper):
    """AdaGrad by ``torch._fused_adagrad_``; by arithmetic off the CPU, where older torch has no kernel."""

    clock = torch.ones(())

    @staticmethod
    def serves(rule: Rule) -> bool:
        """Mirror descent without a penalty."""
        return type(rule) is AdaGrad and rule.variant == "mirror" and not rule.penalised

    def kernel(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """One call for all tensors."""
        if x[0].is_cpu:
            clocks = [self.clock] * len(x)
            torch._fused_adagrad_(
                x,
                g,
                slots[0],
                clocks,
                lr=h.lr,
                lr_decay=0.0,
                weight_decay=h.weight_decay,
                eps=h.eps,
                maximize=False,
            )
            return
        if h.weight_decay:
            g = list(torch._foreach_add(g, x, alpha=h.weight_decay))
        torch._foreach_addcmul_(slots[0], g, g)
        scale = torch._foreach_sqrt(slots[0])
        torch._foreach_add_(scale, h.eps)
        torch._foreach_addcdiv_(x, g, scale, -h.lr)


class _Descending(Stepper):
    """Descent and momentum by ``torch._fused_sgd_``."""

    @staticmethod
    def serves(rule: Rule) -> bool:
        """The forms whose rate stands outside of the sum."""
        if type(rule) in (GD, SGD):
            return True
        return type(rule) in (Momentum, Nesterov) and rule.slots() == ("b",)

    def kernel(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """One call for all tensors; by arithmetic in short dtypes on the CPU.

        There torch's kernel skips whole vectors and garbles the buffer, up to version 2.13 (pytorch#191763).
        """
        if x[0].is_cpu and x[0].dtype.itemsize < 4:
            self._plainly(x, g, slots, h, t)
            return
        torch._fused_sgd_(
            x,
            g,
            slots[0] if slots else [],
            weight_decay=h.weight_decay,
            momentum=max(h.beta, 1e-300) if slots else 0.0,  # at 0 it would leave the buffer as it was
            lr=h.lr,
            dampening=getattr(h, "dampening", 0.0),
            nesterov=isinstance(self.rule, Nesterov),
            maximize=False,
            is_first_step=t == 1,
        )

    def _plainly(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        if h.weight_decay:
            g = list(torch._foreach_add(g, x, alpha=h.weight_decay))
        for buffer in slots:
            torch._foreach_mul_(buffer, h.beta if t > 1 else 0.0)
            torch._foreach_add_(buffer, g, alpha=1.0 - getattr(h, "dampening", 0.0) if t > 1 else 1.0)
            nesterov = isinstance(self.rule, Nesterov)
            g = list(torch._foreach_add(g, buffer, alpha=h.beta)) if nesterov else buffer
        torch._foreach_add_(x, g, alpha=-h.lr)

    def _scaled(self, x: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], h: Any, t: int) -> None:
        """Plain descent needs no buffer: its direction is the gradient."""
        if slots:
            super()._scaled(x, g, slots, h, t)
            return
        rates = self._once(h, "rates", lambda: [cast(-h.lr, xi) for xi in x])
        for xi, gi, rate in zip(x, g, rates, strict=True):
            xi.addcmul_(gi, rate)


def _like(buffers: list[Tensor], x: list[Tensor]) -> list[Tensor]:
    if [(b.shape, b.dtype, b.device) for b in buffers] == [(w.shape, w.dtype, w.device) for w in x]:
        return buffers
    return [torch.zeros_like(w, requires_grad=False) for w in x]
