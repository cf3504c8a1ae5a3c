"""What masks cost a training step, and what an iteration of the lottery ticket paper's run takes."""

from __future__ import annotations

import torch
from torch import Tensor

import losslab
from benchmarks.measure import Row, interleaved
from losslab.engine.plan import Plan
from losslab.engine.trainer import Trainer
from losslab.engine.training import born
from losslab.layers import xavier
from losslab.rules import Adam
from losslab.tasks import lenet_300_100, mnist_task, supervised

MEMBERS, BATCH, STEPS, EVERY = 15, 60, 10, 100


def rows(folder: str | None) -> list[Row]:
    """All rows of this suite."""
    task = task_of(folder)
    plain, masked = trainer_of(task, None), trainer_of(task, masks_of(task))

    def steps(trainer: Trainer) -> None:
        for _ in range(STEPS):
            trainer.step()

    def look() -> None:
        masked.measure(masked.data["validation"])

    found = interleaved(
        {"plain": lambda: steps(plain), "masked": lambda: steps(masked), "look": look}, rounds=9, warmup=2
    )
    ratio = found["masked"] / found["plain"]
    each = 1e3 * found["masked"] / STEPS / MEMBERS
    whole = each + 1e3 * found["look"] / EVERY / MEMBERS
    name = f"LeNet-300-100, {MEMBERS} members, batch {BATCH}"
    return [
        Row(f"masked step against unmasked, {name}", f"{ratio:.2f}x", "<= 1.3", ratio <= 1.3),
        Row("  a masked member-step", f"{each:.2f} ms"),
        Row(f"  with 5,000 validation images every {EVERY}", f"{whole:.2f} ms", "<= 1.5", whole <= 1.5),
    ]


def task_of(folder: str | None) -> losslab.Task:
    """MNIST from the folder, or noise of its shape."""
    model = xavier().on(lenet_300_100())
    if folder is not None:
        return mnist_task(model, folder=folder)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60_000, 784, generator=draw), torch.randint(0, 10, (60_000,), generator=draw)
    return supervised(model, (x[5000:], y[5000:]), validation=(x[:5000], y[:5000]))


def masks_of(task: losslab.Task, share: float = 0.21) -> dict[str, Tensor]:
    """Random masks of the size of the seventh level."""
    draw = torch.Generator().manual_seed(0)
    parameters = task.model().named_parameters()
    return {n: torch.rand(p.shape, generator=draw) < share for n, p in parameters if p.dim() > 1}


def trainer_of(task: losslab.Task, masks: dict[str, Tensor] | None) -> Trainer:
    """The population, ready to step; nothing is recorded on the way."""
    plan = Plan(steps=10**9, batch_size=BATCH, record=10**9, evaluate=None, execution="stacked")
    population = born(task, Adam(lr=1.2e-3), plan, list(range(MEMBERS)), masks=masks)
    return Trainer(population, None, False, 1e9)
