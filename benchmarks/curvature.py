"""Curvature against PyHessian, curvlinops with scipy's eigsh, and hessian-eigenthings, at equal accuracy."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losslab
from benchmarks.measure import Row, interleaved
from losslab.curvature import Hessian, density, eigenpairs, trace
from losslab.engine import Objective, Points
from losslab.tasks import Data, mlp, resnet20

ACCURACY = 1e-3
"""True residual, relative to the largest eigenvalue, that every eigenpair of every contender must have."""

PAIRS = 5
PROBES, STEPS = 4, 40
ROUNDS = 3
PATIENCE = 8
"""Times our seconds after which PyHessian is given up on a ResNet."""

Pairs = tuple[Tensor, Tensor]


@dataclass
class Place:
    """A trained network and the examples that its loss is measured on."""

    name: str
    task: losslab.Task
    module: nn.Module
    batch: tuple[Tensor, Tensor]
    points: Points = field(init=False)

    def __post_init__(self) -> None:
        self.points = Points.from_modules([self.module])

    def hessian(self, strategy: str = "auto") -> Hessian:
        """A fresh operator: nothing is kept from an earlier call."""
        return Hessian(Objective(self.task, batch_norm="running"), self.points, strategy=strategy)

    def network(self) -> nn.Module:
        """The network for a peer: a copy, in the only mode that all peers can measure in."""
        return copy.deepcopy(self.module).eval()


def mlp_place(folder: str | None) -> Place:
    """784-300-100-10 tanh after 200 steps of Adam on 4096 MNIST images."""
    return _trained("MLP", mlp(784, 300, 100, 10, activation="tanh"), "mnist", folder, 4096, (784,))


def resnet_place(folder: str | None) -> Place:
    """ResNet-20 after 200 steps of Adam on 2000 CIFAR-10 images."""
    return _trained("ResNet-20", resnet20(), "cifar10", folder, 2000, (3, 32, 32))


def _trained(
    name: str,
    model: Callable[[], nn.Module],
    source: str,
    folder: str | None,
    examples: int,
    shape: tuple[int, ...],
) -> Place:
    if folder is not None and (Path(folder) / source).exists():
        data = getattr(losslab.tasks, source)(folder).train.head(examples)
    else:
        g = torch.Generator().manual_seed(0)
        data = Data.of(
            (torch.randn(examples, *shape, generator=g), torch.randint(0, 10, (examples,), generator=g))
        )
    task = losslab.supervised(model, data, name=name)
    found = losslab.train(
        task, losslab.rules.Adam(lr=1e-3), steps=200, batch_size=128, evaluate=None, progress=False
    )
    return Place(name, task, found[0], data.all())


# -- the contenders: each gives values [k] and vectors [P, k] ----------------------------------------------


def ours(place: Place, second_look: bool) -> Pairs:
    """This library, from nothing."""
    found = eigenpairs(place.hessian(), PAIRS, second_look=second_look)
    return found.values, found.vectors


def pyhessian(place: Place, tol: float) -> Pairs:
    """Power iteration with deflation on a kept graph."""
    from pyhessian import hessian

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        computed = hessian(place.network(), nn.CrossEntropyLoss(), data=place.batch, cuda=False)
        values, vectors = computed.eigenvalues(maxIter=2000, tol=tol, top_n=PAIRS)
    columns = [torch.cat([part.flatten() for part in vector]) for vector in vectors]
    return torch.tensor(values, dtype=torch.float64), torch.stack(columns, dim=1)


def curvlinops(place: Place, tol: float) -> Pairs:
    """Eigsh of scipy on curvlinops' Hessian."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    network = place.network()
    matrix = HessianLinearOperator(network, nn.CrossEntropyLoss(), list(network.parameters()), [place.batch])
    values, vectors = eigsh(matrix.to_scipy(), k=PAIRS, which="LA", tol=tol)
    return torch.as_tensor(values), torch.as_tensor(vectors)


