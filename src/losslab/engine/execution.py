"""Which way to run a population: tried, verified against the loop, timed, and split to fit the memory."""

from __future__ import annotations

import contextlib
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from losslab.engine.backends import (
    BACKENDS,
    Backend,
    Function,
    LoopBackend,
    Stand,
    TableBackend,
    TapeBackend,
    VmapBackend,
)
from losslab.engine.memory import free_memory, keep_freed_memory
from losslab.engine.points import Stack
from losslab.engine.randomness import MemberRandom, spared
from losslab.engine.template import Template
from losslab.errors import LosslabError, first_line, unknown
from losslab.rules.rule import Weights
from losslab.tasks import Data
from losslab.tasks.nest import leaves

EXECUTIONS = ("auto", "stacked", "loop")


class ExecutionNotice(UserWarning):
    """Told once when members cannot be run as one program and a loop is taken."""


@dataclass
class Execution:
    """How a population is run: a backend, and how many members at a time.

    Args:
        backend: The tape, the table, vmap or the loop.
        chunk: Members evaluated together; more would not fit the memory budget.
        example_bytes: Memory that one example of one member holds for the backward pass.
        reason: Why this backend, for people.
    """

    backend: Backend
    chunk: int
    example_bytes: float = 0.0
    reason: str = ""
    measuring: dict[tuple[Function, bool], Backend] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        keep_freed_memory()

    def describe(self) -> dict[str, Any]:
        """What a resumed run needs to run the same way."""
        return {
            "backend": self.backend.name,
            "chunk": self.chunk,
            "example_bytes": self.example_bytes,
            "draws": self.backend.draws,
            "global_draws": self.backend.global_draws,
        }

    @classmethod
    def restore(cls, told: dict[str, Any], template: Template) -> Execution:
        """The execution that `describe` told of."""
        backend = BACKENDS[told["backend"]](template, told["draws"], told["global_draws"])
        return cls(backend, told["chunk"], told["example_bytes"], "run as before it was resumed")

    def gradients(self, fn: Function, at: Stand) -> tuple[Tensor, Weights]:
        """Losses ``[N]`` and gradients of all members; see `Backend.gradients`."""
        if at.members <= self.chunk:
            return self.backend.gradients(fn, at)
        grads = {n: torch.empty_like(w, requires_grad=False) for n, w in at.weights.items()}
        losses = []
        for rows in _slices(at.members, self.chunk):
            loss, part = self.backend.gradients(fn, at.rows(rows))
            losses.append(loss)
            for name, g in part.items():
                grads[name][rows].copy_(g)
        return torch.cat(losses), grads

    def run(self, fn: Function, at: Stand, training: bool) -> Any:
        """``fn`` at every member; see `Backend.run`. Buffers stay as they are in evaluation mode."""
        backend = self.backend
        if not training:
            at = at.sheltered()
            backend = self.measuring.get((fn, at.private)) or self._measuring(fn, at)
        if at.members <= self.chunk:
            return backend.run(fn, at, training)
        parts = [backend.run(fn, at.rows(rows), training) for rows in _slices(at.members, self.chunk)]
        if isinstance(parts[0], dict):
            return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        return torch.cat(parts)

    def _measuring(self, fn: Function, at: Stand) -> Backend:
        """The backend for what is measured: that of the training if it agrees with the loop here too.

        Evaluation mode and metrics may use operations that the training does not; found out once a function.
        """
        how = self.backend
        template, ends = how.template, at.ends()
        loop = LoopBackend(template, how.draws, how.global_draws)
        with spared() as moved:
            wanted = _named(loop.run(fn, ends.sheltered(), False))
            loop.global_draws |= moved()
        alone = loop.global_draws or isinstance(how, LoopBackend)
        kinds = () if alone else (how, VmapBackend(template, how.draws))
        picked: Backend = loop
        for backend in kinds:
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if _agree([wanted], [_named(backend.run(fn, ends.sheltered(), False))]):
                    picked = backend
                    break
        self.measuring[fn, at.private] = picked
        return picked

    def mean(self, fn: Function, weights: Stack, buffers: Stack, data: Data | None, keys: Tensor) -> Any:
        """The mean of ``fn`` over a data set, in evaluation mode.

        Streamed: each chunk is read once for all members and weighted by its examples.
        """
        if data is None:
            return self.run(fn, Stand(weights, buffers, None, False, keys), training=False)
        total = len(data)
        size = self.stream_size(total, keys.shape[0])
        device = leaves(data.all())[0].device
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for rows in _slices(total, size):
                index = torch.arange(rows.start, rows.stop, device=device)
                part = self.run(fn, Stand(weights, buffers, data.take(index), False, keys), training=False)
                for name, value in _named(part).items():
                    share = value.to(torch.promote_types(value.dtype, torch.float32)) * (len(index) / total)
                    sums[name] = sums[name] + share if name in sums else share
        return sums.get("", sums)

    def stream_size(self, examples: int, members: int) -> int:
        """Examples evaluated at a time: enough to keep the cores busy, few enough to stay small."""
        fits = 2**28 / max(1.0, self.example_bytes * min(members, self.chunk))
        return max(1, min(examples, 2048, int(fits)))


