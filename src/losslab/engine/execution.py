"""Which way to run a population: tried, verified against the loop, timed, and split to fit the memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losslab.engine.backends import BACKENDS, Backend, Function, LoopBackend, TableBackend, VmapBackend
from losslab.engine.points import Stack
from losslab.engine.randomness import MemberRandom
from losslab.engine.template import Template
from losslab.errors import LosslabError, unknown
from losslab.tasks import Batch, Data
from losslab.tasks.nest import leaves, map_nest

EXECUTIONS = ("auto", "stacked", "loop")


class ExecutionNotice(UserWarning):
    """Told once when members cannot be run as one program and a loop is taken."""


@dataclass
class Execution:
    """How a population is run: a backend, and how many members at a time.

    Args:
        backend: The table, vmap or the loop.
        chunk: Members evaluated together; more would not fit the memory budget.
        example_bytes: Memory that one example of one member holds for the backward pass.
        reason: Why this backend, for people.
    """

    backend: Backend
    chunk: int
    example_bytes: float = 0.0
    reason: str = ""

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
        return cls(backend, told["chunk"], told["example_bytes"], "as before")

    def gradients(
        self, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor
    ) -> tuple[Tensor, Stack]:
        """Losses ``[N]`` and gradients of all members; see `Backend.gradients`."""
        members = keys.shape[0]
        if members <= self.chunk:
            return self.backend.gradients(fn, weights, buffers, batch, private, keys)
        grads = {n: torch.empty_like(w) for n, w in weights.items()}
        losses = []
        for rows in _slices(members, self.chunk):
            part = self.backend.gradients(fn, *self._rows(rows, weights, buffers, batch, private, keys))
            losses.append(part[0])
            for name, g in part[1].items():
                grads[name][rows].copy_(g)
        return torch.cat(losses), grads

    def run(
        self, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor, training: bool
    ) -> Any:
        """``fn`` at every member; see `Backend.run`."""
        members = keys.shape[0]
        if members <= self.chunk:
            return self.backend.run(fn, weights, buffers, batch, private, keys, training)
        parts = [
            self.backend.run(fn, *self._rows(rows, weights, buffers, batch, private, keys), training)
            for rows in _slices(members, self.chunk)
        ]
        if isinstance(parts[0], dict):
            return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        return torch.cat(parts)

    def _rows(
        self, rows: slice, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor
    ) -> tuple[Stack, Stack, Batch, bool, Tensor]:
        return (
            {n: w[rows] for n, w in weights.items()},
            {n: b[rows] for n, b in buffers.items()},
            map_nest(lambda t: t[rows], batch) if private else batch,
            private,
            keys[rows],
        )

    def mean(
        self, fn: Function, weights: Stack, buffers: Stack, data: Data | None, keys: Tensor, training: bool = False
    ) -> Any:
        """The mean of ``fn`` over a whole data set, streamed: each chunk read once, weighted by its examples."""
        if data is None:
            return self.run(fn, weights, buffers, None, False, keys, training)
        size, total = self.stream_size(len(data), keys.shape[0]), len(data)
        result: Any = None
        with torch.no_grad():
            for start in range(0, total, size):
                rows = torch.arange(start, min(start + size, total), device=leaves(data.all())[0].device)
                part = self.run(fn, weights, buffers, data.take(rows), False, keys, training)
                share = len(rows) / total
                if result is None:
                    result = _scaled(part, share)
                else:
                    result = _added(result, _scaled(part, share))
        return result

    def stream_size(self, examples: int, members: int) -> int:
        """Examples evaluated at a time: enough to keep the cores busy, few enough to stay small."""
        fits = 2**28 / max(1.0, self.example_bytes * min(members, self.chunk))
        return max(1, min(examples, 2048, int(fits)))


def choose(
    execution: str,
    template: Template,
    fn: Function,
    weights: Stack,
    buffers: Stack,
    batch: Batch,
    private: bool,
    keys: Tensor,
    memory: float | None = None,
) -> Execution:
    """Picks the backend by trying it on the first batch.

    The table is tried first, then vmap; each must give the loop's losses and gradients for the first and the
    last member. With ``execution="auto"`` it must also be faster than the loop.

    Args:
        execution: ``"auto"``, ``"stacked"`` (table or vmap, or an error) or ``"loop"``.
        template: The network.
        fn: The loss.
        weights: Name -> ``[N, ...]``.
        buffers: Name -> ``[N, ...]``; left as they are.
        batch: A first batch, shared or private.
        private: Whether it has a leading member axis.
        keys: ``[N]``.
        memory: Bytes to stay within; half of what is free by default.

    Raises:
        LosslabError: ``execution`` is unknown, or ``"stacked"`` and the network cannot be stacked.
    """
    if execution not in EXECUTIONS:
        raise unknown("execution", execution, EXECUTIONS)
    probe = _Probe(template, fn, weights, buffers, batch, private, keys)
    loop, example_bytes = probe.loop()
    members = keys.shape[0]
    chunk = _members_that_fit(probe, example_bytes, memory)
    if execution == "loop" or (execution == "auto" and members == 1):
        return Execution(loop, 1, example_bytes, "a loop, as asked" if execution == "loop" else "one member")
    stacked, why = (None, "it draws from torch's global generator") if loop.global_draws else probe.stacked(loop)
    if stacked is None:
        if execution == "stacked":
            raise LosslabError(f'the members cannot be run as one program ({why}): pass execution="loop" or "auto"')
        warnings.warn(f"the members are trained one by one: {why}", ExecutionNotice, stacklevel=3)
        return Execution(loop, 1, example_bytes, why)
    picked = Execution(stacked, chunk, example_bytes, f"the {stacked.name} agrees with the loop")
    if execution == "auto":
        slow, fast = probe.seconds(Execution(loop, 1), min(members, 4)) / min(members, 4), probe.seconds(picked)
        if fast / members > slow:
            return Execution(loop, 1, example_bytes, f"the loop was {fast / members / slow:.1f} times faster")
        picked.reason += f", {slow * members / fast:.1f} times faster"
    return picked


class _Probe:
    """First evaluations, on copies of the buffers, so that nothing of the population moves."""

    def __init__(
        self, template: Template, fn: Function, weights: Stack, buffers: Stack, batch: Batch, private: bool, keys: Tensor
    ) -> None:
        self.template, self.fn, self.keys = template, fn, keys
        self.weights, self.buffers, self.batch, self.private = weights, buffers, batch, private

    def gradients(self, how: Backend | Execution, rows: slice = slice(None)) -> tuple[Tensor, Stack]:
        """Losses and gradients of some members."""
        return how.gradients(
            self.fn,
            {n: w[rows] for n, w in self.weights.items()},
            {n: b[rows].clone() for n, b in self.buffers.items()},
            map_nest(lambda t: t[rows], self.batch) if self.private else self.batch,
            self.private,
            self.keys[rows],
        )

    def loop(self) -> tuple[LoopBackend, float]:
        """The loop, told which random draws the network makes, and the bytes it holds for one example."""
        held: dict[int, int] = {}
        own = {w.untyped_storage().data_ptr() for w in self.weights.values()}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        counting = _Counting(self.keys[0])
        backend = LoopBackend(self.template, draws=True)
        backend._randomness = lambda *_, **__: counting  # type: ignore[assignment,method-assign]
        with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            before = torch.random.get_rng_state()
            self.gradients(backend, slice(0, 1))
            moved = not torch.equal(before, torch.random.get_rng_state())
        tensors = leaves(self.batch)
        examples = tensors[0].shape[1 if self.private else 0] if tensors else 1
        return LoopBackend(self.template, counting.calls > 0, moved), sum(held.values()) / max(1, examples)

    def stacked(self, loop: LoopBackend) -> tuple[Backend | None, str]:
        """The first stacked backend that agrees with the loop, or None and what went wrong."""
        last = self.keys.shape[0] - 1
        wanted = [self.gradients(loop, slice(i, i + 1)) for i in {0, last}]
        why = ""
        for kind in (TableBackend, VmapBackend):
            backend = kind(self.template, loop.draws)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    rows = slice(0, 1) if last == 0 else slice(0, last + 1, last)
                    losses, grads = self.gradients(backend, rows)
            except Exception as error:
                why = f"{_kind_of(error)}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                continue
            if all(_agree(w, losses, grads, i) for i, w in enumerate(wanted)):
                return backend, ""
            why = "run together, they give other gradients than alone"
        return None, why

    def seconds(self, how: Execution, members: int | None = None) -> float:
        """Wall time of one gradient of the first ``members`` members: the best of three."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self.gradients(how, slice(0, members))
            if self.keys.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])


