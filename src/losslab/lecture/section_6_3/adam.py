"""C28: what Adam's update is made of. `CLAIMS` also lists C29 to C32, which lie in the files beside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losslab.engine import cross
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, agreement
from losslab.lecture.figures import colour, contours_with_paths, figure, lines, reference
from losslab.lecture.section_6_3.adam_convergence import C31
from losslab.lecture.section_6_3.adam_practice import C29, C30
from losslab.lecture.section_6_3.adam_race import MEASURES, Arm, Budget, digits, finals, last, race, trained
from losslab.lecture.section_6_3.adam_remedies import C32
from losslab.lecture.statistics import fit_power_law, max_relative_error
from losslab.lecture.tuning import rates
from losslab.lecture.verdicts import count, identity, law, paired
from losslab.rules import GD, AdaGrad, Adam, AdamNC, Momentum, RMSProp, Rule
from losslab.rules.schedules import inverse_sqrt
from losslab.tasks import digits_task, rosenbrock

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

PARTS = "Adam's step is momentum's average over the root of RMSProp's"
TORCH = "with bias correction and ε it is torch.optim.Adam"
NO_MOMENTUM = "with β₁ = 0 it is RMSProp with bias correction"
ADAGRAD = "with β₁ = 0, β₂ = 1 − 1/t and α/√t it is AdaGrad"
PRINTED = "the update as printed is torch.optim.Adam"
TUNED = "bias correction lowers the training loss"
WITH, WITHOUT = "with correction", "without correction"
FORMS = {WITH: "kingma-ba", WITHOUT: "uncorrected"}
BUDGET = Budget(10, 64)


def run(rule: Rule, gradients: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A rule from x = 0 on given gradients ``[T, N, d]``: the points and the state slots after each step."""
    weights = {"x": torch.zeros_like(gradients[0])}
    state = rule.init(weights)
    path, slots = [], []
    for step, g in enumerate(gradients):
        weights, state = rule.update({"x": g}, state, weights, step)
        path.append(weights["x"])
        slots.append({name: tensors["x"] for name, tensors in state.items()})
    return torch.stack(path), {name: torch.stack([s[name] for s in slots]) for name in slots[0]}


