"""Memory: how much is free, and how freed memory is kept for the next step."""

from __future__ import annotations

import ctypes
import functools

import torch

KEPT = 1 << 30
"""Bytes of freed memory that the process holds on to."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED_FROM = 1 << 25


@functools.cache
def keep_freed_memory() -> bool:
    """Lets the C library keep freed tensors' memory instead of returning it to the system after every step.

    A step of a population frees what it allocated, a few megabytes. glibc by default hands blocks of that
    size back to the system, which maps and clears their pages anew in the next step: a quarter to a half of
    a step's time at 64-64-64-10. The thresholds are raised once, for the whole process, to 32 MiB a block and
    `KEPT` in all. Whoever needs the memory back calls `release_freed_memory`, as a finished run does.

    Returns:
        Whether it was done; elsewhere than under glibc nothing happens.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM) and libc.mallopt(_M_TRIM_THRESHOLD, KEPT))


def release_freed_memory() -> None:
    """Gives memory that nobody uses back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def free_memory(device: torch.device) -> float:
    """Bytes free on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
        return float(found.split()[1]) * 1024
    except (OSError, StopIteration, IndexError):
        return float("inf")


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None
