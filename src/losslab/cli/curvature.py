"""``losslab curvature``: the spectrum of the loss at a point, and what it says about the learning rate."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losslab.cli.runs import saved_points
from losslab.cli.terminal import printed, terminal
from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group
    from rich.table import Table

    from losslab.cli.commands import Curvature
    from losslab.curvature import Density, Eigenpairs, Limit, Operator
    from losslab.engine import Points
    from losslab.tasks import Task

DESCENT = ("gd", "sgd")
"""Rules whose rate the stability limit of gradient descent speaks of."""

BY_LAYER = "Layer by layer, the others held"

BARS = 12
"""Rows of the printed density."""


def curvature(command: Curvature) -> None:
    """Measures, prints the tables and the sentences, writes the page."""
    from losslab import curvature as room
    from losslab.engine import Objective
    from losslab.tasks import load_task

    if command.examples is not None and command.examples < 1:
        raise LosslabError(f"--examples is {command.examples}: pass at least 1")
    if command.lr is not None and not 0 < command.lr < float("inf"):
        raise LosslabError(f"--lr is {command.lr:g}: pass a learning rate above 0")
    task = load_task(command.task, folder=command.data)
    points, rule = start_of(task, command.run_folder, command.member)
    limit = None if command.run_folder is None else saved_limit(command.run_folder, command.member, points)
    data = task.train if task.train is None or command.examples is None else task.train.head(command.examples)
    objective = Objective(task, "train" if data is None else data, batch_norm=command.batch_norm)
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kinds = {"hessian": room.Hessian, "gauss-newton": room.GaussNewton, "fisher": room.EmpiricalFisher}
        operator: Operator = kinds[command.matrix](objective, points.to(dtype=_dtype(command.dtype)))
        k = min(10, operator.size) if command.k is None else command.k
        found = {"largest": room.eigenpairs(operator, k, "largest", tol=command.tol)}
        found["smallest"] = room.eigenpairs(operator, 1, "smallest", tol=command.tol)
        trace = room.trace(operator)
        density = room.density(operator) if command.density else None
        layers = room.by_layer(operator) if command.layers else None
        told = sentences(objective, operator, found, command.lr or _rate(rule))
        if limit is not None and _rate(rule) is None:
            told.append(compared(limit, rule, operator, found["largest"], command.tol))
    for notice in dict.fromkeys([*(str(w.message) for w in caught), *operator.notes]):
        print(f"losslab: {notice}", file=sys.stderr)
    eigenvalues = tabled(found)
    told.append(f"Trace {trace}; {operator.size} weights.")
    console = terminal()
    console.print(printed(eigenvalues, f"{task.name}: {operator.kind}"))
    if density is not None:
        console.print(_bars(density))
    if layers is not None:
        console.print(_layered(layers))
    for sentence in told:
        console.print(f"• {sentence}", highlight=False)
    seconds = time.perf_counter() - begun
    console.print(f"{operator.products} products of the whole, {seconds:.1f} s", style="dim")
    if command.out is not None:
        _write(command, f"{operator.kind} of {task.name}", eigenvalues, density, layers, told)
        console.print(f"open [bold]{command.out}[/bold]")


def start_of(task: Task, run: Path | None, member: int) -> tuple[Points, dict[str, Any]]:
    """The point to look at and the rule that led there: a member of a saved run, or a fresh network."""
    from losslab.engine import Points, checkpoints, randomness
    from losslab.tasks import build

    if run is None:
        with randomness.seeded(member, "init"):
            return Points.from_modules([build(task)]), {}
    saved = saved_points(task, run)
    if not 0 <= member < saved.members:
        raise LosslabError(f"--member is {member} and the run has members 0 to {saved.members - 1}: pass one")
    _, meta = checkpoints.read(_file(run))
    return saved.select([member]), _member_rule(meta, member)


def saved_limit(run: Path, member: int, points: Points) -> Limit | str:
    """Up to which curvature the rule of a saved run is stable where it stands, or why that is not known."""
    from losslab import rules
    from losslab.curvature import limit_of
    from losslab.engine import checkpoints

    tensors, meta = checkpoints.read(_file(run))
    settings = _member_rule(meta, member)
    name = settings.pop("rule")
    try:
        rule = rules.make(name, **settings)
    except LosslabError:
        return "its settings (a schedule, or an optimizer of torch) are not in the file as numbers"
    state: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        group, _, rest = key.partition("/")
        if group == "state":
            slot, _, weight = rest.partition("/")
            state.setdefault(slot, {})[weight] = tensor[[member]] if tensor.dim() else tensor
    state = {slot: {n: ts[n] for n in [*points.weights, ""] if n in ts} for slot, ts in state.items()}
    found = limit_of(rule, state, points, int(meta["step"]))
    if found is None:
        return "for this rule, or before its first step, none is known"
    if found.metric is not None and not bool((found.metric > 0).all()):
        return "its metric is zero where a weight never had a gradient"
    return found


def compared(
    limit: Limit | str, rule: dict[str, Any], operator: Operator, largest: Eigenpairs, tol: float
) -> str:
    """The largest eigenvalue, in the rule's metric if it has one, beside the rule's own stability limit."""
    from losslab.curvature import Preconditioned, eigenpairs

    name = rule["rule"]
    if isinstance(limit, str):
        return f"The stability limit of {name} cannot be told: {limit}."
    most, what = float(limit.most), "The largest eigenvalue"
    if limit.metric is not None:
        if operator.kind != "Hessian":
            return f"The stability limit of {name} speaks of the Hessian: pass --matrix hessian to compare."
        largest = eigenpairs(Preconditioned(operator, limit.metric), 1, tol=tol)
        what = "The largest eigenvalue in the metric D that it divides the gradient by, D^(-1/2) H D^(-1/2),"
    value, error = float(largest.values[0]), float(largest.bounds[0])
    told = f"{what} is {value:.4g} ± {error:.1g}, {value / most:.2g} times its stability limit {most:.4g}"
    sure = "" if bool(largest.converged[0]) else "; the search did not converge"
    return f"Trained by {name} at rate {float(limit.lr):g}. {told} (momentum included){sure}."


def _file(run: Path) -> Path:
    return run / "population.safetensors" if run.is_dir() else run


def _member_rule(meta: dict[str, Any], member: int) -> dict[str, Any]:
    """The rule of one member: its name and settings."""
    return {n: v[member] if isinstance(v, list) else v for n, v in meta["settings"]["rule"].items()}


def sentences(
    objective: Any, operator: Operator, found: dict[str, Eigenpairs], lr: float | None
) -> list[str]:
    """What the numbers mean."""
    from losslab.curvature import stability_sentence

    loss, gradient = objective.gradient(operator.points)
    size = float(gradient.matrix().norm())
    top, low = (float(pairs.values[0]) for pairs in found.values())
    error = float(found["largest"].bounds[0])
    told = [f"Loss {float(loss):.4g}, gradient norm {size:.3g}."]
    limit = f"{2 / top:.4g}" if top > 0 else "infinite"
    if lr is not None:
        told.append(f"For plain gradient descent, {stability_sentence(lr, top, error)}.")
    else:
        told.append(f"The stability limit of plain gradient descent, 2/lambda_max, is {limit}.")
    if low < -float(found["smallest"].bounds[0]):
        told.append(f"The loss bends down along at least one direction: lambda_min = {low:.3g}.")
    told += [f"{which.capitalize()}: {pairs.sentence}." for which, pairs in found.items()]
    return told


def tabled(found: dict[str, Eigenpairs]) -> pd.DataFrame:
    """The eigenvalues, one row each."""
    import pandas as pd

    return pd.concat(
        [
            pd.DataFrame(
                {
                    "end": which,
                    "eigenvalue": pairs.values.tolist(),
                    "error": pairs.bounds.tolist(),
                    "residual": pairs.residuals.tolist(),
                    "converged": ["yes" if c else "no" for c in pairs.converged.tolist()],
                }
            )
            for which, pairs in found.items()
        ],
        ignore_index=True,
    )


def _rate(rule: dict[str, Any]) -> float | None:
    rate = rule.get("lr")
    return float(rate) if rule.get("rule") in DESCENT and isinstance(rate, (int, float)) else None


def _dtype(name: str) -> Any:
    import torch

    from losslab.errors import unknown

    known = ("float32", "float64", "bfloat16")
    if name not in known:
        raise unknown("dtype", name, known)
    return getattr(torch, name)


def _layered(layers: pd.DataFrame) -> Group:
    """The table of layers for the terminal, each number with its error in one column."""
    spread = 0.5 * (layers.trace_high - layers.trace_low)
    errors = {"largest": layers.largest_error, "smallest": layers.smallest_error, "trace": spread}
    shown = layers[["layer", "parameters"]].assign(
        **{n: [f"{v:.4g} ± {e:.1g}" for v, e in zip(layers[n], errors[n], strict=True)] for n in errors},
        converged=["yes" if c else "no" for c in layers.converged],
    )
    return printed(shown, BY_LAYER)


def _bars(density: Density) -> Table:
    """The density in a few rows, each a stretch between the ends."""
    from rich.table import Table

    low, high = float(density.nodes.min()), float(density.nodes.max())
    step = (high - low) / BARS or 1.0
    table = Table("eigenvalues", title="Spectral density", title_justify="left")
    table.add_column("share", justify="right")
    table.add_column(f"{density.level:.0%} interval")
    for i in range(BARS):
        ends = (low + i * step, low + (i + 1) * step)
        edge = ends[1] if i + 1 == BARS else ends[1] - 1e-12 * step
        share = density.share(ends[0] if i else -float("inf"), edge if i + 1 < BARS else float("inf"))
        told = f"{float(share.low):.2%} to {float(share.high):.2%}"
        table.add_row(f"{ends[0]:.3g} to {ends[1]:.3g}", f"{float(share.value):.3%}", told)
    return table


def _write(
    command: Curvature,
    title: str,
    eigenvalues: pd.DataFrame,
    density: Density | None,
    layers: pd.DataFrame | None,
    told: list[str],
) -> None:
    from losslab import provenance
    from losslab.report import write_page
    from losslab.report.curvature import draw_curvature

    assert command.out is not None
    settings = {k: v for k, v in asdict(command).items() if v is not None and k != "out"}
    tables = {"Eigenvalues": eigenvalues}
    if layers is not None:
        tables[BY_LAYER] = layers
    write_page(
        Path(command.out),
        title[0].upper() + title[1:],
        "How the loss bends around a point: the ends of the spectrum with the error of each eigenvalue.",
        draw_curvature(eigenvalues, density, layers),
        told,
        tables,
        settings | provenance.machine(),
        heading="What was found",
    )
