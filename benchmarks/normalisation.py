"""Batch norm in a population, the price of watching signals, Ioffe and Szegedy's experiment in full."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import losslab
from benchmarks.measure import Row, interleaved
from benchmarks.populations import Case, measure, task_of, trainer_of
from losslab.engine import compiled
from losslab.engine.trainer import Trainer
from losslab.lecture.section_6_4.looks import Looks
from losslab.lecture.section_6_4.sigmoid_runs import GAUSSIAN, NORMALISED, Setting, factory, trained
from losslab.signals import Recorder
from losslab.signals.recorder import PROBE

CASE = Case("batch norm 64-100x3-10", (64, 100, 100, 100, 10), 32, 60, 5.0, 20, batch_norm=True)
EVERY = 20
ROUNDS = 10
STEPS = 50_000
RATE = 1.0


def share_of_batch_norm() -> Row:
    """A step with batch norm against the same step without."""
    plain = dataclasses.replace(CASE, batch_norm=False)
    trainers = {case.batch_norm: trainer_of(case, task_of(case, None)) for case in (plain, CASE)}

    def many(trainer: Trainer) -> Callable[[], object]:
        return lambda: [trainer.step() for _ in range(CASE.steps)]

    seconds = interleaved({"plain": many(trainers[False]), "normalised": many(trainers[True])})
    share = seconds["normalised"] / seconds["plain"] - 1
    return Row("  batch norm adds to a step", f"{share:.0%}", "<= 60 %", share <= 0.6)


def share_of_signals() -> list[Row]:
    """Training that records signals every 20 steps against the same training without, by either code."""
    found = [_share_of_signals("by operations")]
    if compiled.machine_code() is not None:
        found.append(_share_of_signals("by machine code"))
    return found


def _share_of_signals(how: str) -> Row:
    task = task_of(CASE, None)
    whole = compiled.machine_code
    if how == "by operations":
        compiled.machine_code = lambda: None  # type: ignore[assignment]

    def run(watch: Recorder | None) -> object:
        population = losslab.train(
            task,
            "sgd",
            seeds=CASE.members,
            steps=20 * EVERY,
            batch_size=CASE.batch,
            execution="stacked",
            evaluate=None,
            record=EVERY,
            watch=watch,
            progress=False,
        )
        return population if watch is None else watch.rows  # with all that is left to do for its numbers

    try:
        seconds = interleaved(
            {"plain": lambda: run(None), "watched": lambda: run(Recorder(every=EVERY))}, ROUNDS
        )
    finally:
        compiled.machine_code = whole
    share = seconds["watched"] / seconds["plain"] - 1
    each = 1e3 * (seconds["watched"] - seconds["plain"]) / 20
    what = f"  signals of {PROBE} examples every {EVERY} steps add, training {how}"
    return Row(what, f"{share:.1%} ({each:.1f} ms a look)", "<= 10 %", share <= 0.1)


def rows(folder: str | None) -> list[Row]:
    """All rows of this suite."""
    return [*measure(CASE, folder), share_of_batch_norm(), *share_of_signals(), *experiment(folder)]


def experiment(folder: str | None) -> list[Row]:
    """784-100-100-100-10 sigmoid networks on binarised MNIST for 50,000 steps: with and without, 3 seeds."""
    name = f"Ioffe and Szegedy on MNIST, {STEPS:,} steps, 2 networks x 3 seeds"
    if folder is None:
        return [Row(name, "not run: pass --data")]
    setting = Setting("binarised MNIST", 784, 0.95, STEPS, 0, 500, 3, 3, Path(folder))
    data = setting.splits()
    rows, total = [], 0.0
    for network in (GAUSSIAN, NORMALISED):
        task = losslab.supervised(factory(setting, network), data.train, data.test)
        start = time.perf_counter()
        population = trained(task, setting, [RATE] * setting.seeds, STEPS, Looks(data.test.head(256).all()))
        seconds = time.perf_counter() - start
        total += seconds
        reached = population.summary()["test_accuracy"].median()
        rows.append(Row(f"  {network}: test accuracy {reached:.3f}", f"{seconds:.0f} s"))
    return [Row(name, f"{total:.0f} s", "<= 240 s", total <= 240), *rows]