def choose(
    execution: str, template: Template, fn: Function, at: Stand, memory: float | None = None
) -> Execution:
    """Picks the backend by trying it on the first batch.

    The tape is tried first, then the table, then vmap; each must give the loop's losses, gradients and
    buffers for the first and the last member, in float64 and in their own dtype. With ``execution="auto"`` it
    must also be faster than the loop.

    Args:
        execution: ``"auto"``, ``"stacked"`` (one program, or an error) or ``"loop"``.
        template: The network.
        fn: The loss.
        at: The members on a first batch; left as they are.
        memory: Bytes to stay within; half of what is free by default.

    Raises:
        LosslabError: ``execution`` is unknown, or ``"stacked"`` and the network cannot be stacked.
    """
    if execution not in EXECUTIONS:
        raise unknown("execution", execution, EXECUTIONS)
    probe = _Probe(template, fn, at)
    loop, example_bytes = probe.loop()
    members = at.members
    if execution == "loop" or (execution == "auto" and members == 1):
        reason = "a loop, as asked" if execution == "loop" else "one member"
        return Execution(loop, 1, example_bytes, reason)
    stacked, why = None, "it draws from torch's global generator, as dropout within attention or an LSTM does"
    if not loop.global_draws:
        stacked, why = probe.stacked(loop)
    if stacked is None:
        if execution == "stacked":
            raise LosslabError(
                f'the members cannot be run as one program ({why}): pass execution="loop" or "auto"'
            )
        warnings.warn(f"the members are trained one by one: {why}", ExecutionNotice, stacklevel=3)
        return Execution(loop, 1, example_bytes, why)
    chunk = members_that_fit(at, example_bytes, memory)
    picked = Execution(stacked, chunk, example_bytes, f"the {stacked.name} agrees with the loop")
    if execution == "auto":
        few = min(members, 4)
        slow = probe.seconds(Execution(loop, 1), few) / few
        fast = probe.seconds(picked, members) / members
        if fast > slow:
            return Execution(loop, 1, example_bytes, f"the loop was {fast / slow:.1f} times faster")
        picked.reason += f", {slow / fast:.1f} times faster"
    return picked


