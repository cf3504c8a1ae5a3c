"""Slices, elastic bands and curves against doing one point, one image, one pair at a time."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losslab
from benchmarks.measure import Row, interleaved
from losslab.paths import Landscape, Slopes, measure_slice, relax, stretched, train_curves
from losslab.tasks import digits_task, lenet_300_100, mnist_task, supervised

SIDE = 51
FEW = 4  # points a side that the peer is timed on
IMAGES, STEPS = 15, 60
BATCH = 32  # of the band and the curves, as in training
PAIRS = list(combinations(range(5), 2))


def rows(folder: str | None) -> list[Row]:
    """All rows of this suite."""
    return [*plane(folder), band(), band(128), curves()]


def plane(folder: str | None) -> list[Row]:
    """A plane of LeNet-300-100 on 10,000 images: one pass for all points against one a point."""
    draw = torch.Generator().manual_seed(0)
    if folder is not None:
        task = mnist_task(lenet_300_100(), folder=folder)
    else:
        x, y = torch.randn(10_000, 784, generator=draw), torch.randint(0, 10, (10_000,), generator=draw)
        task = supervised(lenet_300_100(), (x, y), test=(x, y))
    networks = [task.model() for _ in range(3)]
    assert task.test is not None
    x, y = task.test.all()
    # Their plane has no orthonormal basis, so ours is laid along their directions.
    where = losslab.paths.along(networks[0], _directions(networks))
    axis = torch.arange(SIDE, dtype=torch.float64) / SIDE
    landscape = Landscape(task, ["test"], execution="stacked")
    whole = interleaved({"ours": lambda: measure_slice(landscape, where, axis, axis)}, 3, 1)["ours"]
    told = [Row(f"  plane {SIDE} x {SIDE}, LeNet-300-100, 10,000 images", f"{whole:.1f} s")]
    other, name = _peer(networks, x, y)
    theirs = interleaved({"theirs": lambda: other(FEW)}, 3, 1)["theirs"] / FEW**2
    ratio = theirs / (whole / SIDE**2)
    told.append(Row(f"  a point against {name}", f"{ratio:.1f}x", ">= 6", ratio >= 6))
    found = torch.as_tensor(other(FEW))
    ours = landscape.along(where.frame, where.coefficients(_places(FEW, name)))["test_loss"]
    gap = float((found.flatten() - ours).abs().max())
    told.append(Row("  and the largest difference in loss", f"{gap:.1e}", "<= 1e-5", gap <= 1e-5))
    return told


def _places(side: int, peer: str) -> Tensor:
    """Where the peer's values stand, ``[side * side, 2]``, in shares of the directions.

    loss-landscapes steps before it looks and runs every second row backwards, so that even rows stand one
    step further along the second direction than their indices say, and odd rows do not.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    shift = (rows % 2 == 0).long() if peer == "loss-landscapes" else 0
    return torch.stack([rows, columns + shift], -1).reshape(-1, 2).double() / SIDE


def _directions(networks: list[nn.Module]) -> Tensor:
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in networks]
    return torch.stack([flat[1] - flat[0], flat[2] - flat[0]])


def _peer(networks: list[nn.Module], x: Tensor, y: Tensor) -> tuple[Callable[[int], Any], str]:
    """Losses on the first points of the plane: by loss-landscapes if it is here, else as it goes about it."""
    ways = _directions(networks) / SIDE

    def moved(module: nn.Module, way: Tensor) -> None:
        place = 0
        for p in module.parameters():
            p.data.add_(way[place : place + p.numel()].view_as(p))
            place += p.numel()

    def loop(side: int) -> Tensor:
        found = torch.empty(side, side, dtype=torch.float64)
        for i in range(side):
            for j in range(side):
                module = copy.deepcopy(networks[0])
                moved(module, i * ways[0] + j * ways[1])
                with torch.no_grad():
                    found[i, j] = F.cross_entropy(module(x), y)
        return found

    if importlib.util.find_spec("loss_landscapes") is None:
        return loop, "a loop over points"
    import loss_landscapes
    from loss_landscapes.metrics import Loss

    def peer(side: int) -> Tensor:
        # The ends it wants are as many steps away as it is to make. It moves the weights of what it is given.
        ends = [copy.deepcopy(networks[0]) for _ in range(2)]
        for end, way in zip(ends, ways, strict=True):
            moved(end, side * way)
        with torch.no_grad():
            return loss_landscapes.planar_interpolation(
                networks[0], ends[0], ends[1], Loss(F.cross_entropy, x, y), side, deepcopy_model=True
            )

    return peer, "loss-landscapes"


