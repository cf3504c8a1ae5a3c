"""Tensors and settings on disk: written whole or not at all, checked when read, never unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.files import write_atomically

KEPT = 2
"""Checkpoints kept in a folder: should the newest be damaged, the one before is used."""


def digest(tensors: Mapping[str, Tensor], meta: str) -> str:
    """A checksum of names, dtypes, shapes and bytes, and of the settings."""
    total = hashlib.blake2b(meta.encode(), digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes tensors and JSON settings as one safetensors file, atomically.

    Raises:
        LosslabError: The folder cannot be written or the disk is full; what was there before is kept.
    """
    from safetensors.torch import save

    flat = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    told = json.dumps(meta)
    write_atomically(path, save(flat, metadata={"losslab": told, "digest": digest(flat, told)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write` wrote.

    Raises:
        LosslabError: The file is missing, torn, damaged, or not losslab's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise LosslabError(f"{path} does not exist: pass the folder of a saved run") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise LosslabError(
            f"{path} is torn or no safetensors file ({error}): delete it, or use another"
        ) from error
    if "losslab" not in header:
        raise LosslabError(f"{path} was not written by losslab: pass a losslab checkpoint")
    if digest(tensors, header["losslab"]) != header.get("digest"):
        raise LosslabError(f"{path} is damaged, its checksum differs: delete it, or use an older checkpoint")
    return tensors, json.loads(header["losslab"])


def name(step: int) -> str:
    """File name of the checkpoint of one step; names sort by step."""
    return f"step-{step:012d}.safetensors"


def save_step(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint and removes all but the last `KEPT`, and what a killed writer left behind."""
    write(folder / name(step), tensors, meta)
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink(missing_ok=True)
    for torn in folder.glob(".*.tmp"):
        torn.unlink(missing_ok=True)


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest checkpoint that is whole, and what was wrong with newer ones; None if there is none at all.

    Raises:
        LosslabError: There are checkpoints and every one is damaged.
    """
    problems: list[str] = []
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            tensors, meta = read(path)
        except LosslabError as error:
            problems.append(str(error))
            continue
        return tensors, meta, problems
    if problems:
        raise LosslabError(f"no checkpoint of {folder} can be used: {problems[0]}")
    return None
