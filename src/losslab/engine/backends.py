"""The ways to run a network's code for N members: tape, table, vmap, loop. Equal to rounding.

Each takes ``fn(module, batch)``, a loss or a set of metrics, and a `Stand`: where the members stand and what
they look at. Buffers are advanced in place when training; whoever wants them kept passes copies.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from losslab.engine import kernels, table, table_layers, tape  # noqa: F401  (the tables fill themselves)
from losslab.engine.chain import Chain
from losslab.engine.gradients import Gradients
from losslab.engine.points import Stack
from losslab.engine.products import LargeProducts
from losslab.engine.randomness import MemberRandom, reseeded
from losslab.engine.stacked import NotInTable, Stacked
from losslab.engine.tape import Node
from losslab.engine.template import Template
from losslab.errors import LosslabError
from losslab.rules.rule import Weights
from losslab.tasks import Batch
from losslab.tasks.nest import leaves, map_nest

Function = Callable[[nn.Module, Batch], Any]


@dataclass
class Stand:
    """Where N members stand and what they look at.

    Args:
        weights: Name -> ``[N, ...]``.
        buffers: Name -> ``[N, ...]``.
        batch: The examples: one batch for all, or a batch a member.
        private: Whether every member has its own batch; its tensors then have a leading axis N.
        keys: One key a member ``[N]``, for the random draws of this call.
    """

    weights: Stack
    buffers: Stack
    batch: Batch
    private: bool
    keys: Tensor

    @property
    def members(self) -> int:
        """N."""
        return self.keys.shape[0]

    @property
    def examples(self) -> int:
        """Examples a member looks at; 1 where there is no data."""
        tensors = leaves(self.batch)
        return tensors[0].shape[1 if self.private else 0] if tensors else 1

    def rows(self, rows: slice) -> Stand:
        """Some of the members: views."""
        return Stand(
            {n: w[rows] for n, w in self.weights.items()},
            {n: b[rows] for n, b in self.buffers.items()},
            map_nest(lambda t: t[rows], self.batch) if self.private else self.batch,
            self.private,
            self.keys[rows],
        )

    def ends(self) -> Stand:
        """The first member and, if there are more, the last."""
        return self.rows(slice(0, None, max(1, self.members - 1)))

    def to(self, dtype: torch.dtype) -> Stand:
        """In another dtype; what is not floating keeps its own."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        weights, buffers = ({n: cast(t) for n, t in s.items()} for s in (self.weights, self.buffers))
        return dataclasses.replace(self, weights=weights, buffers=buffers, batch=map_nest(cast, self.batch))

    def sheltered(self) -> Stand:
        """The same with copies of the buffers, so that they stay as they are."""
        return dataclasses.replace(self, buffers={n: b.clone() for n, b in self.buffers.items()})


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

    def run(self, fn: Function, at: Stand, training: bool) -> Any:
        """``fn`` at every member: a tensor ``[N, ...]`` or a dict of them, differentiable in the weights.

        Args:
            fn: A loss or metrics.
            at: The members; their buffers are advanced in place when training.
            training: Whether the network is in training mode, for dropout and batch norm.
        """
        raise NotImplementedError

    def gradients(self, fn: Function, at: Stand) -> tuple[Tensor, Weights]:
        """Each member's loss ``[N]`` in training mode and the gradient with respect to its own weights."""
        leaf = {n: w.detach().requires_grad_() for n, w in at.weights.items()}
        losses = self.run(fn, Stand(leaf, at.buffers, at.batch, at.private, at.keys), training=True)
        grads = torch.autograd.grad(losses.sum(), list(leaf.values()), allow_unused=True)
        return losses.detach(), {
            n: torch.zeros_like(w) if g is None else g
            for (n, w), g in zip(at.weights.items(), grads, strict=True)
        }

    def _randomness(
        self, keys: Tensor, wrap: Callable[[Tensor], Any] = lambda t: t
    ) -> AbstractContextManager[Any]:
        return MemberRandom(keys, wrap) if self.draws else nullcontext()


class TableBackend(Backend):
    """All members by hand-batched operations, differentiated by torch."""

    name = "table"

    def run(self, fn: Function, at: Stand, training: bool) -> Any:
        """Runs the network's code once, on `Stacked` values."""
        values = {n: Stacked(t) for n, t in (*at.weights.items(), *at.buffers.items())}
        given = map_nest(Stacked, at.batch) if at.private else at.batch
        with self.template.holding(values, training) as module, self._randomness(at.keys, Stacked):
            result = fn(module, given)
        if isinstance(result, dict):
            return {name: _unwrapped(value) for name, value in result.items()}
        return _unwrapped(result)


def _unwrapped(value: Any) -> Tensor:
    if not isinstance(value, Stacked):
        raise NotInTable("a result that does not depend on the member")
    return value.data


