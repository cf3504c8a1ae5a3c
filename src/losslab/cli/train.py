"""``losslab train``: a population on the user's own task, from the shell."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from losslab.cli.terminal import counted, printed, terminal
from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

    from losslab.cli.commands import Train
    from losslab.engine import Execution, Population

SHOWN = 48
"""Members listed one by one; more are summarised by their values."""


def train(command: Train) -> None:
    """Trains, prints the table, saves the run."""
    import torch

    from losslab import engine
    from losslab.tasks import load_task

    if command.threads is not None:
        if command.threads < 1:
            raise LosslabError(f"--threads is {command.threads}: pass at least 1")
        torch.set_num_threads(command.threads)
    if command.resume and command.out is None:
        raise LosslabError("--resume was given without --out: name the folder of the run")
    task = load_task(command.task, folder=command.data)
    seeds, rule = population_of(command.rule, command.lr, command.hyper, command.seeds)
    epochs = 1.0 if command.steps is None and command.epochs is None else command.epochs
    stop = None
    if command.patience is not None:
        watched = "test_loss" if task.validation is None else "validation_loss"
        stop = engine.EarlyStopping(watched, command.patience)
    begun = time.perf_counter()
    population = engine.train(
        task,
        rule,
        seeds=seeds,
        steps=command.steps,
        epochs=epochs,
        batch_size=command.batch_size,
        shared_batches=command.shared_batches,
        replacement=command.replacement,
        drop_last=command.drop_last,
        dtype=command.dtype,
        device=command.device,
        execution=command.execution,
        memory=None if command.memory is None else command.memory * 1e9,
        stop=stop,
        out=command.out,
        resume=command.resume,
        checkpoint_every=command.checkpoint_every,
    )
    seconds = time.perf_counter() - begun
    for notice in population.notices:
        print(f"losslab: {notice}", file=sys.stderr)
    console = terminal()
    console.print(summary_table(population))
    members, steps = counted(len(population), "member"), counted(population.step, "step")
    console.print(f"{members}, {steps} in {seconds:.1f} s{_way(population.execution)}", style="dim")
    if command.out is not None:
        console.print(f"saved in {command.out}: population.safetensors, history.parquet, checkpoints/")


def population_of(
    name: str, rates: tuple[float, ...], options: tuple[str, ...], seeds: int
) -> tuple[list[int], Any]:
    """Every combination of the values given, times the seeds: one seed a member and the rule."""
    from losslab import engine
    from losslab.rules import make

    if seeds < 1:
        raise LosslabError(f"--seeds is {seeds}: pass at least 1")
    values = _options(options)
    if rates:
        if "lr" in values:
            raise LosslabError("lr was given by --lr and by --hyper: give it once")
        values = {"lr": list(rates), **values}
    many = {n: v for n, v in values.items() if len(v) > 1}
    members, columns = engine.cross(seeds, **many)
    settings = {n: v[0] for n, v in values.items()} | columns
    if name.startswith("torch."):
        return members, _torch_rule(name.removeprefix("torch."), settings)
    return members, make(name, **settings)


def _torch_rule(name: str, settings: dict[str, Any]) -> Any:
    import torch

    from losslab import engine
    from losslab.errors import unknown

    kinds = {
        n: k
        for n, k in vars(torch.optim).items()
        if isinstance(k, type) and issubclass(k, torch.optim.Optimizer) and k is not torch.optim.Optimizer
    }
    if name not in kinds:
        raise unknown("torch.optim class", name, kinds)
    return engine.TorchRule(kinds[name], **settings)


def _options(texts: tuple[str, ...]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, told = text.partition("=")
        if not equals or not name or not told:
            raise LosslabError(f"--hyper got {text!r}: write NAME=VALUE, for example beta1=0.9")
        values[name] = [_value(part) for part in told.split(",")]
    return values


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def summary_table(population: Population) -> Group:
    """The members, or, where there are many, the median over seeds of each combination of values."""
    frame = population.summary()
    hyper = list(population.hyperparameters)
    measured = [c for c in frame.columns if c.endswith(("_loss", "_accuracy"))] or ["loss"]
    measured = [c for c in measured if c in frame.columns]
    frame = frame[["member", "seed", *hyper, *measured, "ended"]]
    if len(frame) > SHOWN and hyper:
        measured = [c for c in frame.columns if c not in ("member", "seed", "ended", *hyper)]
        groups = frame.groupby(hyper, sort=False)
        frame = groups[measured].median().join(groups["ended"].agg(_share_diverged)).reset_index()
    keys = 1 if "member" in frame else len(hyper)
    return printed(frame, f"{population.rule.name} on {population.task.name}", keys)


def _way(execution: Execution | None) -> str:
    """How the members were run, and why."""
    if execution is None or execution.reason == "one member":
        return ""
    how = "one by one" if execution.backend.name == "loop" else "as one program"
    return f", {how}: {execution.reason}"


def _share_diverged(endings: pd.Series) -> str:
    return f"{sum(text.startswith('diverged') for text in endings)} of {len(endings)} diverged"


__all__ = ["population_of", "summary_table", "train"]
