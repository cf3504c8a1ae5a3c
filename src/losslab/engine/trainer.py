"""The training loop of a population."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losslab.engine import checkpoints, randomness
from losslab.engine.backends import LoopBackend, Stand
from losslab.engine.execution import Execution, choose
from losslab.engine.hessian import BatchCurvature
from losslab.engine.history import schedule
from losslab.engine.masks import PrunedCurvature, Pruning
from losslab.engine.memory import release_freed_memory
from losslab.engine.plan import EarlyStopping
from losslab.engine.points import Stack
from losslab.engine.population import NEVER, Population
from losslab.engine.progress import Bar
from losslab.engine.template import Template
from losslab.engine.updating import Closure, TorchUpdater, updater
from losslab.errors import LosslabError, first_line
from losslab.files import write_atomically
from losslab.rules.rule import Weights, member_norm
from losslab.tasks import Batch, Data

SYNC_EVERY = 50
"""Steps between two looks at which members diverged, on a device where a look waits for the device."""


class Trainer:
    """Runs a population's plan to its end.

    Members that diverge or stop early leave the stack, so that the rest goes on faster and undisturbed.

    Args:
        population: Where to start from.
        out: Folder for checkpoints and results, or None.
        resume: Go on from the newest good checkpoint of ``out``.
        checkpoint_every: Seconds between checkpoints.
    """

    def __init__(
        self, population: Population, out: Path | None, resume: bool, checkpoint_every: float
    ) -> None:
        self.population = population
        self.plan = population.plan
        self.task = population.task
        self.out, self.checkpoint_every = out, checkpoint_every
        self.template = Template(population.template)
        device, dtype = self.plan.device, self.plan.dtype
        self.data = {
            name: None if (d := getattr(self.task, name)) is None else d.to(device, dtype)
            for name in ("train", "validation", "test")
        }
        execution = self._prepare_folder(resume)
        self._take(self.population.active)
        self.execution = Execution.restore(execution, self.template) if execution else self._choose()
        population.execution = self.execution
        total, per_epoch = self.plan.steps, population.per_epoch
        record = self.plan.record if self.plan.record is not None else max(1, total // 100)
        self.records = schedule(record, "record", per_epoch, total)
        self.evaluates = schedule(self.plan.evaluate, "evaluate", per_epoch, total)

    # -- the stack of members that train ---------------------------------------------------------------

    def _take(self, active: Tensor) -> None:
        """Builds the working stack of the active members out of the population."""
        p = self.population
        self.active = active
        index = active.tolist()
        chosen = p.points.select(index)
        self.weights, self.buffers = chosen.weights, chosen.buffers
        self.rule = p.rule.select(index) if len(index) else p.rule
        self.updater = updater(self.rule)
        fused = getattr(self.updater, "fused", None) is not None
        masks = {n: m[active.to(m.device)] for n, m in p.masks.items()}
        self.pruning = Pruning(masks, self.weights, self.rule, fused) if masks else None
        device = torch.device(self.plan.device)
        if isinstance(self.updater, TorchUpdater):
            mine = {k: v for k, v in p.optimizers.items() if int(k.split("/")[0]) in index}
            place = {str(m): str(i) for i, m in enumerate(index)}
            renamed = {f"{place[k.split('/')[0]]}/{k.split('/', 1)[1]}": v for k, v in mine.items()}
            self.updater.load(renamed, self.weights)
            self.state: dict[str, Stack] = {}
        elif p.state:
            rows = active.to(device)
            self.state = {s: {n: t[rows] for n, t in ts.items()} for s, ts in p.state.items()}
        else:
            self.state = self.updater.init(self.weights)
        seeds = [p.seeds[i] for i in index]
        self.keys = randomness.member_keys(seeds, "forward", device)
        train = self.data["train"]
        self.batches = (
            None if train is None or not seeds else self.plan.batches(len(train), p.seeds).select(index)
        )
        self.first_bad = torch.full((len(index),), NEVER, dtype=torch.int64, device=device)

    def _store(self) -> None:
        """Writes the working stack back into the population."""
        p = self.population
        rows = self.active.to(self.plan.device)
        everyone = len(self.active) == len(p)
        new = {**self.weights, **self.buffers}
        for name, tensor in new.items():
            full = p.points[name]
            if everyone:
                full = tensor.detach().clone()
            else:
                full[rows] = tensor.detach()
            (p.points.weights if name in p.points.weights else p.points.buffers)[name] = full
        for slot, tensors in self.state.items():
            held = p.state.setdefault(slot, {})
            for name, tensor in tensors.items():
                if everyone or name not in held:
                    held[name] = tensor.detach().clone()
                else:
                    held[name][rows] = tensor.detach()
        if isinstance(self.updater, TorchUpdater):
            index = self.active.tolist()
            for key in [k for k in p.optimizers if int(k.split("/")[0]) in index]:
                del p.optimizers[key]
            for key, value in self.updater.save().items():
                i, rest = key.split("/", 1)
                p.optimizers[f"{index[int(i)]}/{rest}"] = value.clone()

    def _retire(self, ended: Tensor, mark: Tensor, step: int | Tensor) -> None:
        """Takes members (positions in the stack) out of it; ``mark`` is told the step."""
        self._store()
        gone = self.active[ended.cpu()]
        mark[gone] = step if isinstance(step, int) else step.cpu()
        self._take(self.population.active)

    # -- the loop --------------------------------------------------------------------------------------

    def run(self, progress: bool | None, watch: Callable[[Population], None] | None) -> Population:
        """Trains until the plan's last step, or until no member is left."""
        p, total = self.population, self.plan.steps
        saved = time.monotonic()
        loss = torch.tensor(math.nan)
        with Bar(total, len(p), p.step, progress) as bar:
            while True:
                if self.out is not None and time.monotonic() - saved >= self.checkpoint_every and p.step:
                    self._checkpoint()
                    saved = time.monotonic()
                if len(self.active) and self.evaluates(p.step):
                    self._evaluate()
                if p.step >= total or not len(self.active):
                    break
                loss = self.step(watch)
                if bar.due():
                    bar.update(p.step, float(loss.mean()), len(self.active))
            if len(self.active):
                self._look_for_diverged(final=True)
            bar.update(p.step, float(loss.mean()), len(self.active))
        self._store()
        self._finish()
        release_freed_memory()
        return p

    def step(self, watch: Callable[[Population], None] | None = None) -> Tensor:
        """One update of every active member; their losses ``[n]`` before it."""
        p, step = self.population, self.population.step
        drawing = self.execution.backend.draws or self.execution.backend.global_draws
        at = self._stand(step, randomness.fold(self.keys, step) if drawing else self.keys)
        losses, grads = self.execution.gradients(self.task.loss, at)
        if self.pruning is not None:
            grads = self.pruning.gradients(grads)
        recording = self.records(step)
        if recording:
            self._record(step, losses, grads, at)
            before = {n: w.detach().clone() for n, w in self.weights.items()}
        self.weights, self.state = self.updater.apply(
            grads, self.state, self.weights, step, *self._helpers(at)
        )
        if self.pruning is not None:
            self.pruning.after(self.weights, self.state)
        if recording:
            moved = member_norm({n: w.detach() - before[n] for n, w in self.weights.items()})
            p.log.add(step, {"update_norm": moved}, self.active)
        p.step = step + 1
        # One number asks for all members; a sum that overflows only makes it look again.
        if losses.is_cuda or not math.isfinite(float(losses.sum())):
            bad = ~torch.isfinite(losses)
            self.first_bad = torch.where((self.first_bad == NEVER) & bad, step, self.first_bad)
            if not losses.is_cuda or p.step % SYNC_EVERY == 0:
                self._look_for_diverged()
        if recording and watch is not None:
            self._store()
            watch(p)
        return losses

    def _stand(self, step: int, keys: Tensor) -> Stand:
        """Where the active members stand, on the batches of a step."""
        train, batches = self.data["train"], self.batches
        if train is None or batches is None:
            return Stand(self.weights, self.buffers, None, False, keys)
        index = batches.at(step)
        batch = train.all() if batches.whole else train.take(index.to(self.plan.device))
        return Stand(self.weights, self.buffers, batch, index.dim() == 2, keys)

    def _helpers(self, at: Stand) -> tuple[Any, Closure | None]:
        """Curvature for second-order rules, a closure for optimizers that evaluate the loss themselves."""
        if isinstance(self.updater, TorchUpdater):
            return None, self._closure(at) if self.updater.needs_closure else None
        if self.updater.rule.needs_curvature:
            curvature: Any = BatchCurvature(self.execution, self.task.loss, at)
            if self.pruning is not None:
                curvature = PrunedCurvature(curvature, self.pruning.flat(self.weights))
            return curvature, None
        return None, None

    def _closure(self, at: Stand) -> Closure:
        def closure(member: int, row: list[Tensor]) -> Tensor:
            one = at.rows(slice(member, member + 1))
            one.weights = {n: w.detach()[None] for n, w in zip(at.weights, row, strict=True)}
            loss, grads = self.execution.backend.gradients(self.task.loss, one)
            if self.pruning is not None:
                grads = {
                    n: g * f[member] if (f := self.pruning.factors.get(n)) is not None else g
                    for n, g in grads.items()
                }
            for w, g in zip(row, grads.values(), strict=True):
                w.grad = g[0]
            return loss[0]

        return closure

    def _record(self, step: int, losses: Tensor, grads: Weights, at: Stand) -> None:
        values = {"loss": losses, "gradient_norm": member_norm(grads)}
        if self.task.metrics is not None:
            with torch.no_grad():
                values |= self.execution.run(self.task.metrics, at, training=False)
        self.population.log.add(step, values, self.active)

    def _look_for_diverged(self, final: bool = False) -> None:
        bad = self.first_bad != NEVER
        if final:
            finite = torch.stack([torch.isfinite(w.flatten(1)).all(1) for w in _rows(self.weights)]).all(0)
            self.first_bad = torch.where(~bad & ~finite, self.population.step, self.first_bad)
            bad = self.first_bad != NEVER
        if not bool(bad.any()):
            return
        for w in self.weights.values():
            w.detach()[bad] = math.nan
        self._retire(bad, self.population.diverged, self.first_bad[bad])

    def _evaluate(self) -> None:
        p = self.population
        if not self.plan.evaluate_on or all(
            f"{name}_loss" in p.log.rows.get(p.step, {}) for name in self.plan.evaluate_on
        ):
            return
        values: dict[str, Tensor] = {}
        for name in self.plan.evaluate_on:
            for told, tensor in self.measure(self.data[name]).items():
                values[f"{name}_{told}"] = tensor
        p.log.add(p.step, values, self.active)
        if self.plan.stop is not None:
            self._maybe_stop(self.plan.stop, values)

    def measure(self, data: Data | None) -> dict[str, Tensor]:
        """Loss and metrics of the active members over a data set, in evaluation mode."""
        with torch.no_grad():
            return self.execution.mean(self._measured, self.weights, self.buffers, data, self.keys)

    def _measured(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        told = {"loss": self.task.loss(module, batch)}
        return told if self.task.metrics is None else told | self.task.metrics(module, batch)

    def _maybe_stop(self, stop: EarlyStopping, values: dict[str, Tensor]) -> None:
        if stop.metric not in values:
            raise LosslabError(
                f"early stopping watches {stop.metric!r} and evaluations give {', '.join(values)}: "
                "pass one of these as metric, and its data in evaluate_on"
            )
        p, best, on = self.population, self.population.best, self.active
        score = values[stop.metric].detach().cpu().double() * (1.0 if stop.minimise else -1.0)
        if not best:
            best["score"] = torch.full((len(p),), math.inf, dtype=torch.float64)
            best["waited"] = torch.zeros(len(p), dtype=torch.int64)
            if stop.restore:
                best |= {f"weights/{n}": w.detach().cpu().clone() for n, w in p.points.weights.items()}
                best |= {f"buffers/{n}": b.detach().cpu().clone() for n, b in p.points.buffers.items()}
        better = score < best["score"][on] - stop.least
        best["score"][on] = torch.where(better, score, best["score"][on])
        best["waited"][on] = torch.where(better, 0, best["waited"][on] + 1)
        if stop.restore:
            for kind, tensors in (("weights", self.weights), ("buffers", self.buffers)):
                for name, tensor in tensors.items():
                    best[f"{kind}/{name}"][on[better]] = tensor.detach().cpu()[better]
        if stop.patience is None:
            return
        ended = best["waited"][on] >= stop.patience
        if bool(ended.any()):
            self._retire(ended, p.stopped, p.step)

    # -- disk ------------------------------------------------------------------------------------------

    def _prepare_folder(self, resume: bool) -> dict[str, Any] | None:
        """Checks the folder and, when resuming, restores the population; returns the saved execution."""
        if self.out is None:
            if resume:
                raise LosslabError("resume was asked for without a folder: pass out=")
            return None
        folder = self.out / "checkpoints"
        found = checkpoints.newest(folder) if folder.is_dir() else None
        if found is not None and not resume:
            raise LosslabError(
                f"{self.out} already holds a run: resume it (resume=True, --resume), or pass another folder"
            )
        if found is None:
            if any((self.out / name).exists() for name in ("population.safetensors", "history.parquet")):
                # Its checkpoints may have been deleted to save space: what came of it is still there.
                raise LosslabError(
                    f"{self.out} already holds the outcome of a run, and no checkpoint to go on from: pass "
                    "another folder, or move its population.safetensors and history.parquet away"
                )
            if resume:
                self.population.notices.append(f"{self.out} holds no run to resume: a new one was started")
            checkpoints.write(self.out / "start.safetensors", {}, self.population.meta())
            return None
        tensors, meta, problems = found
        self.population.restore(tensors, meta)
        self.population.notices += [f"{problem}; an older checkpoint was used" for problem in problems]
        return meta["execution"]

    def _checkpoint(self) -> None:
        assert self.out is not None
        self._store()
        p = self.population
        checkpoints.save_step(self.out / "checkpoints", p.step, p.tensors(), p.meta())

    def _finish(self) -> None:
        p, stop = self.population, self.plan.stop
        if self.out is not None:
            self._checkpoint()
        if stop is not None and stop.restore is True and p.best:
            self._restore_best()
        if self.out is not None:
            p.save(self.out / "population.safetensors")
            write_history(p, self.out)

    def _restore_best(self) -> None:
        p = self.population
        kept = torch.isfinite(p.best["score"]) & (p.diverged == NEVER)
        for kind, tensors in (("weights", p.points.weights), ("buffers", p.points.buffers)):
            for name, tensor in tensors.items():
                tensor[kept.to(tensor.device)] = p.best[f"{kind}/{name}"][kept].to(tensor.device)

    def _choose(self) -> Execution:
        at = self._stand(0, randomness.fold(self.keys, 0))
        last = self._stand(self.population.per_epoch - 1, at.keys)
        if last.examples < at.examples and self.plan.steps >= self.population.per_epoch:
            try:
                LoopBackend(self.template).gradients(self.task.loss, last.rows(slice(0, 1)).sheltered())
            except Exception as error:  # the user's code: batch norm refuses a single example
                number = "1 example" if last.examples == 1 else f"{last.examples} examples"
                raise LosslabError(
                    f"an epoch's last batch has {number} and there the loss fails ({first_line(error)}): "
                    "leave that batch out with drop_last (--drop-last), or take another batch size"
                ) from error
        return choose(self.plan.execution, self.template, self.task.loss, at, self.plan.memory)


def _rows(weights: Stack) -> list[Tensor]:
    return [w.detach() if w.dim() > 1 else w.detach()[:, None] for w in weights.values()]


def write_history(population: Population, folder: Path) -> None:
    """Writes the history as ``history.parquet``, atomically."""
    buffer = io.BytesIO()
    population.history.to_parquet(buffer, index=False)
    write_atomically(folder / "history.parquet", buffer.getvalue())