class TapeBackend(TableBackend):
    """Gradients by the tape of hand-batched operations; everything else as the table does it."""

    name = "tape"

    def __init__(self, template: Template, draws: bool = True, global_draws: bool = False) -> None:
        super().__init__(template, draws, global_draws)
        self._chain: tuple[Any, Chain | None] = (None, None)

    def gradients(self, fn: Function, at: Stand) -> tuple[Tensor, Weights]:
        """Runs a plain chain of layers straight through, other code on `Node` values, and the tape back."""
        chain = self._chain_of(fn, at)
        if chain is not None:
            try:
                with torch.no_grad():
                    return chain.gradients(at.weights, at.buffers, at.batch, at.private)
            except NotInTable:
                self._chain = (fn, None)
        loss, leaf = self.taped(fn, at, True)
        with torch.no_grad():
            tape.backward(loss)
        return loss.data, played(leaf)

    def _chain_of(self, fn: Function, at: Stand) -> Chain | None:
        if self._chain[0] is not fn:
            self._chain = (fn, Chain.of(self.template, fn, at.weights))
        return self._chain[1]

    def taped(self, fn: Function, at: Stand, training: bool) -> tuple[Node, dict[str, Node]]:
        """The losses at the end of a tape that is still to be played back, and the weights at its start."""
        leaf = tape.leaves(at.weights)
        values: dict[str, Stacked] = {**leaf, **{n: Stacked(b) for n, b in at.buffers.items()}}
        given = map_nest(Stacked, at.batch) if at.private else at.batch
        drawing = self._randomness(at.keys, Stacked)
        with torch.no_grad(), self.template.holding(values, training) as module, drawing:
            loss = fn(module, given)
        if not isinstance(loss, Node) or loss.dim() != 0:
            raise NotInTable("a loss that is no scalar of the weights")
        return loss, leaf


def played(leaf: dict[str, Node]) -> Gradients:
    """The gradients that a tape has left at its start."""
    return Gradients(
        {n: torch.zeros_like(node.data) if node.grad is None else node.grad for n, node in leaf.items()}
    )


class VmapBackend(Backend):
    """All members by torch's vmap."""

    name = "vmap"

    def run(self, fn: Function, at: Stand, training: bool) -> Any:
        """Maps the network's code over the member axis."""

        def one(w: Stack, b: Stack, tensors: list[Tensor], key: Tensor) -> tuple[Any, Stack]:
            held = {n: t.clone() for n, t in b.items()}
            given = at.batch
            if at.private:
                parts = iter(tensors)
                given = map_nest(lambda _: next(parts), at.batch)
            values = {**w, **held}
            with self.template.holding(values, training) as module, self._randomness(key):
                result = fn(module, given)
                return result, held | self.template.replaced(values)

        tensors = leaves(at.batch) if at.private else []
        mapped = torch.func.vmap(one, in_dims=(0, 0, 0, 0), randomness="error")
        with warnings.catch_warnings():
            # Torch tells where it falls back to a loop inside; whether that pays has been measured.
            warnings.filterwarnings("ignore", "There is a performance drop")
            result, moved = mapped(at.weights, at.buffers, tensors, at.keys)
        if training:
            with torch.no_grad():
                for name, buffer in at.buffers.items():
                    buffer.copy_(moved[name])
        return result


class LoopBackend(Backend):
    """One member after another, as plain torch runs them."""

    name = "loop"

    def run(self, fn: Function, at: Stand, training: bool) -> Any:
        """Runs the network's code N times."""
        # The derivative of a squeeze is a view; that of unbind copies what it puts together again.
        alone = at.members == 1
        rows = {n: (w.squeeze(0),) if alone else w.unbind(0) for n, w in at.weights.items()}
        results = [
            self._one(fn, {n: r[i] for n, r in rows.items()}, at, i, training) for i in range(at.members)
        ]
        if isinstance(results[0], dict):
            return {name: torch.stack([r[name] for r in results]) for name in results[0]}
        return torch.stack(results)

    def gradients(self, fn: Function, at: Stand) -> tuple[Tensor, Weights]:
        """One backward pass a member, so that one member's graph is held at a time."""
        grads = {n: torch.empty_like(w, requires_grad=False) for n, w in at.weights.items()}
        losses = []
        for i in range(at.members):
            leaf = {n: w.detach()[i].requires_grad_() for n, w in at.weights.items()}
            loss = self._one(fn, leaf, at, i, True)
            found = torch.autograd.grad(loss, list(leaf.values()), allow_unused=True)
            for name, g in zip(leaf, found, strict=True):
                if g is None:
                    grads[name][i].zero_()
                else:
                    grads[name][i].copy_(g)
            losses.append(loss.detach())
        return torch.stack(losses), grads

    def _one(self, fn: Function, weights: Stack, at: Stand, i: int, training: bool) -> Any:
        given = map_nest(lambda t: t[i], at.batch) if at.private else at.batch
        values = {**weights, **{n: b[i] for n, b in at.buffers.items()}}
        seeding = reseeded(int(at.keys[i])) if self.global_draws else nullcontext()
        fast = LargeProducts() if LargeProducts.pay(weights.values()) else nullcontext()
        drawing = self._randomness(at.keys[i])
        with seeding, fast, self.template.holding(values, training) as module, drawing:
            try:
                result = fn(module, given)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):  # torch's batch norm, a batch of one
                    raise
                raise LosslabError(kernels.ONE_VALUE) from error
            for name, moved in self.template.replaced(values).items():
                at.buffers[name][i].copy_(moved)
        return result


BACKENDS: dict[str, type[Backend]] = {
    b.name: b for b in (TapeBackend, TableBackend, VmapBackend, LoopBackend)
}