def eigenthings(place: Place) -> None:
    """The density by hessian-eigenthings."""
    from hessian_eigenthings import HessianOperator, spectral_density, supervised_loss

    matrix = HessianOperator(place.network(), [place.batch], supervised_loss(F.cross_entropy))
    spectral_density(matrix, num_runs=PROBES, lanczos_steps=STEPS, num_grid_points=400)


# -- rows ----------------------------------------------------------------------------------------------------


def products(place: Place, rounds: int = 10, barred: bool = True) -> list[Row]:
    """A product against a gradient, on the kept graph and recomputed.

    The bars are the MLP's: its first layer, most of the work, has no gradient in its input. A convolution in
    the middle takes three convolutions for a gradient and six for a product even on a kept graph.
    """
    vector = torch.randn(place.points.parameters, generator=torch.Generator().manual_seed(0))
    kept, recomputed = place.hessian("kept"), place.hessian("recomputed")
    module, (x, y) = place.network(), place.batch
    weights = list(module.parameters())
    seconds = interleaved(
        {
            "gradient": lambda: torch.autograd.grad(F.cross_entropy(module(x), y), weights),
            "kept": lambda: kept @ vector,
            "recomputed": lambda: recomputed @ vector,
        },
        rounds,
        warmup=1,
    )
    rows = []
    for name, bar in (("kept", 1.4), ("recomputed", 2.3)):
        ratio = seconds[name] / seconds["gradient"]
        told = f"{ratio:.2f} gradients ({1e3 * seconds[name]:.0f} ms)"
        wanted = (f"<= {bar}", ratio <= bar) if barred else ("", None)
        rows.append(Row(f"{place.name}: a product, graph {name}", told, *wanted))
    return rows


def worst(place: Place, pairs: Pairs) -> float:
    """The largest true residual of eigenpairs, relative to the largest eigenvalue."""
    values, vectors = pairs[0], pairs[1].float()
    residuals = place.hessian() @ vectors - vectors * values.float()
    return float(residuals.norm(dim=0).max() / values.max())


def equally_accurate(place: Place, contender: Callable[[Place, float], Pairs]) -> float:
    """The loosest tolerance at which a contender meets the accuracy."""
    for tol in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        if worst(place, contender(place, tol)) <= ACCURACY:
            return tol
    raise RuntimeError(f"{contender.__name__} does not reach {ACCURACY} on {place.name}")


def largest(place: Place, rounds: int = ROUNDS) -> list[Row]:
    """The five largest eigenpairs by default, with the second look for copies that no peer takes."""
    for second_look in (False, True):
        assert worst(place, ours(place, second_look)) <= ACCURACY
    tols = {
        "PyHessian": equally_accurate(place, pyhessian),
        "curvlinops": equally_accurate(place, curvlinops),
    }
    seconds = interleaved(
        {
            "ours": lambda: ours(place, True),
            "one look": lambda: ours(place, False),
            "PyHessian": lambda: pyhessian(place, tols["PyHessian"]),
            "curvlinops": lambda: curvlinops(place, tols["curvlinops"]),
        },
        rounds,
        warmup=0,
    )
    what = f"{place.name}: {PAIRS} largest eigenpairs"
    rows = [Row(what, f"{seconds['ours']:.2f} s, {seconds['one look']:.2f} s without the second look")]
    for peer, bar in (("PyHessian", 6.0), ("curvlinops", 3.0)):
        ratios = [seconds[peer] / seconds[name] for name in ("ours", "one look")]
        theirs = f"{seconds[peer]:.1f} s, tol {tols[peer]:g}"
        told = f"{ratios[0]:.1f} times faster, {ratios[1]:.1f} without it ({theirs})"
        rows.append(Row(f"  against {peer}", told, f">= {bar:g} times", ratios[0] >= bar))
    return rows


