"""The lottery: prune, go back, train again, beside the controls; level after level, each kept on disk."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losslab import provenance
from losslab.engine import (
    Branch,
    EarlyStopping,
    Objective,
    Points,
    Population,
    randomness,
    train,
)
from losslab.engine.points import Stack
from losslab.errors import LosslabError
from losslab.files import write_atomically
from losslab.rules import State
from losslab.tasks import Task
from losslab.tasks.check import build
from losslab.tickets.controls import CONTROLS, Ticket, smaller
from losslab.tickets.criteria import Evidence, criterion
from losslab.tickets.outcome import Lottery, Outcome
from losslab.tickets.plan import Plan, way
from losslab.tickets.prunable import kept, prunable, whole
from losslab.tickets.scopes import idle

KEEP = EarlyStopping("validation_loss", patience=None, restore="keep")


def lottery(
    task: Task,
    plan: Plan | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    execution: str = "stacked",
    checkpoint_every: float = 60.0,
    progress: bool | None = None,
    watch: Callable[[Lottery], None] | None = None,
) -> Lottery:
    """Draws lottery tickets and trains them against their controls.

    At every level the tickets of all replicates and all their controls train as one population, on the same
    batches in the same order. The early-stop step is that of the least validation loss; test accuracy is read
    there. A level that is finished is one file in ``out``; a level that was broken off goes on from its
    newest checkpoint.

    Args:
        task: What is trained; without validation data 1/12 of the training examples are held out.
        plan: See `Plan`.
        out: Folder for what comes of it.
        resume: Go on with the plan in ``out``, bit for bit; more levels may be asked for.
        execution: ``"stacked"``, ``"loop"``, or ``"auto"``: stacked where the network allows it.
        checkpoint_every: Seconds between checkpoints within a level.
        progress: A live line; by default on a terminal.
        watch: Called after each level with the lottery so far.

    Returns:
        Tables, verdicts, tickets: see `Lottery`.

    Raises:
        LosslabError: The folder holds another plan, a level would empty a layer or prune nothing, or a
            control cannot be made for this network.

    Example:
        >>> from losslab.tasks import digits_task, mlp
        >>> plan = Plan(levels=1, replicates=2, steps=20, evaluate=10, controls=("reinit",))
        >>> found = lottery(digits_task(mlp(64, 8, 10)), plan)
        >>> found.table[["level", "arm", "kept"]].drop_duplicates().to_numpy().tolist()
        [[0, 'dense', 592], [1, 'ticket', 482], [1, 'reinit', 482]]
    """
    plan = Plan() if plan is None else plan
    run = _Run(task, plan, None if out is None else Path(out), execution, checkpoint_every, progress)
    run.open(resume)
    found: list[Outcome] = []
    for level in range(plan.levels + 1):
        done = run.finished(level)
        if done is None:
            done = run.level(level, found)
            run.keep(done)
        found.append(done)
        result = Lottery(run.task, plan, run.layers, found)
        run.write_tables(result)
        if watch is not None:
            watch(result)
    return result


def reopened(task: Task, plan: Plan, out: str | Path) -> Lottery:
    """The lottery in a folder, as far as it is finished; nothing is trained.

    Args:
        task: As `lottery` was given it.
        plan: The same; its levels do not count.
        out: The folder.

    Raises:
        LosslabError: The folder holds no finished level, or one of another plan.
    """
    run = _Run(task, plan, Path(out), "stacked", 60.0, False)
    found: list[Outcome] = []
    if (Path(out) / "plan.json").exists():
        run.open(resume=True)
        while (done := run.finished(len(found))) is not None:
            found.append(done)
    if not found:
        raise LosslabError(f"{out} holds no finished level of a lottery: draw one there first")
    return Lottery(run.task, plan, run.layers, found)


class _Run:
    """A lottery on its way."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        out: Path | None,
        execution: str,
        checkpoint_every: float,
        progress: bool | None,
    ) -> None:
        self.plan, self.out = plan, out
        self.task = plan.task(task)
        with randomness.seeded(plan.first_seed, "init"):
            self.module = build(self.task)
        self.layers = prunable(self.module)
        self._rehearse()
        data_sets = [n for n in ("train", "validation", "test") if getattr(self.task, n) is not None]
        self.execution = way(self.task, plan) if execution == "auto" else execution
        self.objectives = {n: self._objective(self.task, self.module, n) for n in data_sets}
        self.how: dict[str, Any] = {"execution": self.execution, "progress": progress, "record": [0]}
        self.checkpoint_every = checkpoint_every

    def _objective(self, task: Task, module: nn.Module, name: str) -> Objective:
        return Objective(task, name, batch_norm="running", execution=self.execution, module=module)

    def _rehearse(self) -> None:
        """What cannot be done is told before anything trains."""
        plan = self.plan
        at_once = plan.one_shot or not criterion(plan.criterion).trained
        if plan.scope.units:  # how many weights units take depends on the layers, how many units go does not
            like = {n: p.detach()[None] for n, p in self.module.named_parameters()}
            masks = everything = whole(self.layers, like)
            for level in range(1, plan.levels + 1):
                before = int(kept(masks, self.layers))
                begun, times = (everything, level) if at_once else (masks, 1)
                masks = plan.scope.prune(like, begun, self.layers, times)
                if int(kept(masks, self.layers)) == before and not at_once:
                    raise idle(level)
        else:
            plan.scope.shares(self.layers, plan.levels, at_once)
        if "dense" in plan.controls:
            smaller(self.task, self.layers, self.layers.total)

    # -- one level -------------------------------------------------------------------------------------

    def level(self, level: int, before: list[Outcome]) -> Outcome:
        """Prunes, trains and measures."""
        branch, masks = self._ticket(level, before)
        arms = self.plan.at(level)
        starts, kinds = [branch], [masks]
        ticket = Ticket(self.task, self.layers, branch.points, masks, self.plan.seeds, level)
        for arm in arms[1:]:
            points, other = CONTROLS[arm](ticket)
            state = branch.state if arm == "random" else _blank(branch.state)
            starts.append(Branch(points, state, branch.step))
            kinds.append(other)
        names = dict.fromkeys(n for m in kinds for n in m)
        joined = {n: torch.cat([m.get(n, masks[n]) for m in kinds]) for n in names}
        trained = self._train(f"level-{level:02d}", self.task, level, _joined(starts), joined, len(arms))
        rows = self._rows(trained, level, arms, self.objectives)
        counts = kept(joined, self.layers).tolist()
        for row, count in zip(rows, counts, strict=True):
            row |= {"kept": count, "of": self.layers.total, "remaining": count / self.layers.total}
        told = _curves(trained, rows)
        if self.plan.small_at(level):
            small = self._small(level, min(counts))
            rows, told = rows + small[0], told + small[1]
        n = self.plan.replicates
        first = slice(0, n)
        best = trained.best_points().select(list(range(n)))
        state = {s: {k: t[first] for k, t in ts.items()} for s, ts in trained.state.items()}
        mine = {n: m[first] for n, m in joined.items()}
        started = Branch(branch.points, branch.state, branch.step)
        return Outcome(level, rows, told, mine, started, trained.points.select(list(range(n))), best, state)

    def _ticket(self, level: int, before: list[Outcome]) -> tuple[Branch, Stack]:
        """Where the tickets of a level start, and their masks."""
        if level == 0:
            return self._beginning()
        dense, last = before[0], before[-1]
        masks = self._pruned(level, dense, last)
        rewind = self.plan.rewind
        if rewind == "continue":
            return Branch(last.final, last.state, self.plan.steps_at(level)[0]), masks
        if rewind in ("learning-rate", "fine-tune"):
            return Branch(last.final, {}, self.plan.steps_at(level)[0]), masks
        return dense.start, masks

    def _beginning(self) -> tuple[Branch, Stack]:
        settings: dict[str, Any] = {"seeds": self.plan.seeds, "batch_size": self.plan.batch_size}
        steps = 0 if isinstance(self.plan.rewind, str) else int(self.plan.rewind)
        first = train(self.task, self.plan.rule, steps=steps, evaluate=None, **settings, **self.how)
        branch = first.branch()
        return branch, whole(self.layers, branch.points.weights)

    def _pruned(self, level: int, dense: Outcome, last: Outcome) -> Stack:
        plan, chosen = self.plan, criterion(self.plan.criterion)
        at_once = plan.one_shot or not chosen.trained
        source = dense if at_once else last
        masks = whole(self.layers, dense.start.points.weights) if at_once else last.masks
        for turn in range(1, plan.rounds + 1):
            module = copy.deepcopy(self.module)
            start, end = source.start.points, source.final
            at = Evidence(self.task, module, self.layers, start, end, masks, plan.seeds, level)
            scores = chosen.score(at)
            if not at_once:
                return plan.scope.prune(scores, masks, self.layers)
            # Every round counts from the whole network; what went before goes first again.
            scores = {n: s.masked_fill(~masks[n], -torch.inf) for n, s in scores.items()}
            everything = whole(self.layers, dense.start.points.weights)
            masks = plan.scope.prune(scores, everything, self.layers, level * turn / plan.rounds)
        return masks

    def _small(self, level: int, weights: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A dense network of at most as many weights, trained the same way from its own start."""
        task = smaller(self.task, self.layers, weights)
        if self.plan.init is not None:
            task = task.replace(model=self.plan.init.on(task.model))
        module = build(task)
        trained = self._train(f"level-{level:02d}-dense", task, 0, None, {}, 1)
        objectives = {n: self._objective(task, module, n) for n in self.objectives}
        rows = self._rows(trained, level, ("small dense",), objectives)
        count = prunable(module).total
        for row in rows:
            row |= {"kept": count, "of": self.layers.total, "remaining": count / self.layers.total}
        return rows, _curves(trained, rows)

    def _train(
        self, name: str, task: Task, level: int, start: Branch | None, masks: Stack, arms: int
    ) -> Population:
        plan = self.plan
        first, last = (0, plan.steps) if start is None else (start.step, plan.steps_at(level)[1])
        looks = sorted({*range(first, last, plan.evaluate), last})
        folder = None if self.out is None else self.out / name
        return train(
            task,
            plan.rule,
            seeds=plan.seeds * arms,
            steps=last,
            batch_size=plan.batch_size,
            start=start,
            masks=masks,
            evaluate=looks,
            evaluate_on=["validation"],
            stop=KEEP,
            out=folder,
            resume=folder is not None and (folder / "checkpoints").is_dir(),
            checkpoint_every=self.checkpoint_every,
            **self.how,
        )

    def _rows(
        self, trained: Population, level: int, arms: tuple[str, ...], objectives: dict[str, Objective]
    ) -> list[dict[str, Any]]:
        """One row a member: where it stopped early, and how good it was there and in the end."""
        best = trained.best_points().to(dtype=trained.plan.dtype)
        found = trained.log.tensors()
        losses = found["validation_loss"].nan_to_num(nan=torch.inf)
        places = losses.argmin(0)
        steps = (found["steps"][places] - trained.first).tolist()
        measured: dict[str, Tensor] = {}
        for name, objective in objectives.items():
            for prefix, points in (("", best), ("final_", trained.points)):
                if name == "train" and not prefix:
                    continue
                values = {"loss": objective.value(points)}
                if self.task.metrics is not None:
                    # A network of NaN has no accuracy, whatever class its outputs' argmax may be.
                    told = objective.metrics(points).items()
                    values |= {n: t.double().masked_fill(values["loss"].isnan(), torch.nan) for n, t in told}
                measured |= {f"{prefix}{name}_{what}": t.double() for what, t in values.items()}
        rows = []
        for i in range(len(trained)):
            arm, replicate = divmod(i, self.plan.replicates)
            row = {"level": level, "arm": arms[arm], "replicate": replicate, "stop_step": int(steps[i])}
            rows.append(
                row | {n: float(t[i]) for n, t in measured.items()} | {"diverged": int(trained.diverged[i])}
            )
        return rows

    # -- disk ------------------------------------------------------------------------------------------

    def open(self, resume: bool) -> None:
        """Makes the folder, or checks that it holds this plan."""
        assert self.task.train is not None
        shapes = {n: list(p.shape) for n, p in self.module.named_parameters()}
        settings = {"task": self.task.name, "examples": len(self.task.train), "parameters": shapes}
        settings |= self.plan.describe()
        if self.out is None:
            if resume:
                raise LosslabError("resume was asked for without a folder: pass out=")
            return
        path = self.out / "plan.json"
        if path.exists():
            saved = _settings(path)
            if not resume:
                raise LosslabError(
                    f"{self.out} already holds a lottery: resume it (resume=True, --resume), or pass "
                    "another folder"
                )
            differing = sorted(n for n in {*saved, *settings} if saved.get(n) != settings.get(n))
            if differing:
                raise LosslabError(
                    f"{self.out} holds a lottery of another plan, which differs in {', '.join(differing)}: "
                    "use the same, or another folder"
                )
        write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())
        if not (where := self.out / "machine.json").exists():
            write_atomically(where, (json.dumps(provenance.machine(), indent=1) + "\n").encode())

    def finished(self, level: int) -> Outcome | None:
        """The outcome of a level, if it is on disk."""
        path = None if self.out is None else self.out / f"level-{level:02d}.safetensors"
        if path is None or not path.exists():
            return None
        found = Outcome.read(path)
        if found.level != level:
            raise LosslabError(f"{path} holds level {found.level}: delete it, it will be drawn again")
        return found

    def keep(self, outcome: Outcome) -> None:
        """Writes a finished level; the checkpoints that led there are no longer needed."""
        if self.out is None:
            return
        outcome.write(self.out / f"level-{outcome.level:02d}.safetensors")
        for folder in self.out.glob(f"level-{outcome.level:02d}*"):
            if folder.is_dir():
                shutil.rmtree(folder)

    def write_tables(self, result: Lottery) -> None:
        """The tables so far, for people."""
        if self.out is not None:
            for name, table in (("table", result.table), ("curves", result.curves)):
                write_atomically(self.out / f"{name}.csv", table.to_csv(index=False).encode())


def _settings(path: Path) -> dict[str, Any]:
    """A folder's plan, as it was written."""
    try:
        saved = json.loads(path.read_text("utf-8"))
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise LosslabError(f"{path} is damaged: start again in another folder")
    return saved


def _blank(state: State) -> State:
    return {slot: {n: torch.zeros_like(t) for n, t in ts.items()} for slot, ts in state.items()}


def _joined(branches: list[Branch]) -> Branch:
    """Several stacks as one."""

    def cat(parts: list[Stack]) -> Stack:
        return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}

    points = Points(cat([b.points.weights for b in branches]), cat([b.points.buffers for b in branches]))
    slots = branches[0].state
    return Branch(points, {s: cat([b.state[s] for b in branches]) for s in slots}, branches[0].step)


def _curves(trained: Population, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The validation measurements of every member, with its place in the table."""
    told = []
    found = trained.log.tensors()
    columns = {n: t.tolist() for n, t in found.items() if n.startswith("validation_")}
    seen = torch.isfinite(found["validation_loss"]).any(1)
    for r, step in enumerate(found["steps"].tolist()):
        if not bool(seen[r]):
            continue
        for i, row in enumerate(rows):
            place = {n: row[n] for n in ("level", "arm", "replicate")}
            told.append(place | {"step": step - trained.first} | {n: c[r][i] for n, c in columns.items()})
    return told
