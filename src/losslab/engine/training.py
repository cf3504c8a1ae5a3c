"""Training N networks as one program."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losslab.engine import randomness
from losslab.engine.batches import Batches
from losslab.engine.history import History, When
from losslab.engine.masks import as_masks, zeroed, zeroed_state
from losslab.engine.plan import EarlyStopping, Plan, as_dtype, as_seeds
from losslab.engine.points import Points
from losslab.engine.population import Branch, Population
from losslab.engine.trainer import Trainer
from losslab.engine.updating import TorchRule, as_rule
from losslab.errors import LosslabError
from losslab.rules import Rule, State
from losslab.tasks import Data, Task, build, check


def train(
    task: Task,
    rule: Any,
    *,
    seeds: int | Sequence[int] = 1,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    shared_batches: bool = False,
    order_seed: int = 0,
    replacement: bool = False,
    drop_last: bool = False,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    execution: str = "auto",
    memory: float | None = None,
    record: When = None,
    evaluate: When = "epoch",
    evaluate_on: Sequence[str] | None = None,
    stop: EarlyStopping | None = None,
    start: Points | Population | Branch | nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: float = 30.0,
    progress: bool | None = None,
    watch: Callable[[Population], None] | None = None,
) -> Population:
    """Trains N networks, each with its own seed, data order and hyperparameters, as one tensor program.

    Args:
        task: Model, loss and data.
        rule: A losslab rule, a rule's name, or a ``torch.optim`` class (`TorchRule` gives it arguments).
        seeds: Number of members (seeds 0, 1, ...) or the seeds. A member's weights, order and dropout are a
            function of its seed, whoever trains beside it. One seed and M rates give M members of that seed.
        steps: Updates; or give ``epochs``.
        epochs: Passes over the training data, may be a fraction.
        batch_size: Examples a batch; by default 32, and all of them for rules such as ``gd`` and ``newton``.
        shared_batches: One data order for all members (of ``order_seed``) instead of one each.
        order_seed: Seed of the shared order.
        replacement: Draw every batch anew, with replacement.
        drop_last: Leave out an epoch's last, smaller batch.
        dtype: Of weights and floating data.
        device: Where to train.
        execution: ``"auto"``, ``"stacked"`` or ``"loop"``.
        memory: Bytes to stay within; members are evaluated in chunks when they would not fit.
        record: When to write a row of the batch's loss, accuracy, gradient and update norm: every k steps,
            ``"epoch"``, a list of steps, a function, or None for about 100 rows.
        evaluate: When to measure whole data sets; the same kinds, None for never.
        evaluate_on: Which of ``"train"``, ``"validation"``, ``"test"``; by default those two last that exist.
        stop: Early stopping, member by member.
        start: Weights to start from instead of the seeds' (one network, or one a member). A `Branch`, as
            `Population.branch` gives it, also hands on the rule's state and the step, up to ``steps``.
        masks: Weights to prune, name -> True where one is kept, ``[*shape]`` or ``[N, *shape]``: the others
            are zero and stay so, without gradient, decay or moments.
        out: Folder for checkpoints and the finished run.
        resume: Go on from the newest good checkpoint in ``out``; the result is that of the unbroken
            run, bit for bit.
        checkpoint_every: Seconds between checkpoints; 0 for after every step.
        progress: A live line; by default on a terminal.
        watch: Called after every recorded step with the population so far.

    Returns:
        The trained population.

    Raises:
        LosslabError: Bad settings, a task that cannot be trained, a folder that holds another run.

    Example:
        >>> from losslab.tasks import mlp, supervised
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> task = supervised(mlp(3, 8, 2), train=(x, (x[:, 0] > 0).long()))
        >>> population = train(task, "adam", seeds=4, epochs=20, batch_size=10)
        >>> population[2](x[:5]).shape, len(population)
        (torch.Size([5, 2]), 4)
    """
    rule = as_rule(rule)
    members = as_seeds(seeds, rule.members())
    rule.check_members(len(members))
    if not isinstance(task, Task):
        raise LosslabError(
            f"the task is a {type(task).__name__}: pass a losslab.Task, as losslab.supervised makes one"
        )
    data = task.train
    size = batch_size if batch_size is not None or getattr(rule, "full_batch", False) else 32
    plan = Plan(
        steps=_steps(steps, epochs, data, size, drop_last),
        batch_size=None if data is None else size,
        shared_batches=shared_batches,
        order_seed=order_seed,
        replacement=replacement,
        drop_last=drop_last,
        dtype=as_dtype(dtype),
        device=str(device),
        execution=execution,
        memory=memory,
        record=record,
        evaluate=evaluate,
        evaluate_on=_data_sets(task, evaluate_on),
        stop=stop,
    )
    if stop is not None and (evaluate is None or not plan.evaluate_on):
        raise LosslabError(
            "early stopping needs evaluations and there are none: give the task validation data, "
            "or a data set in evaluate_on, and leave evaluate on"
        )
    population = born(task, rule, plan, members, start, masks)
    with randomness.spared():
        trainer = Trainer(population, None if out is None else Path(out), resume, checkpoint_every)
        return trainer.run(progress, watch)


def _steps(
    steps: int | None, epochs: float | None, data: Data | None, size: int | None, drop_last: bool
) -> int:
    if (steps is None) == (epochs is None):
        got = "neither" if steps is None else "both"
        raise LosslabError(f"{got} of steps= and epochs= given: pass one of them")
    if steps is not None:
        if steps < 0 or steps != int(steps):
            raise LosslabError(f"steps is {steps}: pass 0 or more, a whole number")
        return int(steps)
    if data is None:
        raise LosslabError("the task has no data, so no epochs: pass steps=")
    assert epochs is not None
    if not epochs >= 0 or math.isinf(epochs):
        raise LosslabError(f"epochs is {epochs}: pass 0 or more")
    per_epoch = Batches(len(data), size, [0], drop_last=drop_last).per_epoch
    return math.ceil(epochs * per_epoch - 1e-9)


def _data_sets(task: Task, names: Sequence[str] | None) -> tuple[str, ...]:
    known = ("train", "validation", "test")
    if names is None:
        return tuple(n for n in known[1:] if getattr(task, n) is not None)
    for name in names:
        if name not in known or getattr(task, name) is None:
            there = [n for n in known if getattr(task, n) is not None]
            raise LosslabError(
                f"the task has no {name!r} data: evaluate_on may name {', '.join(there) or 'nothing'}"
            )
    return tuple(names)


def born(
    task: Task,
    rule: Rule | TorchRule,
    plan: Plan,
    seeds: list[int],
    start: Points | Population | Branch | nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Population:
    """The population before its first step: weights drawn from the seeds, the task checked."""
    device = _device(plan.device)
    modules: dict[int, nn.Module] = {}
    for seed in dict.fromkeys(seeds):
        with randomness.seeded(seed, "init"):
            modules[seed] = build(task)
    template = copy.deepcopy(modules[seeds[0]]).to(device, plan.dtype)  # the factory may keep the module
    check(
        task if task.train is None else task.replace(train=task.train.to(device, plan.dtype)),
        template,
        held_out=[] if plan.evaluate is None else [n for n in plan.evaluate_on if n != "train"],
    )
    points = Points.from_modules([modules[s] for s in seeds])
    state: State = {}
    first = 0
    if isinstance(start, Branch):
        state, first = _handed_on(start, rule, plan, len(seeds))
        start = start.points
    if start is not None:
        points = _placed(start, points.select([0]), len(seeds))
    points = points.to(device, plan.dtype)
    kept = as_masks(masks or {}, points.weights)
    points, state = Points(zeroed(points.weights, kept), points.buffers), zeroed_state(state, kept)
    return Population(
        task,
        rule,
        plan,
        list(seeds),
        points,
        template,
        History(len(seeds)),
        state,
        kept,
        step=first,
        first=first,
    )


def _handed_on(branch: Branch, rule: Rule | TorchRule, plan: Plan, members: int) -> tuple[State, int]:
    """A branch's state for so many members, and its step."""
    if branch.step > plan.steps:
        raise LosslabError(
            f"the branch is at step {branch.step}, training ends at {plan.steps}: pass an earlier branch or "
            "more steps"
        )
    if branch.state and (isinstance(rule, TorchRule) or set(branch.state) != set(rule.slots())):
        raise LosslabError(
            f"the branch holds the state {', '.join(branch.state)}, which {rule.name} has not: go on with "
            "the rule it was trained by, or start from branch.points"
        )
    rows = [0] * members if branch.points.members == 1 else list(range(members))
    return {
        slot: {n: t[rows].to(plan.device, copy=True) for n, t in ts.items()}
        for slot, ts in branch.state.items()
    }, branch.step


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise LosslabError(f"device {name!r} cannot be used ({told}): pass another device") from error
    return device


def _placed(start: Points | Population | nn.Module, like: Points, members: int) -> Points:
    points = start.points if isinstance(start, Population) else start
    if isinstance(points, nn.Module):
        points = Points.from_modules([points])
    wanted, got = ({n: tuple(t.shape[1:]) for n, t in p.items()} for p in (like, points))
    if wanted != got:
        odd = min(set(wanted.items()) ^ set(got.items()))[0]
        raise LosslabError(
            f"start differs from the task's model at {odd!r}: pass weights of the same architecture"
        )
    if points.members not in (1, members):
        raise LosslabError(
            f"start has {points.members} members, the population {members}: pass 1 or {members}"
        )
    points = points.clone() if points.members == members else points.select([0] * members)
    return Points({n: points[n] for n in like.weights}, {n: points[n] for n in like.buffers})