def spectrum(place: Place, rounds: int = ROUNDS) -> Row:
    """A density of 4 probes and 40 steps."""
    found = density(place.hessian(), PROBES, STEPS)
    exact = trace(place.hessian(), 60)
    mean = found.moment()
    size = place.points.parameters
    assert float(mean.low) * size <= float(exact.high)
    assert float(exact.low) <= float(mean.high) * size
    seconds = interleaved(
        {
            "ours": lambda: density(place.hessian(), PROBES, STEPS)(),
            "theirs": lambda: eigenthings(place),
        },
        rounds,
        warmup=0,
    )
    ratio = seconds["theirs"] / seconds["ours"]
    told = f"{ratio:.2f} times faster ({seconds['ours']:.1f} s, {seconds['theirs']:.1f} s)"
    what = f"{place.name}: density {PROBES} x {STEPS} against hessian-eigenthings"
    return Row(what, told, ">= 1.8 times", ratio >= 1.8)


# -- memory --------------------------------------------------------------------------------------------------


def resident() -> float:
    """MiB that the process holds now."""
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_of(call: Callable[[], object]) -> float:
    """MiB by which the peak of the resident size rises above what is held before, within this process."""
    from losslab.engine.memory import release_freed_memory

    release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident()
    call()
    with open("/proc/self/status") as told:
        high = next(int(line.split()[1]) / 1024 for line in told if line.startswith("VmHWM"))
    return high - before


def memory(place: Place) -> Row:
    """Peak memory of the eigenpairs against that of a gradient, basis apart."""
    module, (x, y) = place.network(), place.batch
    weights = list(module.parameters())

    def gradient() -> object:
        return torch.autograd.grad(F.cross_entropy(module(x), y), weights)

    gradient()
    few = Place(place.name, place.task.replace(train=place.task.train.head(64)), place.module, place.batch)
    ours(few, True)  # what is loaded once is nobody's
    one = peak_of(gradient)
    whole = peak_of(lambda: ours(place, True))
    basis = (max(4 * PAIRS, PAIRS + 30) + 1) * 4 * place.points.parameters / 2**20
    ratio = (whole - basis) / one
    told = f"{ratio:.1f} gradients ({whole:.0f} MiB, basis {basis:.0f}, a gradient {one:.0f})"
    return Row(
        f"{place.name}: peak memory of the eigenpairs, basis apart", told, "<= 3 gradients", ratio <= 3
    )


def rows(folder: str | None) -> list[Row]:
    """All rows of this suite."""
    place = mlp_place(folder)
    found = [*products(place), *largest(place), spectrum(place)]
    return [*found, memory(place)] if sys.platform == "linux" else found


def residual_rows(folder: str | None) -> list[Row]:
    """ResNet-20, where a product takes seconds and a round minutes: each contender once."""
    place = resnet_place(folder)
    return [*products(place, rounds=3, barred=False), *_once(place)]


def _once(place: Place, tol: float = 1e-1) -> list[Row]:
    """All from nothing; scipy's tolerance is the loosest that does on the MLP."""
    seconds, residuals = {}, {}
    for name, call in (("ours", lambda: ours(place, True)), ("curvlinops", lambda: curvlinops(place, tol))):
        begun = time.perf_counter()
        found = call()
        seconds[name], residuals[name] = time.perf_counter() - begun, worst(place, found)
        print(f"{place.name}: {name} {seconds[name]:.0f} s, residual {residuals[name]:.1e}", file=sys.stderr)
    assert residuals["ours"] <= ACCURACY
    ratio = seconds["curvlinops"] / seconds["ours"]
    equal = "" if residuals["curvlinops"] <= ACCURACY else ", less accurate"
    told = f"{ratio:.1f} times faster ({seconds['curvlinops']:.0f} s{equal})"
    return [
        Row(f"{place.name}: {PAIRS} largest eigenpairs", f"{seconds['ours']:.0f} s"),
        Row("  against curvlinops", told, ">= 3 times", ratio >= 3),
        against_power_iteration(place, seconds["ours"]),
    ]