def _networks() -> losslab.Population:
    return losslab.train(
        digits_task(), "adam", seeds=5, epochs=5, evaluate=None, execution="stacked", progress=False
    )


def band(batch: int = BATCH) -> Row:
    """An elastic band of 15 images against a loop over its images."""
    population = _networks()
    slopes = Slopes(population.task, batch, execution="stacked", module=population.template)
    bands = stretched(population.points, [(0, 1)], IMAGES)
    x, y = population.task.train.all()  # type: ignore[union-attr]
    images = [copy.deepcopy(population.template) for _ in range(IMAGES)]
    for k, image in enumerate(images):
        bands[0].images.load_into(image, k)
    optimizers = [torch.optim.Adam(image.parameters(), lr=0.01, fused=True) for image in images[1:-1]]

    def loop() -> None:
        for step in range(STEPS):
            index = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:batch]
            _step(images, optimizers, x[index], y[index])

    seconds = interleaved({"ours": lambda: relax(slopes, bands, steps=STEPS), "loop": loop}, 9)
    ratio = seconds["loop"] / seconds["ours"]
    what = f"  band of {IMAGES} images, digits 64-32-10, batch {batch}, against a loop over images"
    if batch != BATCH:
        return Row(what, f"{ratio:.1f}x")
    return Row(what, f"{ratio:.1f}x", ">= 5", ratio >= 5)


def _step(images: list[nn.Module], optimizers: list[Any], x: Tensor, y: Tensor) -> None:
    """One step of a springless band, image by image."""
    losses = []
    for image in images:
        image.zero_grad()
        loss = F.cross_entropy(image(x), y)
        loss.backward()
        losses.append(loss.detach())
    flat = [torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in images]
    for k in range(1, len(images) - 1):
        tangent = flat[k + 1] - flat[k] if losses[k + 1] > losses[k - 1] else flat[k] - flat[k - 1]
        tangent = tangent / tangent.norm()
        own = list(images[k].parameters())
        slope = torch.cat([p.grad.flatten() for p in own])  # type: ignore[union-attr]
        slope = slope - (slope @ tangent) * tangent
        for p, part in zip(own, slope.split([p.numel() for p in own]), strict=True):
            p.grad = part.view_as(p)
        optimizers[k - 1].step()
    flat = [torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in images]
    steps = torch.stack([(b - a).norm() for a, b in pairwise(flat)])
    places = torch.cat([torch.zeros(1), steps.cumsum(0)])
    for k in range(1, len(images) - 1):
        goal = places[-1] * k / (len(images) - 1)
        right = min(max(int(torch.searchsorted(places, goal)), 1), len(images) - 1)
        share = (goal - places[right - 1]) / (places[right] - places[right - 1])
        moved = torch.lerp(flat[right - 1], flat[right], share)
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(moved, images[k].parameters())


def curves() -> Row:
    """Curves of ten pairs trained together against one pair after another."""
    population = _networks()
    slopes = Slopes(population.task, BATCH, module=population.template)

    def trained(pairs: list[tuple[int, int]]) -> None:
        train_curves(slopes, population.points, pairs, steps=STEPS)

    seconds = interleaved(
        {"together": lambda: trained(PAIRS), "apart": lambda: [trained([pair]) for pair in PAIRS]}, 7
    )
    ratio = seconds["apart"] / seconds["together"]
    what = f"  curves of {len(PAIRS)} pairs, digits 64-32-10, against one after another"
    return Row(what, f"{ratio:.1f}x", ">= 4", ratio >= 4)
