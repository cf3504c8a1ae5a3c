"""A chain's gradients by the machine code of `losslab.engine.machine`, on processors that it is made for.

It needs numba (the extra ``fast``), a CPU with vectors of 512 bits, and Linux. Everywhere else, and for what
it does not know, a chain goes operation by operation; the two agree to rounding.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losslab.engine.points import Stack

LANES = 16
"""Numbers in a vector register."""

LARGEST = 1 << 18
"""Numbers in the weight of a layer up to which a member's values stay in a core's cache (1 MiB)."""

EXAMPLES = 256
"""The same for examples of a batch."""


# The plan, numbers that the machine code goes by. Of each block: sizes, switches, and where in a thread's
# memory its values lie; then (address, numbers from a member to the next) of each tensor.
INPUTS, OUTPUTS, BIASED, NORMED, GATED, AT_INPUT, AT_EXAMPLES, AT_CENTRED, AT_SCALES = range(9)
WEIGHT, BIAS, GAMMA, BETA, MEAN, VAR, G_WEIGHT, G_BIAS, G_GAMMA, G_BETA = range(9, 29, 2)
BLOCK = 29

# After all blocks, of each where it is glanced at: (address, numbers from a member to the next) of what
# `losslab.engine.glance` is told, of earlier weights, and of the places of a sample, the same for all.
VALUES, SAMPLES, SIZES, EARLIER, EARLIER_GAMMA, PLACES = range(0, 12, 2)
GLANCE = 12

PARTS = 3
"""Values of a block: after its linear layer, after batch norm, after the ReLU."""

TOLD = 5
"""Numbers told of each, and of its gradient: see `losslab.engine.glance`."""

CONSTANT = 1e-10
"""Share of the mean square of a layer's values up to which a unit's variance counts as rounding."""

# At its head.
LENGTH, TICKET, NEXT, WRONG, MEMBERS, BATCH, PADDED, BLOCKS, MEMORY, SHARE = range(10)
X, X_STRIDE, LABELS, LABELS_STRIDE, LOSSES, NUMBERS = range(10, 16)
AT_OUTPUT, AT_GRADIENT, AT_OTHER, AT_PRODUCT, AT_LARGEST, AT_SUMS, AT_UNITS, GLANCES = range(16, 24)
HEAD = 24


@dataclass(frozen=True)
class Block:
    """A linear layer, and batch norm and a ReLU where they follow.

    Args:
        weight: Its name.
        bias: Its name.
        norm: Names of batch norm's weight, bias, running mean, running variance and count.
        momentum: Batch norm's.
        eps: Batch norm's.
        gated: Whether there is a ReLU.
        layers: Names of the modules: linear, batch norm, ReLU; "" for what there is not.
    """

    weight: str
    bias: str | None = None
    norm: tuple[str, ...] = ()
    momentum: float = 0.0
    eps: float = 0.0
    gated: bool = False
    layers: tuple[str, str, str] = ("", "", "")


class Compiled:
    """Losses and gradients of a chain of blocks with cross-entropy at its end, float32, on a CPU.

    Args:
        blocks: The chain.
        flat: Whether inputs are flattened first.
    """

    def __init__(self, blocks: tuple[Block, ...], flat: bool = False) -> None:
        self.blocks, self.flat = blocks, flat
        self.memory = torch.zeros(0, dtype=torch.float32)
        numbers = [number for block in blocks for number in (block.momentum, block.eps)]
        self.numbers = torch.tensor(numbers, dtype=torch.float64)

    @classmethod
    def of(cls, blocks: tuple[Block, ...] | None, flat: bool) -> Compiled | None:
        """For a chain; None where it is not one of such blocks, or there is no machine code to be had."""
        return cls(blocks, flat) if blocks and machine_code() is not None else None

    def __call__(self, weights: Stack, buffers: Stack, x: Tensor, y: Tensor) -> tuple[Tensor, Stack] | None:
        """Losses ``[N]`` and gradients; None where these tensors are not for it, or a label is no class.

        Args:
            weights: Name -> ``[N, ...]``.
            buffers: Batch norm's, moved in place.
            x: ``[N, B, i]``, or ``[N, B, ...]`` to be flattened.
            y: ``[N, B]``.
        """
        gradients = {name: torch.empty(w.shape, dtype=torch.float32) for name, w in weights.items()}
        losses = self.run(weights, buffers, x, y, gradients)
        if losses is None:
            return None
        for block in self.blocks:
            if block.norm:
                buffers[block.norm[-1]].add_(1)
        return losses, gradients

    def run(
        self,
        weights: Stack,
        buffers: Stack,
        x: Tensor,
        y: Tensor,
        gradients: Stack,
        glances: Sequence[Sequence[Tensor | None]] = (),
    ) -> Tensor | None:
        """Losses ``[N]``; None as for a call.

        Args:
            weights: As for a call.
            buffers: As for a call; batch norm's counts stay as they are.
            x: As for a call.
            y: As for a call.
            gradients: Where to put them; those of a linear layer's weight may be left out.
            glances: Of each block the tensors that a glance needs, in the plan's order.
        """
        work, x = machine_code(), x.flatten(2) if self.flat else x
        if work is None or not self._fits(weights, buffers, x, y):
            return None
        losses = torch.empty(x.shape[0], dtype=torch.float32)
        sizes = tuple(tuple(weights[block.weight].shape[1:]) for block in self.blocks)
        layout = _layout(sizes, tuple(bool(block.norm) for block in self.blocks), x.shape[1])
        threads = min(torch.get_num_threads(), x.shape[0])
        if self.memory.numel() < threads * layout.size:
            self.memory = torch.zeros(threads * layout.size, dtype=torch.float32)
        plan = [0, 0, 0, 0, x.shape[0], x.shape[1], layout.padded, len(self.blocks)]
        plan += [self.memory.data_ptr(), layout.size, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0)]
        plan += [losses.data_ptr(), self.numbers.data_ptr(), *layout.rest]
        plan.append(HEAD + BLOCK * len(self.blocks) if glances else 0)
        for block, (outputs, inputs), places in zip(self.blocks, sizes, layout.blocks, strict=True):
            plan += [inputs, outputs, block.bias is not None, bool(block.norm), block.gated, *places]
            plan += _addresses(_tensors(block, weights, buffers, gradients))
        for tensors in glances:
            plan += _addresses(tensors)
        numbers = (ctypes.c_int64 * len(plan))(*plan)
        numbers[LENGTH] = len(plan)
        work(numbers, threads)
        return None if numbers[WRONG] else losses

    def _fits(self, weights: Stack, buffers: Stack, x: Tensor, y: Tensor) -> bool:
        """Whether the tensors are of the kind, and small enough to stay in a cache."""
        if x.dtype != torch.float32 or y.dtype != torch.int64 or not (x.is_cpu and y.is_cpu):
            return False
        if x.dim() != 3 or y.shape != x.shape[:2] or not 1 < x.shape[1] <= EXAMPLES:
            return False
        if x.shape[2] != weights[self.blocks[0].weight].shape[2]:
            return False
        if x.stride()[1:] != (x.shape[2], 1) or y.stride(1) != 1:
            return False
        moved = [buffers[name] for block in self.blocks for name in block.norm[2:4]]
        return all(
            w.dtype == torch.float32 and w.is_contiguous() for w in (*weights.values(), *moved)
        ) and all(weights[block.weight].stride(0) <= LARGEST for block in self.blocks)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Of each, and the numbers from a member to the next; zeros where there is none."""
    found: list[int] = []
    for tensor in tensors:
        found += (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
    return found


def _tensors(block: Block, weights: Stack, buffers: Stack, gradients: Stack) -> list[Tensor | None]:
    """In the plan's order."""
    norm: list[Tensor | None] = [None] * 4
    sent: list[Tensor | None] = [None] * 2
    if block.norm:
        gamma, beta, mean, var, _ = block.norm
        norm = [weights[gamma], weights[beta], buffers[mean], buffers[var]]
        sent = [gradients[gamma], gradients[beta]]
    bias = (None, None) if block.bias is None else (weights[block.bias], gradients[block.bias])
    return [weights[block.weight], bias[0], *norm, gradients.get(block.weight), bias[1], *sent]


def up(count: int) -> int:
    """The next multiple of a vector's size."""
    return (count + LANES - 1) // LANES * LANES


@dataclass(frozen=True)
class _Layout:
    """Where in a thread's memory values lie, in numbers from its start."""

    padded: int
    blocks: tuple[tuple[int, int, int, int], ...]
    rest: tuple[int, ...]
    size: int


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[tuple[int, ...], ...], normed: tuple[bool, ...], batch: int) -> _Layout:
    padded, used = up(batch), 0

    def take(count: int) -> int:
        nonlocal used
        used, start = used + up(count) + LANES, used  # a line apart
        return start

    blocks = []
    for (outputs, inputs), norm in zip(sizes, normed, strict=True):
        places = take(up(inputs) * padded), take(padded * up(inputs))
        centred = (take(outputs * padded), take(outputs)) if norm else (0, 0)
        blocks.append((*places, *centred))
    widest = max(max(pair) for pair in sizes)
    products = max(outputs * up(inputs) for outputs, inputs in sizes)
    last = sizes[-1][0]
    rest = [up(last) * padded, widest * padded, widest * padded, products, padded, padded, 2 * widest]
    return _Layout(padded, tuple(blocks), tuple(take(n) for n in rest), used)


@functools.cache
def machine_code() -> Callable[[Any, int], None] | None:
    """Runs the compiled work on a plan in so many threads; None where that is not to be had.

    The threads are those of the OpenMP runtime that torch has loaded: a second pool would fight with the
    first for the cores, since OpenMP's threads wait by spinning.
    """
    parallel = _openmp()
    if parallel is None:
        return None
    try:
        from llvmlite import binding

        if not binding.get_host_cpu_features().get("avx512f"):
            return None
        from losslab.engine import machine
    except ImportError:
        return None
    address = machine.work.address
    alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def run(plan: Any, threads: int) -> None:
        if threads == 1:
            alone(ctypes.addressof(plan))
        else:
            parallel(ctypes.c_void_p(address), ctypes.byref(plan), threads, 0)

    return run


def _openmp() -> Any:
    """``GOMP_parallel``, as compilers call it, of the OpenMP runtime that torch is linked to."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:  # a symbol of a library is looked for in those that it needs, too
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    found.restype = None
    return found


__all__ = ["CONSTANT", "PARTS", "TOLD", "Block", "Compiled", "machine_code", "up"]