def against_power_iteration(place: Place, mine: float, tol: float = 1e-6) -> Row:
    """PyHessian at the tolerance that it needs on the MLP, given up after `PATIENCE` times ``mine`` seconds.

    Judged by `PowerIteration.needed`, what it would have taken with the best of all tolerances.
    """
    watch = PowerIteration(PATIENCE * mine)
    try:
        with watch:
            pyhessian(place, tol)
    except TimeoutError:
        pass
    best, ratio = watch.needed(), watch.needed() / mine
    done = "given up" if watch.given_up else "done"
    told = f"{watch.accurate()} of {PAIRS} accurate, {done} after {len(watch.seen)} products"
    told = f"{ratio:.1f} times faster ({best:.0f} s: {told}, {watch.seconds[-1]:.0f} s)"
    more = "more than " if watch.accurate() < PAIRS else ""
    return Row("  against PyHessian", more + told, ">= 6 times", ratio >= 6)


class PowerIteration:
    """Looks at each of PyHessian's products as it is made, and gives up after a while.

    The residual of an iterate costs nothing once its product is there. PyHessian does not look at it, but at
    how much the value moved; so that its tolerance is not to blame, `needed` counts for each eigenpair only
    the time until its residual was `ACCURACY` and stayed there.
    """

    def __init__(self, limit: float) -> None:
        theirs = importlib.import_module("pyhessian.hessian")  # the name is that of a class, too
        self.theirs, self.limit, self.pair, self.given_up = theirs, limit, 0, False
        self.begun = time.perf_counter()
        self.seen: list[tuple[int, float, float]] = []  # pair, value, residual
        self.seconds: list[float] = []  # since the begin, after each product
        self.product, self.orthogonal = theirs.hessian_vector_product, theirs.orthnormal

    def __enter__(self) -> None:
        self.theirs.hessian_vector_product, self.theirs.orthnormal = self._product, self._orthogonal

    def __exit__(self, *_: object) -> None:
        self.theirs.hessian_vector_product, self.theirs.orthnormal = self.product, self.orthogonal

    def _orthogonal(self, vector: list[Tensor], found: list[list[Tensor]]) -> list[Tensor]:
        self.pair = len(found)
        return list(self.orthogonal(vector, found))

    def _product(self, gradient: object, weights: object, vector: list[Tensor]) -> tuple[Tensor, ...]:
        sent: tuple[Tensor, ...] = self.product(gradient, weights, vector)
        v, hv = (torch.cat([part.flatten() for part in parts]).double() for parts in (vector, sent))
        value = float(v @ hv)
        self.seen.append((self.pair, value, float((hv - value * v).norm())))
        self.seconds.append(time.perf_counter() - self.begun)
        if len(self.seen) % 20 == 0:
            told = f"product {len(self.seen)}, {self.seconds[-1]:.0f} s, {self.accurate()} accurate"
            print(f"PyHessian: pair {self.pair + 1}, {told}", file=sys.stderr)
        if self.seconds[-1] > self.limit:
            self.given_up = True
            raise TimeoutError
        return sent

    def _reached(self) -> dict[int, int]:
        """Pair -> the product whose result was accurate, as all later ones: one before the iterate's own."""
        largest = max(value for _, value, _ in self.seen)
        first, rough = {}, {}
        for k, (pair, _, residual) in enumerate(self.seen):
            first.setdefault(pair, k)
            if residual > ACCURACY * largest:
                rough[pair] = k
        last = {pair: k for k, (pair, _, _) in enumerate(self.seen)}
        return {pair: rough.get(pair, first[pair]) for pair, k in last.items() if k > rough.get(pair, -1)}

    def accurate(self) -> int:
        """Pairs that have become accurate."""
        return len(self._reached())

    def needed(self) -> float:
        """Seconds without the products that a pair went on for after it was accurate."""
        reached = self._reached()
        spent = [b - a for a, b in zip([0.0, *self.seconds], self.seconds, strict=False)]
        return sum(s for k, s in enumerate(spent) if k <= reached.get(self.seen[k][0], k))


__all__ = ["residual_rows", "rows"]
