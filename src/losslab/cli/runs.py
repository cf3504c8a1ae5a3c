"""Saved runs as places in weight space."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from losslab.errors import LosslabError

if TYPE_CHECKING:
    from losslab.engine import Points
    from losslab.tasks import Task


def saved_points(task: Task, run: Path) -> Points:
    """All members of a run that `losslab train --out` has saved.

    Raises:
        LosslabError: No run there, a damaged one, or one of another network than the task builds.
    """
    from losslab.engine import Points, checkpoints, randomness
    from losslab.tasks import build

    path = run / "population.safetensors" if run.is_dir() else run
    if not path.exists():
        raise LosslabError(f"{path} does not exist: pass the folder of a run saved by losslab train --out")
    tensors, _ = checkpoints.read(path)
    with randomness.seeded(0, "init"):
        like = Points.from_modules([build(task)])
    saved = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(("weights/", "buffers/"))}
    if not saved:
        raise LosslabError(f"{path} holds no networks: pass the folder of a run saved by losslab train --out")
    wanted, got = ({n: tuple(t.shape[1:]) for n, t in p.items()} for p in (like, saved))
    if wanted != got:
        odd = min(set(wanted.items()) ^ set(got.items()))[0]
        raise LosslabError(
            f"the run's networks differ from those of {task.name!r} at {odd!r}: pass the task that it was "
            "trained on"
        )
    return Points({n: saved[n] for n in like.weights}, {n: saved[n] for n in like.buffers})


def member_names(run: Path, members: int) -> list[str]:
    """What the members of a saved run are called: number, seed, and what else they differ in."""
    from losslab.engine import checkpoints
    from losslab.paths import member_label

    _, meta = checkpoints.read(run / "population.safetensors" if run.is_dir() else run)
    settings = meta.get("settings", {})
    seeds = settings.get("seeds", range(members))
    rule = settings.get("rule", {})
    hyper = {n: v for n, v in rule.items() if isinstance(v, list) and len(v) == members}
    return [member_label(i, seeds, hyper) for i in range(members)]
