"""Where a number comes from: versions, machine, revision."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path


def machine() -> dict[str, object]:
    """What a reader needs beside the settings to repeat a result, as JSON values."""
    import torch

    return {
        "losslab": version("losslab"),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "revision": revision(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str:
    """The installed version; "not installed" for a package that runs from its source folder."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def revision() -> str | None:
    """The git revision of losslab's own checkout, with "-dirty" after local changes; None outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed into some environment, which may lie in another repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