class _Counting(MemberRandom):
    """Counts the draws of one call."""


def _kind_of(error: Exception) -> str:
    return {"NotInTable": "not in the table"}.get(type(error).__name__, "vmap cannot batch it")


def _agree(wanted: tuple[Tensor, Stack], losses: Tensor, grads: Stack, i: int) -> bool:
    tolerance = 1e-7 if losses.dtype == torch.float64 else 1e-2 if losses.dtype.itemsize < 4 else 1e-3
    pairs = [(wanted[0], losses[i : i + 1])]
    ours, theirs = ([g.reshape(-1) for g in gs] for gs in ([grads[n][i] for n in grads], wanted[1].values()))
    pairs.append((torch.cat(theirs), torch.cat(ours)))
    for a, b in pairs:
        if not torch.isfinite(a).all():
            continue
        if (a - b).norm() > tolerance * a.norm() + torch.finfo(a.dtype).eps * a.numel() ** 0.5:
            return False
    return True


def _members_that_fit(probe: _Probe, example_bytes: float, memory: float | None) -> int:
    members = probe.keys.shape[0]
    tensors = leaves(probe.batch)
    examples = tensors[0].shape[1 if probe.private else 0] if tensors else 1
    weight_bytes = sum(w[0].numel() * w.element_size() for w in probe.weights.values())
    budget = (memory if memory is not None else 0.5 * free_memory(probe.keys.device)) - 5 * members * weight_bytes
    # What is saved for the backward pass, about as much again while it runs, and the gradient.
    each = 2 * example_bytes * examples + weight_bytes
    return max(1, min(members, int(budget / max(each, 1.0))))


def free_memory(device: torch.device) -> float:
    """Bytes free on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            found = {line.split(":")[0]: line.split()[1] for line in lines}
        return float(found["MemAvailable"]) * 1024
    except (OSError, KeyError, IndexError):
        return float("inf")


def _slices(total: int, size: int) -> list[slice]:
    return [slice(a, min(a + size, total)) for a in range(0, total, size)]


def _scaled(value: Any, share: float) -> Any:
    return {n: v * share for n, v in value.items()} if isinstance(value, dict) else value * share


def _added(a: Any, b: Any) -> Any:
    return {n: a[n] + b[n] for n in a} if isinstance(a, dict) else a + b


