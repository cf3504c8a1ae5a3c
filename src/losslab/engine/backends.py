"""Three ways to run a network's code for N members: the table, vmap, a loop. Equal to rounding.

Each takes ``fn(module, batch)``, a loss or a set of metrics, and returns its value for every member, stacked.
Buffers are advanced in place when training; whoever wants them kept passes copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from losslab.engine import table as _table  # noqa: F401  (fills the table of operations)
from losslab.engine.points import Stack
from losslab.engine.randomness import MemberRandom
from losslab.engine.stacked import NotInTable, Stacked
from losslab.engine.template import Template
from losslab.tasks import Batch
from losslab.tasks.nest import leaves, map_nest

Function = Callable[[nn.Module, Batch], Any]


class Backend:
    """One way of running all members.

    Args:
        template: The network whose code is run.
        draws: Whether that code draws random numbers through torch functions (dropout).
        global_draws: Whether it draws from torch's global generator, which then is seeded for each call.
    """

    name: ClassVar[str] = ""

    def __init__(self, template: Template, draws: bool = True, global_draws: bool = False) -> None:
        self.template, self.draws, self.global_draws = template, draws, global_draws

    def run(
        self, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor, training: bool
    ) -> Any:
        """``fn`` at every member: a tensor ``[N, ...]`` or a dict of them, differentiable in the weights.

        Args:
            fn: A loss or metrics.
            weights: Name -> ``[N, ...]``.
            buffers: Name -> ``[N, ...]``; advanced in place when training.
            batch: The examples: one batch for all, or a batch a member (``private``, leading axis N).
            private: Whether every member has its own batch.
            keys: One key a member ``[N]`` for the random draws of this call.
            training: Whether dropout and batch norm act as in training.
        """
        raise NotImplementedError

    def gradients(
        self, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor
    ) -> tuple[Tensor, Stack]:
        """Each member's loss ``[N]`` and the gradient with respect to its own weights."""
        leaf = {n: w.detach().requires_grad_() for n, w in weights.items()}
        losses = self.run(fn, leaf, buffers, batch, private, keys, training=True)
        grads = torch.autograd.grad(losses.sum(), list(leaf.values()), allow_unused=True)
        return losses.detach(), {
            n: torch.zeros_like(w) if g is None else g
            for (n, w), g in zip(weights.items(), grads, strict=True)
        }

    def _randomness(self, keys: Tensor, training: bool, wrap: Any = lambda t: t) -> AbstractContextManager[Any]:
        return MemberRandom(keys, wrap) if self.draws and training else nullcontext()


class TableBackend(Backend):
    """All members by hand-batched operations."""

    name = "table"

    def run(
        self, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor, training: bool
    ) -> Any:
        """Runs the network's code once, on `Stacked` values."""
        values = {n: Stacked(t) for n, t in (*weights.items(), *buffers.items())}
        given = map_nest(Stacked, batch) if private else batch
        with self.template.holding(values, training) as module, self._randomness(keys, training, Stacked):
            result = fn(module, given)
        if isinstance(result, dict):
            return {name: _unwrapped(value) for name, value in result.items()}
        return _unwrapped(result)


def _unwrapped(value: Any) -> Tensor:
    if not isinstance(value, Stacked):
        raise NotInTable("a result that does not depend on the member")
    return value.data


class VmapBackend(Backend):
    """All members by torch's vmap."""

    name = "vmap"

    def run(
        self, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor, training: bool
    ) -> Any:
        """Maps the network's code over the member axis."""

        def one(w: Stack, b: Stack, tensors: list[Tensor], k: Tensor) -> tuple[Any, Stack]:
            held = {n: t.clone() for n, t in b.items()}
            given = batch
            if private:
                parts = iter(tensors)
                given = map_nest(lambda _: next(parts), batch)
            with self.template.holding({**w, **held}, training) as module, self._randomness(k, training):
                return fn(module, given), held

        tensors = leaves(batch) if private else []
        mapped = torch.func.vmap(one, in_dims=(0, 0, 0, 0), randomness="error")
        result, moved = mapped(weights, buffers, tensors, keys)
        if training:
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(moved[name])
        return result


class LoopBackend(Backend):
    """One member after another, as plain torch runs them."""

    name = "loop"

    def run(
        self, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor, training: bool
    ) -> Any:
        """Runs the network's code N times."""
        rows = {n: w.unbind(0) for n, w in weights.items()}
        results = [
            self._one(fn, {n: r[i] for n, r in rows.items()}, buffers, batch, private, keys, training, i)
            for i in range(keys.shape[0])
        ]
        if isinstance(results[0], dict):
            return {name: torch.stack([r[name] for r in results]) for name in results[0]}
        return torch.stack(results)

    def gradients(
        self, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor
    ) -> tuple[Tensor, Stack]:
        """One backward pass a member, so that one member's graph is held at a time."""
        grads = {n: torch.empty_like(w) for n, w in weights.items()}
        losses = []
        for i in range(keys.shape[0]):
            leaf = {n: w.detach()[i].requires_grad_() for n, w in weights.items()}
            loss = self._one(fn, leaf, buffers, batch, private, keys, True, i)
            found = torch.autograd.grad(loss, list(leaf.values()), allow_unused=True)
            for name, g in zip(leaf, found, strict=True):
                if g is None:
                    grads[name][i].zero_()
                else:
                    grads[name][i].copy_(g)
            losses.append(loss.detach())
        return torch.stack(losses), grads

    def _one(
        self,
        fn: Function,
        weights: Stack,
        buffers: Stack,
        batch: Batch,
        private: bool,
        keys: Tensor,
        training: bool,
        i: int,
    ) -> Any:
        given = map_nest(lambda t: t[i], batch) if private else batch
        values = {**weights, **{n: b[i] for n, b in buffers.items()}}
        seeding = _seeded(int(keys[i])) if self.global_draws and training else nullcontext()
        with seeding, self.template.holding(values, training) as module, self._randomness(keys[i], training):
            return fn(module, given)


@contextmanager
def _seeded(key: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key & ((1 << 63) - 1))
        yield


BACKENDS: dict[str, type[Backend]] = {b.name: b for b in (TableBackend, VmapBackend, LoopBackend)}