class _Probe:
    """First evaluations, on copies of the buffers, so that nothing of the population moves."""

    def __init__(self, template: Template, fn: Function, at: Stand) -> None:
        self.template, self.fn, self.at = template, fn, at

    def gradients(self, how: Backend | Execution, rows: slice) -> tuple[Tensor, Weights]:
        """Losses and gradients of some members."""
        return how.gradients(self.fn, self.at.rows(rows).sheltered())

    def loop(self) -> tuple[LoopBackend, float]:
        """The loop, told which random draws the network makes, and the bytes it holds for one example."""
        held: dict[int, int] = {}
        own = {w.untyped_storage().data_ptr() for w in self.at.weights.values()}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        counting = _CountingLoop(self.template)
        with spared() as moved, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.gradients(counting, slice(0, 1))
            backend = LoopBackend(self.template, counting.mode.calls > 0, moved())
        return backend, sum(held.values()) / max(1, self.at.examples)

    def stacked(self, loop: LoopBackend) -> tuple[Backend | None, str]:
        """The first stacked backend that agrees with the loop, or None and what went wrong."""
        examples = self.examples(loop)
        why = ""
        for kind in (TapeBackend, TableBackend, VmapBackend):
            backend = kind(self.template, loop.draws)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = [self.results(backend, at) for at, _ in examples]
            except Exception as error:  # whatever batching the user's code brings up
                why = f"vmap cannot batch it ({first_line(error).partition('. ')[0]})"
                continue
            if _agree([w for _, wanted in examples for w in wanted], [f for got in found for f in got]):
                return backend, ""
            why = "run together, they give other gradients than alone"
        return None, why

    def examples(self, loop: LoopBackend) -> list[tuple[Stand, tuple[Stack, Stack]]]:
        """The first and the last member, and what the loop gives for them.

        First in float64, where rounding hides no mistake (unless the network's code insists on its dtype),
        then as they are, for the sake of the kernels of that dtype.
        """
        at = self.at.ends()
        found = [(at, self.results(loop, at))]
        with contextlib.suppress(Exception):
            exact = at.to(torch.float64)
            found.insert(0, (exact, self.results(loop, exact)))
        return found

    def results(self, how: Backend, at: Stand) -> tuple[Stack, Stack]:
        """Gradients by name with the losses, and the buffers after."""
        at = at.sheltered()
        losses, grads = how.gradients(self.fn, at)
        return {**grads, "": losses}, at.buffers

    def seconds(self, how: Execution, members: int) -> float:
        """Wall time of one gradient of the first ``members`` members: the best of two after a first."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self.gradients(how, slice(0, members))
            if self.at.keys.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])


class _CountingLoop(LoopBackend):
    """A loop that keeps its last source of random draws, to be asked how often it was used."""

    mode: MemberRandom

    def _randomness(self, keys: Tensor, wrap: Any = lambda t: t) -> AbstractContextManager[Any]:
        self.mode = MemberRandom(keys, wrap)
        return self.mode


def _agree(wanted: list[Stack], found: list[Stack]) -> bool:
    """Whether results, each name -> ``[N, ...]``, are equal to rounding for each member and each name."""
    return all(
        a.keys() == b.keys() and all(_equal(a, b, i) for i in range(len(next(iter(a.values()), ()))))
        for a, b in zip(wanted, found, strict=True)
    )


def _equal(wanted: Stack, found: Stack, member: int) -> bool:
    """The same for one member.

    A gradient that is zero but for rounding (of a bias before batch norm) is held against the largest.
    """
    eps = max((torch.finfo(a.dtype).eps for a in wanted.values() if a.is_floating_point()), default=0.0)
    tolerance = 1e-7 if eps < 1e-12 else 1e-3 if eps < 1e-5 else 1e-1
    pairs = [(a[member].double(), found[name][member].double()) for name, a in wanted.items()]
    whole = max(float(a.norm().nan_to_num(0.0, 0.0)) for a, _ in pairs)
    for a, b in pairs:
        bound = tolerance * (a.norm() + 1e-2 * whole) + 10 * eps * a.numel() ** 0.5
        if a.shape != b.shape or (bool(torch.isfinite(a).all()) and not (a - b).norm() <= bound):
            return False
    return True


def members_that_fit(at: Stand, example_bytes: float, memory: float | None) -> int:
    """How many members a stack may have at a time; all of them if they fit the memory budget.

    Args:
        at: All members on a batch.
        example_bytes: Memory that one example of one member holds for the backward pass.
        memory: Bytes to stay within; half of what is free if None.
    """
    weight_bytes = sum(w[0].numel() * w.element_size() for w in at.weights.values())
    budget = memory if memory is not None else 0.5 * free_memory(at.keys.device)
    # Weights, gradient and the rule's state are there whatever the chunk; what a chunk holds is the values
    # saved for its backward pass, about as much again while that runs, and its gradient.
    left = budget - 5 * at.members * weight_bytes
    each = 2 * example_bytes * at.examples + weight_bytes
    return max(1, int(min(at.members, left / max(each, 1.0))))


def _named(result: Any) -> Stack:
    return result if isinstance(result, dict) else {"": result}


def _slices(total: int, size: int) -> list[slice]:
    return [slice(a, min(a + size, total)) for a in range(0, total, size)]