def _torch_adam(gradients: Tensor, lr: Tensor, beta1: Tensor, beta2: Tensor) -> Tensor:
    points = [torch.zeros_like(g, requires_grad=True) for g in gradients[0]]
    groups = [
        {"params": [p], "lr": rate, "betas": betas}
        for p, rate, *betas in zip(points, lr.tolist(), beta1.tolist(), beta2.tolist(), strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    path = []
    for row in gradients:
        for p, g in zip(points, row, strict=True):
            p.grad = g.clone()
        optimizer.step()
        path.append(torch.stack([p.detach().clone() for p in points]))
    return torch.stack(path)


def identities(instances: int = 100, steps: int = 100, dimension: int = 4, seed: int = 0) -> pd.DataFrame:
    """Pairs of trajectories that should be one, on random gradients, rates and decays, a row an instance.

    The error is the largest difference of the two trajectories in units of their largest entry. The scale of
    the gradients varies from 1e-3 to 1e3 between coordinates.
    """
    import pandas as pd

    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    scale = 10 ** draw(-3, 3, instances, dimension)
    gradients = scale * torch.randn(steps, instances, dimension, generator=generator, dtype=torch.float64)
    lr, beta1, beta2 = 10 ** draw(-4, -1, instances), draw(0, 0.99, instances), draw(0.9, 0.9999, instances)
    sides = _sides(gradients, lr, beta1, beta2)
    return pd.DataFrame(
        [
            (name, i, max_relative_error(a[:, i].numpy(), b[:, i].numpy()))
            for name, a, b in sides
            for i in range(instances)
        ],
        columns=["identity", "instance", "error"],
    )


def _sides(g: Tensor, lr: Tensor, beta1: Tensor, beta2: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each identity's name and two trajectories."""
    column = (slice(None), None)
    printed, _ = run(Adam(lr=lr, beta1=beta1, beta2=beta2, variant="lecture"), g)
    paper, _ = run(Adam(lr=lr, beta1=beta1, beta2=beta2), g)
    official = _torch_adam(g, lr, beta1, beta2)
    sums, squares = run(Momentum(lr=lr, beta=beta1), g)[1]["b"], run(RMSProp(lr=lr, beta=beta2), g)[1]["v"]
    yield PARTS, printed, -(lr[column] * (1 - beta1[column]) * sums / squares.sqrt()).cumsum(0)
    yield TORCH, paper, official
    corrected = RMSProp(lr=lambda step: lr * (1 - beta2 ** (step + 1)).sqrt(), beta=beta2, eps=0.0)
    yield NO_MOMENTUM, run(Adam(lr=lr, beta1=0.0, beta2=beta2, eps=0.0), g)[0], run(corrected, g)[0]
    adagrad, _ = run(AdaGrad(lr=lr, eps=0.0), g)
    yield ADAGRAD, run(AdamNC(lr=inverse_sqrt(lr.tolist()), beta1=0.0, eps=0.0), g)[0], adagrad
    yield PRINTED, printed, official


def limit(instances: int = 200, steps: int = 50, seed: int = 1) -> pd.DataFrame:
    """How far Adam with beta1 = 0 and alpha/sqrt(t) is from AdaGrad where 1 - beta2 is small."""
    import pandas as pd

    generator = torch.Generator().manual_seed(seed)
    gap = 10 ** (-8 + 5 * torch.rand(instances, generator=generator, dtype=torch.float64))
    g = torch.randn(steps, instances, 4, generator=generator, dtype=torch.float64)
    lr = inverse_sqrt(0.1)
    adam, _ = run(Adam(lr=lr, beta1=0.0, beta2=1 - gap, eps=0.0), g)
    adagrad, _ = run(AdaGrad(lr=0.1, eps=0.0), g)
    errors = [max_relative_error(adam[:, i].numpy(), adagrad[:, i].numpy()) for i in range(instances)]
    return pd.DataFrame({"gap": gap.numpy(), "error": errors})


def printed_step(t: Tensor) -> Tensor:
    """The printed update's t-th step under a constant gradient, in units of the rate, default decays.

    Example:
        >>> printed_step(torch.tensor([1, 12, 100, 1000], dtype=torch.float64))
        tensor([3.1623, 6.5685, 3.2408, 1.2576], dtype=torch.float64)
    """
    return (1 - 0.9**t) / (1 - 0.999**t).sqrt()


def constant_gradient(instances: int = 100, steps: int = 1000, seed: int = 2) -> pd.DataFrame:
    """The steps of both forms under constant gradients of random size and sign, in units of the rate.

    A row a step: the largest relative error of the printed form against `printed_step` over the instances,
    and the two multipliers of the first instance.
    """
    import pandas as pd

    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(instances, 1, generator=generator, dtype=torch.float64)
    g = g * 10 ** (6 * torch.rand(instances, 1, generator=generator, dtype=torch.float64) - 3)
    sizes = {}
    for variant in ("lecture", "kingma-ba"):
        path, _ = run(Adam(lr=1.0, eps=0.0, variant=variant), g.expand(steps, -1, -1))
        sizes[variant] = -torch.diff(path, dim=0, prepend=torch.zeros_like(path[:1])) * g.sign()
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    theory = printed_step(t)
    error = (sizes["lecture"].squeeze(2) / theory[:, None] - 1).abs()
    return pd.DataFrame(
        {
            "step": t.numpy(),
            "error": error.amax(1).numpy(),
            "printed": sizes["lecture"][:, 0, 0].numpy(),
            "paper": sizes["kingma-ba"][:, 0, 0].numpy(),
            "instances": instances,
        }
    )


def correction_grid(seeds: int = 2, budget: Budget = BUDGET) -> pd.DataFrame:
    """Training loss on the digits for every rate, beta1 and beta2, with and without bias correction."""
    import pandas as pd

    members, grid = cross(seeds, lr=rates(1e-5, 1e-1), beta1=[0.0, 0.9], beta2=[0.99, 0.999, 0.9999])
    tables = []
    for form, variant in FORMS.items():
        rule = Adam(lr=grid["lr"], beta1=grid["beta1"], beta2=grid["beta2"], variant=variant)
        population = trained(digits(), rule, members, budget, "epoch", ("train",))
        loss = last(population, "train_loss").numpy()
        tables.append(pd.DataFrame({**grid, "seed": members, "form": form, "train_loss": loss}))
    return pd.concat(tables, ignore_index=True)


def printed_on_digits(seeds: int) -> pd.DataFrame:
    """The step at which the printed form's weights stop being finite on the digits; -1 for never.

    Without the ridge, whose gradient would keep the weights of constant pixels from 0/0.
    """
    import pandas as pd

    members, grid = cross(seeds, lr=[1e-3, 1e-2, 1e-1])
    rule = Adam(lr=grid["lr"], variant="lecture")
    population = trained(digits_task(), rule, members, Budget(1, 64), None, ())
    return pd.DataFrame({**grid, "seed": members, "diverged": population.diverged.numpy()})


def trajectories(steps: int = 500) -> pd.DataFrame:
    """Five rules on Rosenbrock's function, each at the rate that ends lowest without leaving the picture."""
    import pandas as pd

    grid = rates(1e-5, 10.0, per_decade=4)
    low, high = torch.tensor(rosenbrock.domain).double().T
    tables = []
    for rule in (GD(lr=grid), Momentum(lr=grid), AdaGrad(lr=grid), RMSProp(lr=grid), Adam(lr=grid)):
        weights = {"x": torch.tensor(rosenbrock.start).double().repeat(len(grid), 1)}
        state, path = rule.init(weights), [weights["x"]]
        for step in range(steps):
            x = weights["x"].requires_grad_()
            (g,) = torch.autograd.grad(rosenbrock.f(x).sum(), x)
            weights, state = rule.update({"x": g}, state, {"x": x.detach()}, step)
            path.append(weights["x"])
        points = torch.stack(path).detach()
        inside = ((points >= low) & (points <= high)).all(2).all(0)
        best = int(torch.where(inside, rosenbrock.f(points[-1]), math.inf).argmin())
        coordinates = {"x": points[:, best, 0].numpy(), "y": points[:, best, 1].numpy()}
        heights = rosenbrock.f(points[:, best]).numpy()
        name = rule.title.split(" (")[0]
        tables.append(pd.DataFrame(coordinates).assign(rule=name, lr=grid[best], f=heights))
    return pd.concat(tables, ignore_index=True)


def _arms() -> list[Arm]:
    def arm(form: str) -> Arm:
        return Arm(form, lambda lr: Adam(lr=lr, variant=FORMS[form]), tuple(rates(1e-3, 1e-1, 4)))

    return [arm(form) for form in FORMS]


def _experiment(lab: Lab) -> Tables:
    lab.progress("identities")
    tables = {
        "identities": identities(lab.pick(100, 1000)),
        "limit": limit(),
        "steps": constant_gradient(),
        "paths": trajectories(),
    }
    lab.progress("Adam on the digits, with and without bias correction")
    seeds = lab.replicates(10, 20)
    tables["runs"], tables["tuning"] = race(digits(), _arms(), BUDGET, seeds, 3)
    tables["grid"] = correction_grid(lab.pick(2, 10))
    tables["printed"] = printed_on_digits(seeds)
    return tables


def _judge(tables: Tables) -> list[Finding]:
    errors = {str(name): group["error"] for name, group in tables["identities"].groupby("identity")}
    gaps, printed = tables["limit"], tables["printed"]
    fit = fit_power_law(gaps["gap"], gaps["error"])
    return [
        *(identity(name, errors[name]) for name in (PARTS, TORCH, NO_MOMENTUM, ADAGRAD)),
        law(
            "as β₂ → 1 it nears AdaGrad like 1 − β₂ (β₁ = 0, α/√t)",
            fit.slope,
            fit.slope_interval,
            1.0,
            n=fit.n,
            note="exponent of its distance from AdaGrad",
        ),
        _lengths(tables["steps"]),
        identity(PRINTED, errors[PRINTED]),
        count(
            "the update as printed trains the digits",
            int((printed["diverged"] < 0).sum()),
            len(printed),
            0.69,
            note="pixels that are constant have gradient 0, and the first step is 0/0; cross-entropy alone",
        ),
        *(_tuned(tables["runs"], tuned) for tuned in MEASURES),
    ]


def _tuned(runs: pd.DataFrame, tuned: str) -> Finding:
    losses = finals(runs, tuned)
    saved = 1 - losses[WITH] / losses[WITHOUT]
    return paired(f"{TUNED} (rates by {tuned} loss)", saved, 0.0, note="relative; not in the verdict")


def _lengths(steps: pd.DataFrame) -> Finding:
    found = identity(
        "under a constant gradient the printed steps are (1 − β₁ᵗ)/√(1 − β₂ᵗ) rates long",
        steps["error"],
        n=int(steps["instances"].iloc[0]),
    )
    peak = steps.iloc[int(steps["printed"].to_numpy().argmax())]
    first = steps["printed"].iloc[0]
    return dataclasses.replace(
        found, note=f"{first:.2f} at t = 1, at most {peak['printed']:.2f} at t = {peak['step']:.0f}"
    )


def _figures(tables: Tables) -> list[Drawing]:
    import numpy as np

    paths, steps = tables["paths"], tables["steps"]
    across, up = (np.linspace(*ends, 70) for ends in ((-2.0, 2.0), (-1.0, 3.0)))
    heights = rosenbrock.f(torch.from_numpy(np.stack(np.meshgrid(across, up), axis=-1))).numpy()
    ways = {str(name): group[["x", "y"]].to_numpy() for name, group in paths.groupby("rule", sort=False)}
    valley = contours_with_paths("Ways to the minimum", across, up, heights, ways, "x", "y", log=True)
    told = "; ".join(
        f"{name}: rate {group['lr'].iloc[0]:.2g}, f = {group['f'].iloc[-1]:.1e}"
        for name, group in paths.groupby("rule", sort=False)
    )
    size = figure("Length of a step", "step t", "step / rate", log_x=True)
    lines(size, steps, "step", "printed", name="as printed")
    lines(size, steps, "step", "paper", name="with bias correction")
    reference(size, float(printed_step(torch.tensor(12.0, dtype=torch.float64))), "t = 12")
    return [
        Drawing(
            valley,
            f"Rosenbrock's function, 500 steps, each rule at the rate that ends lowest "
            f"without leaving the picture. {told}.",
        ),
        Drawing(
            size,
            "Under a constant gradient, β₁ = 0.9 and β₂ = 0.999: as printed, without bias correction, the "
            "steps are up to 6.6 times as long as the rate says, and after 1000 steps still longer.",
        ),
        Drawing(
            _grid_figure(tables["grid"]),
            "A network 64-32-10 on the digits, 10 epochs, β₁ = 0.9: solid lines with bias correction, dashed "
            "ones without; medians over seeds.",
        ),
    ]


def _grid_figure(grid: pd.DataFrame) -> Figure:
    """Training loss against the rate, a colour for each beta2, dashed without bias correction."""
    drawn = figure("Bias correction", "rate", "training loss", log_x=True, log_y=True)
    grid = grid[grid["beta1"] == 0.9]
    for index, beta2 in enumerate(sorted(set(grid["beta2"]))):
        for form, dash in ((WITH, "solid"), (WITHOUT, "dash")):
            some = grid[(grid["beta2"] == beta2) & (grid["form"] == form)]
            name = f"β₂ = {beta2:g}" if form == WITH else None
            middle = some.groupby("lr", as_index=False)["train_loss"].median()
            lines(drawn, middle, "lr", "train_loss", mode="lines+markers", name=name)
            drawn.data[-1].update(
                line={"color": colour(index), "dash": dash}, marker={"color": colour(index)}
            )
    return drawn


C28 = Claim(
    id="C28",
    section="6.3.3",
    title="What Adam combines",
    statement="Adam combines momentum with AdaGrad's per-parameter rates, by the update in the notes.",
    source="Notes §6.3.3; Kingma & Ba 2015, Algorithm 1 and §5; Reddi, Kale & Kumar 2018, Corollary 2",
    experiment=_experiment,
    judge=_judge,
    figures=_figures,
    combine=lambda findings: agreement([finding for finding in findings if TUNED not in finding.name]),
    caveats=(
        "What is combined is momentum's weighted average with RMSProp's. AdaGrad is a limit: β₁ = 0, a "
        "rate that falls like 1/√t, and β₂ = 1 − 1/t or β₂ → 1.",
        "The printed update has no bias correction and no ε. With ε put back (“without correction”) it "
        "trains; its steps in the first thousand are longer.",
        "PyTorch adds ε to the corrected root. Older TensorFlow and Keras added it before the correction, "
        "where it means another number.",
        "On Rosenbrock's function each rule's rate is the best of a grid for that very run: an "
        "illustration, not a comparison.",
    ),
    errata=("E14", "E15", "E16", "E22"),
)

CLAIMS = [C28, C29, C30, C31, C32]
