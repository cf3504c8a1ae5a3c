"""Writing to disk so that a file is either the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from losslab.errors import LosslabError


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file in the same folder, which is made if missing.

    The bytes reach the disk before the name does (fsync, then rename), so a process killed at any moment
    leaves the previous file or the whole new one.

    Raises:
        LosslabError: The folder cannot be written to, or the disk is full; the previous file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        above = next((p for p in path.parents if p.exists()), path)
        reason = error.strerror or error if above.is_dir() else f"{above} is a file"
        remedy = (
            "free some space"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "check the path"
        )
        raise LosslabError(f"cannot write {path} ({reason}): {remedy}, or choose another folder") from error
