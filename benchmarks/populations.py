"""A population against a loop over torch's fused Adam, and against JAX's jit(scan(vmap(step)))."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import losslab
from benchmarks.measure import Row, child, interleaved
from losslab.engine.plan import Plan
from losslab.engine.trainer import Trainer
from losslab.engine.training import born
from losslab.rules import Adam
from losslab.tasks import mlp
from losslab.tasks.models import Factory


@dataclass(frozen=True)
class Case:
    """One population: its network, data, members, batch, and the ratio to the loop that is wanted."""

    name: str
    widths: tuple[int, ...]
    members: int
    batch: int
    ratio: float
    steps: int
    mnist: bool = False
    batch_norm: bool = False

    def network(self) -> Factory:
        """The network of a member."""
        return mlp(*self.widths, batch_norm=self.batch_norm)


CASES = (
    Case("digits 64-32-10", (64, 32, 10), 64, 32, 25.0, 40),
    Case("digits 64-64-64-10", (64, 64, 64, 10), 64, 64, 8.0, 30),
    Case("MNIST LeNet-300-100", (784, 300, 100, 10), 15, 60, 1.5, 12, mnist=True),
)


def rates(members: int) -> list[float]:
    """A rate for each member, 1e-4 to 1e-2."""
    return torch.logspace(-4, -2, members, dtype=torch.float64).tolist()


def task_of(case: Case, folder: str | None) -> losslab.Task:
    """The task; MNIST comes from the folder, or is replaced by noise of its shape where there is none."""
    if not case.mnist:
        return losslab.tasks.digits_task(case.network())
    if folder is not None:
        return losslab.tasks.mnist_task(case.network(), folder=folder)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60000, 784, generator=draw)
    return losslab.supervised(case.network(), (x, torch.randint(0, 10, (60000,), generator=draw)))


def trainer_of(case: Case, task: losslab.Task, dtype: torch.dtype = torch.float32) -> Trainer:
    """The population, ready to step; nothing is recorded on the way."""
    plan = Plan(
        steps=10**9,
        batch_size=case.batch,
        dtype=dtype,
        record=10**9,
        evaluate=None,
        execution="stacked",
    )
    population = born(task, Adam(lr=rates(case.members)), plan, list(range(case.members)))
    return Trainer(population, None, False, 1e9)


class TorchLoop:
    """The same members as ordinary modules, one after another, each with its own fused Adam."""

    def __init__(self, case: Case, trainer: Trainer) -> None:
        population = trainer.population
        self.modules = [m.train() for m in population]
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=lr, fused=True)
            for m, lr in zip(self.modules, rates(case.members), strict=True)
        ]
        self.data = trainer.data["train"]
        assert trainer.batches is not None
        self.batches = trainer.plan.batches(len(population.task.train), population.seeds)
        self.done = 0

    def step(self) -> list[Tensor]:
        """One update of each member on its own batch."""
        index = self.batches.at(self.done)
        self.done += 1
        losses = []
        for i, (module, optimizer) in enumerate(zip(self.modules, self.optimizers, strict=True)):
            x, y = self.data.take(index[i])
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses


def jax_runner(case: Case, trainer: Trainer) -> Callable[[], object] | None:
    """``case.steps`` steps of JAX and optax on the same weights, rates and batches; None without JAX."""
    if case.batch_norm:
        return None
    try:
        import jax
        import jax.numpy as jnp
        import optax
    except ImportError:
        return None
    data = trainer.data["train"]
    x, y = (jnp.asarray(t.numpy()) for t in data.all())
    layers = [n for n in trainer.weights if n.endswith("weight")]
    params = [
        (
            jnp.asarray(trainer.weights[n].mT.contiguous().numpy()),
            jnp.asarray(trainer.weights[n[:-6] + "bias"].numpy()),
        )
        for n in layers
    ]
    optimizer = optax.scale_by_adam()

    def loss_of(p, xs, ys):
        for k, (w, b) in enumerate(p):
            xs = xs @ w + b
            xs = jax.nn.relu(xs) if k < len(p) - 1 else xs
        return optax.softmax_cross_entropy_with_integer_labels(xs, ys).mean()

    def step(p, s, rows, lr):
        loss, g = jax.value_and_grad(loss_of)(p, x[rows], y[rows])
        u, s = optimizer.update(g, s, p)
        return jax.tree.map(lambda a, b: a - lr * b, p, u), s, loss

    lr = jnp.asarray(rates(case.members), dtype=jnp.float32)
    many = jax.jit(
        lambda carry, rows: jax.lax.scan(
            lambda c, r: (lambda p, s, loss: ((p, s), loss))(*jax.vmap(step)(c[0], c[1], r, lr)), carry, rows
        ),
        donate_argnums=0,
    )
    batches = trainer.plan.batches(len(data), trainer.population.seeds)
    state = {"carry": (params, jax.vmap(optimizer.init)(params)), "done": 0, "losses": None}

    def run() -> object:
        first = state["done"]
        rows = torch.stack([batches.at(k) for k in _full(batches, first, case.steps)]).numpy()
        state["done"] = first + case.steps
        state["carry"], losses = many(state["carry"], rows)
        state["losses"] = jax.block_until_ready(losses)
        return state["losses"]

    return run


def _full(batches: losslab.engine.Batches, first: int, count: int) -> list[int]:
    """Steps from ``first`` on, without ragged last batches: a compiled program needs one size."""
    whole = batches.examples // batches.batch_size
    return [(k // whole) * batches.per_epoch + k % whole for k in range(first, first + count)]


def assert_equal(case: Case, task: losslab.Task) -> float:
    """Ten steps of losslab and of the loop in float64: the largest relative difference of a weight."""
    trainer = trainer_of(case, task, torch.float64)
    loop = TorchLoop(case, trainer)
    for _ in range(10):
        trainer.step()
        loop.step()
    worst = 0.0
    for i, module in enumerate(loop.modules):
        for name, weight in module.named_parameters():
            ours = trainer.weights[name][i]
            worst = max(worst, float((ours - weight.detach()).norm() / weight.detach().norm()))
    assert worst < 1e-8, f"{case.name}: losslab and the loop differ by {worst:.1e}"
    return worst


def gradients_apart(case: Case, task: losslab.Task) -> float:
    """The first gradients in float32, as they are timed: the largest difference beside a member's whole.

    Not a trajectory: Adam makes steps of full size of what is zero but for rounding.
    """
    trainer = trainer_of(case, task)
    loop = TorchLoop(case, trainer)
    ours = trainer.execution.gradients(task.loss, trainer._stand(0, trainer.keys))[1]
    loop.step()
    worst = 0.0
    for i, module in enumerate(loop.modules):
        theirs = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        whole = torch.stack([g.norm() for g in theirs.values()]).norm()
        worst = max(worst, *(float((ours[n][i] - g).norm() / whole) for n, g in theirs.items()))
    assert worst < 1e-5, f"{case.name}: in float32 gradients of losslab and the loop differ by {worst:.1e}"
    return worst


def measure(case: Case, folder: str | None) -> list[Row]:
    """The rows of one case."""
    task = task_of(case, folder)
    worst, apart = assert_equal(case, task), gradients_apart(case, task)
    trainer = trainer_of(case, task)
    loop, jax = TorchLoop(case, trainer), jax_runner(case, trainer)
    if jax is not None:
        first = torch.as_tensor(jax().__array__().copy())[0]
        check = trainer_of(case, task)
        assert torch.allclose(first, check.step(), rtol=1e-4), f"{case.name}: JAX starts from another loss"
    loop_steps = max(1, case.steps // 8)
    contenders: dict[str, Callable[[], object]] = {
        "losslab": lambda: [trainer.step() for _ in range(case.steps)],
        "loop": lambda: [loop.step() for _ in range(loop_steps)],
    }
    if jax is not None:
        contenders["jax"] = jax
    seconds = interleaved(contenders)
    each = {
        name: 1e3 * s / case.members / (loop_steps if name == "loop" else case.steps)
        for name, s in seconds.items()
    }
    ratio = each["loop"] / each["losslab"]
    rows = [
        Row(
            f"{case.name}, {case.members} members, batch {case.batch}",
            f"{each['losslab']:.4f} ms a member-step",
        ),
        Row("  equal to the loop after 10 steps, float64", f"{worst:.0e}", "< 1e-8", worst < 1e-8),
        Row("  its first gradients, float32", f"{apart:.0e}", "< 1e-5", apart < 1e-5),
        Row(
            f"  against the fused loop ({each['loop']:.3f} ms)",
            f"{ratio:.2f} times",
            f">= {case.ratio:g}",
            ratio >= case.ratio,
        ),
    ]
    if jax is not None:
        ahead = each["jax"] / each["losslab"]
        rows.append(
            Row(
                f"  against JAX + optax ({each['jax']:.4f} ms)",
                f"{ahead:.2f} times",
                ">= 1 (level: 0.95)",
                ahead >= 0.95,
            )
        )
    return rows


MEMORY = """
import sys
from benchmarks.populations import CASES, task_of, trainer_of
case = CASES[2]
trainer = trainer_of(case, task_of(case, sys.argv[1] or None))
for _ in range(50):
    trainer.step()
"""


def memory(folder: str | None) -> list[Row]:
    """Peak resident size of the LeNet population, data and torch included."""
    _, peak = child(MEMORY, folder or "")
    return [Row("LeNet-300-100, 15 members: peak memory", f"{peak / 1024:.2f} GiB", "< 1.5 GiB", peak < 1536)]


def rows(folder: str | None) -> list[Row]:
    """All rows of this suite."""
    return [row for case in CASES for row in measure(case, folder)] + memory(folder)
