"""Every random draw as a pure function of (seed, purpose, step): nothing global, nothing to replay.

Two kinds. Draws made once (initial weights, an epoch's order) use a `torch.Generator` seeded by a hash.
Draws made inside of a network at every step (dropout) hash a counter with each member's own key: the same
numbers on every device, whether members run together or alone, and no generator to save.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MASK = (1 << 64) - 1


def key(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit number that depends on all of (seed, purpose, index) and looks random.

    Example:
        >>> key(0, "order", 3) == key(0, "order", 3), key(0, "order", 3) == key(1, "order", 3)
        (True, False)
    """
    text = repr((int(seed), purpose, *map(int, index))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU generator for the draws of one purpose, e.g. ``generator(seed, "order", epoch)``."""
    return torch.Generator().manual_seed(key(seed, purpose, *index))


@contextmanager
def seeded(seed: int, purpose: str, *index: int) -> Iterator[None]:
    """Seeds torch's global generator inside and puts it back after, for code that accepts no generator."""
    with reseeded(key(seed, purpose, *index)):
        yield


@contextmanager
def reseeded(number: int) -> Iterator[None]:
    """Seeds torch's global generators inside and puts them back after."""
    with spared():
        for generator in _generators():  # torch.manual_seed would also seed GPUs that nobody uses yet
            generator.manual_seed(number & (_MASK >> 1))
        yield


@contextmanager
def spared() -> Iterator[Callable[[], bool]]:
    """Puts torch's global generators back after; gives a function that tells whether they have moved."""
    before = [(g, g.get_state()) for g in _generators()]
    try:
        yield lambda: any(not torch.equal(g.get_state(), state) for g, state in before)
    finally:
        for g, state in before:
            g.set_state(state)


def _generators() -> list[torch.Generator]:
    """The global generators of the CPU and of the GPUs in use."""
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]


def member_keys(seeds: Sequence[int], purpose: str, device: torch.device | str = "cpu") -> Tensor:
    """One int64 key a member, ``[N]``, a function of its seed alone."""
    return torch.tensor([key(seed, purpose) for seed in seeds], dtype=torch.int64, device=device)


def fold(keys: Tensor, index: int) -> Tensor:
    """New keys from old ones and an index (a step, a call): ``[...] -> [...]``."""
    return _mix(keys + _signed((index + 1) * 0x9E3779B97F4A7C15))


def bits(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Independent uniform 64-bit integers: keys ``[...]`` -> ``[..., *shape]`` (splitmix64 of a counter)."""
    count = math.prod(int(size) for size in shape)
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device).view(list(shape))
    start = keys.reshape([*keys.shape, *[1] * len(shape)])
    return _mix(start + counter * _signed(0x9E3779B97F4A7C15))


def uniform(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1) on a grid of 2^-24 (in a shorter dtype, its own): ``[..., *shape]``."""
    digits = min(24, 1 - round(math.log2(torch.finfo(dtype).eps)))
    return _high(bits(keys, shape), digits).to(dtype) * 2.0**-digits


def coins(keys: Tensor, shape: Sequence[int], chance: float) -> Tensor:
    """True with a chance known to 2^-17: keys ``[...]`` -> bool ``[..., *shape]``; four coins a hash."""
    count = math.prod(int(size) for size in shape)
    words = bits(keys, [-(-count // 4)])
    if torch._C._functorch.is_batchedtensor(words):  # vmap cannot look at memory as another type
        flat = torch.stack([words >> shift for shift in (0, 16, 32, 48)], dim=-1).to(torch.int16).flatten(-2)
    else:
        flat = words.view(torch.int16)
    flat = flat[..., :count]
    threshold = round(chance * 2**16) - 2**15
    if threshold >= 2**15:  # no int16 reaches it, and a comparison would wrap around
        return torch.ones([*keys.shape, *shape], dtype=torch.bool, device=keys.device)
    return flat.lt(threshold).reshape([*keys.shape, *shape])


def integers(keys: Tensor, shape: Sequence[int], high: int) -> Tensor:
    """Uniform integers in [0, high): keys ``[...]`` -> int64 ``[..., *shape]``; bias below high / 2^53."""
    return (_high(bits(keys, shape), 53).double() * 2.0**-53 * high).long().clamp_(max=high - 1)


def normal(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers by the inverse distribution function: keys ``[...]`` -> ``[..., *shape]``."""
    centred = (_high(bits(keys, shape), 40).double() + 0.5) * 2.0**-39 - 1.0
    return (torch.erfinv(centred) * 2.0**0.5).to(dtype)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _high(z: Tensor, count: int) -> Tensor:
    return (z >> (64 - count)) & ((1 << count) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


class MemberRandom(TorchFunctionMode):
    """Inside, dropout and ``rand_like``/``randn_like`` draw from the member's own stream.

    Works in a loop (``keys`` is a 0-d tensor), inside of vmap (a 0-d mapped tensor), and for stacked values
    (``keys`` is ``[N]``, ``stacked`` gives the mask its type).

    Args:
        keys: The members' keys for this step.
        wrap: Turns a raw ``[N, ...]`` tensor into what the network's values are (identity unless stacked).
    """

    def __init__(self, keys: Tensor, wrap: Callable[[Tensor], Any] = lambda t: t) -> None:
        super().__init__()
        self.keys, self.wrap, self.calls = keys, wrap, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces the random functions, passes everything else through."""
        kwargs = kwargs or {}
        if (draw := _DRAWS.get(func)) is None:
            return func(*args, **kwargs)
        return draw(self, *args, **kwargs)

    def next_keys(self) -> Tensor:
        """Keys of the next call within the step."""
        self.calls += 1
        return fold(self.keys, self.calls)

    def _dropout(
        self, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False, whole_channels: int = 0
    ) -> Any:
        if not training or p == 0.0:
            return x
        shape = list(x.shape)
        if whole_channels:
            shape = shape[:-whole_channels] + [1] * whole_channels
        keep = coins(self.next_keys(), shape, 1.0 - p)
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        return x * self.wrap(keep.to(x.dtype) * scale)

    def _rand_like(self, x: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        return self.wrap(uniform(self.next_keys(), list(x.shape), dtype or x.dtype))

    def _randn_like(self, x: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        return self.wrap(normal(self.next_keys(), list(x.shape), dtype or x.dtype))


def _channels(dimensions: int) -> Callable[..., Any]:
    def draw(self: MemberRandom, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return self._dropout(x, p, training, inplace, whole_channels=dimensions)

    return draw


_DRAWS: dict[Any, Callable[..., Any]] = {
    F.dropout: MemberRandom._dropout,
    F.dropout1d: _channels(1),
    F.dropout2d: _channels(2),
    F.dropout3d: _channels(3),
    torch.rand_like: MemberRandom._rand_like,
    torch.randn_like: MemberRandom._randn_like,
}
