"""C8 and C9: the gradient of one sample, and of a mini-batch, as estimates of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from losslab.engine import Batches, Points, Population
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import figure, lines, predicted, reference, spread
from losslab.lecture.section_6_2.samples import batch_gradient, sample_gradients
from losslab.lecture.statistics import bootstrap_interval, fit_power_law, max_relative_error
from losslab.lecture.training import trained
from losslab.lecture.verdicts import bound, identity, law
from losslab.rules import SGD
from losslab.tasks import Task, digits_task, logistic_regression, mlp

if TYPE_CHECKING:
    import pandas as pd

MODELS: dict[str, Callable[[], nn.Module]] = {
    "softmax": logistic_regression(64, 10),
    "MLP": mlp(64, 32, 10),
}


# -- C8: one sample ------------------------------------------------------------------------------------


def along_training(task: Task, seeds: int, checkpoints: Sequence[int]) -> dict[int, list[nn.Module]]:
    """Networks trained by mini-batch SGD in float64, as they were after each number of updates."""
    kept: dict[int, Points] = {}

    def keep(population: Population) -> None:
        kept[population.step] = population.points.clone()

    population = trained(
        task,
        SGD(lr=0.1),
        seeds=seeds,
        steps=max(checkpoints),
        dtype="float64",
        record=[step - 1 for step in checkpoints],
        watch=keep,
    )
    return {step: [points.load_into(population[i], i) for i in range(seeds)] for step, points in kept.items()}


def unbiasedness(model: str, seeds: int, checkpoints: Sequence[int]) -> pd.DataFrame:
    """The mean of all samples' gradients against the gradient, and the noise of one of them.

    Returns:
        One row a (seed, step): ``error``, ``gradient`` (its norm) and ``noise``, the root mean square
        distance of one sample's gradient from the gradient, (tr Sigma)^(1/2).
    """
    import pandas as pd

    task = digits_task(MODELS[model])
    rows = []
    for step, modules in along_training(task, seeds, checkpoints).items():
        for seed, module in enumerate(modules):
            each, whole = sample_gradients(task, module), batch_gradient(task, module)
            variance = torch.linalg.vector_norm(each, dim=1).square().mean() - whole.square().sum()
            rows.append(
                {
                    "model": model,
                    "seed": seed,
                    "step": step,
                    "error": max_relative_error(each.mean(0).numpy(), whole.numpy()),
                    "gradient": float(whole.norm()),
                    "noise": float(variance.sqrt()),
                }
            )
    return pd.DataFrame(rows)


def random_picks(model: str, seeds: int, draws: int) -> pd.DataFrame:
    """Averages of the gradients of samples that the engine draws, projected on the gradient.

    The network is a fresh one. Unbiased draws make ``projection`` = <average, gradient> / |gradient|^2 equal
    to 1 in the mean.
    """
    import pandas as pd

    task = digits_task(MODELS[model])
    each = sample_gradients(task, fresh(task))
    whole = each.mean(0)
    share = each @ whole / whole.square().sum()
    batches = Batches(len(each), 1, seeds=range(seeds), replacement=True)
    picked = torch.cat([batches.at(step) for step in range(draws)], dim=1)
    return pd.DataFrame({"model": model, "seed": range(seeds), "projection": share[picked].mean(1).numpy()})


def fresh(task: Task, seed: int = 0) -> nn.Module:
    """The network that the engine starts with, in float64."""
    return trained(task, SGD(), seeds=[seed], steps=0, dtype="float64")[0].train()


def evidence_c8(seeds: int, checkpoints: Sequence[int], groups: int, draws: int) -> Tables:
    """The gradients of both models along training, and random draws at a fresh network."""
    import pandas as pd

    return {
        "gradients": pd.concat([unbiasedness(m, seeds, checkpoints) for m in MODELS], ignore_index=True),
        "draws": pd.concat([random_picks(m, groups, draws) for m in MODELS], ignore_index=True),
    }


def experiment_c8(lab: Lab) -> Tables:
    """All samples' gradients on digits along training, softmax regression and an MLP."""
    return evidence_c8(lab.pick(10, 50), (1, 10, 30, 100, 300, 1000), groups=200, draws=lab.pick(100, 400))


EXACT = "the mean over all samples' gradients is the gradient"
CLOSE = "one sample's gradient is accurate: relative error below 1"


def judge_c8(tables: Tables) -> list[Finding]:
    """V1 for the mean over the samples, V4 for the mean over random draws; the noise is context."""
    table, draws = tables["gradients"], tables["draws"]
    relative = table.noise / table.gradient
    return [
        identity(EXACT, table.error, tolerance=1e-12),
        *(
            law(
                f"{model}: random draws average to the gradient",
                float(group.projection.mean()),
                bootstrap_interval(group.projection, np.mean),
                theory=1.0,
                n=len(group),
                note="projection of the average on the gradient",
            )
            for model, group in draws.groupby("model", sort=False)
        ),
        bound(
            CLOSE,
            float(relative.median()),
            bootstrap_interval(relative),
            len(relative),
            "median of √(tr Σ) / |∇L| along training",
            at_most=1.0,
        ),
    ]


def figures_c8(tables: Tables) -> list[Drawing]:
    """The relative noise of one sample's gradient as training goes on."""
    table = tables["gradients"]
    relative = table.assign(relative=table.noise / table.gradient)
    rows = spread(relative, ["model", "step"], "relative", low=0.0, high=1.0)
    drawn = figure("Noise of one sample", "updates", "relative error √(tr Σ) / |∇L|", log_x=True, log_y=True)
    lines(drawn, rows, "step", "middle", by="model", band=("low", "high"), mode="lines+markers")
    reference(drawn, 1.0, "as large as the gradient")
    return [
        Drawing(
            drawn,
            "Unbiased is not accurate: root mean square error of a single sample's gradient, in units of the "
            "gradient, on digits (median and range over seeds). It grows as the gradient shrinks.",
        )
    ]


C8 = Claim(
    id="C8",
    section="6.2",
    title="One random sample's gradient is right on average",
    statement="The gradient of the loss at one randomly picked training sample approximates the gradient "
    "over all training data.",
    source="Notes §6.2; Robbins & Monro 1951",
    experiment=experiment_c8,
    judge=judge_c8,
    figures=figures_c8,
    combine=all_but(CLOSE),
    caveats=(
        "What holds exactly is unbiasedness: the mean over a uniformly picked sample is the gradient. A "
        "single sample's gradient is far off and gets further off, relatively, as training goes on; that "
        "finding is shown and does not count, since the notes do not say how good the approximation is.",
        "Where every sample can be fitted exactly the noise vanishes at the minimum together with the "
        "gradient (Ma, Bassily & Belkin 2018).",
    ),
    errata=("E5", "E43"),
)


# -- C9: a mini-batch ----------------------------------------------------------------------------------


def squared_errors(model: str, sizes: Sequence[int], draws: int) -> pd.DataFrame:
    """Squared distances of mini-batch gradients from the gradient, the batches drawn by the engine.

    Returns:
        One row a (scheme, batch size, draw): ``ratio`` is the squared distance in units of tr Sigma, the mean
        squared distance of a single sample's gradient.
    """
    import pandas as pd

    task = digits_task(MODELS[model])
    each = sample_gradients(task, fresh(task))
    n, centred = len(each), each - each.mean(0)
    scale = centred.square().sum(1).mean()
    tables = []
    for replacement in (True, False):
        for k, size in enumerate(sizes):
            seeds = range(k * draws, (k + 1) * draws)
            index = Batches(n, size, seeds, replacement=replacement).at(0).expand(draws, size)
            ratio = _mean_rows(index, n) @ centred
            tables.append(
                pd.DataFrame(
                    {
                        "model": model,
                        "replacement": replacement,
                        "size": size,
                        "examples": n,
                        "ratio": (ratio.square().sum(1) / scale).numpy(),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def _mean_rows(index: Tensor, examples: int) -> Tensor:
    """``[draws, B]`` indices as the matrix ``[draws, n]`` that takes the mean over each batch."""
    size = index.shape[1]
    weights = torch.full(index.shape, 1 / size, dtype=torch.float64)
    return torch.zeros(len(index), examples, dtype=torch.float64).scatter_add_(1, index, weights)


def engine_steps(model: str, size: int, seeds: int) -> pd.DataFrame:
    """The engine's first SGD step on its own batch, against the mean of the batch's sample gradients."""
    import pandas as pd

    task = digits_task(MODELS[model])
    start = fresh(task)
    moved = trained(
        task,
        SGD(lr=1.0),
        seeds=seeds,
        steps=1,
        batch_size=size,
        dtype="float64",
        start=start,
    ).points.matrix()
    each = sample_gradients(task, start)
    wanted = _mean_rows(Batches(len(each), size, range(seeds)).at(0), len(each)) @ each
    taken = Points.from_modules([start]).matrix() - moved
    errors = [max_relative_error(a.numpy(), b.numpy()) for a, b in zip(taken, wanted, strict=True)]
    return pd.DataFrame({"model": model, "seed": range(seeds), "size": size, "error": errors})


def epoch_means(batch_norm: bool, seeds: int, size: int = 250) -> pd.DataFrame:
    """The mean of an epoch's batch gradients at fixed weights, against the gradient over all examples."""
    import pandas as pd

    task = digits_task(mlp(64, 32, 10, batch_norm=batch_norm))
    networks = trained(task, SGD(), seeds=seeds, steps=0, dtype="float64")
    assert task.train is not None
    batches = Batches(len(task.train), size, range(seeds))
    errors = []
    for seed, network in enumerate(networks):
        network.train()
        parts = [batch_gradient(task, network, batches.at(k)[seed]) for k in range(batches.per_epoch)]
        whole = batch_gradient(task, network)
        errors.append(float((torch.stack(parts).mean(0) - whole).norm() / whole.norm()))
    return pd.DataFrame({"batch_norm": batch_norm, "seed": range(seeds), "size": size, "error": errors})


def evidence_c9(models: Sequence[str], sizes: Sequence[int], draws: int, instances: int) -> Tables:
    """Batches of several sizes under both schemes, the engine's own step, and means over an epoch."""
    import pandas as pd

    return {
        "errors": pd.concat([squared_errors(model, sizes, draws) for model in models], ignore_index=True),
        "steps": pd.concat([engine_steps(model, 7, instances) for model in MODELS], ignore_index=True),
        "epochs": pd.concat([epoch_means(norm, instances) for norm in (False, True)], ignore_index=True),
    }


def experiment_c9(lab: Lab) -> Tables:
    """Batches of 1, 2, 4, ... and all examples, drawn with and without replacement."""
    n = 1000
    sizes = sorted({*(2**k for k in range(int(math.log2(n)) + 1)), n // 2, n})
    models = lab.pick(["softmax"], ["softmax", "MLP"])
    return evidence_c9(models, sizes, draws=lab.pick(2000, 5000), instances=100)


def factor(size: int, examples: int) -> float:
    """What drawing without replacement multiplies the variance by: (N - B)/(N - 1)."""
    return (examples - size) / (examples - 1)


def judge_c9(tables: Tables) -> list[Finding]:
    """V4 for the two laws, V1 for the engine's own step, and batch norm as the exception."""
    findings = [
        finding
        for model, table in tables["errors"].groupby("model", sort=False)
        for finding in _variance_laws(str(model), table)
    ]
    epochs = tables["epochs"]
    normalised = epochs[epochs.batch_norm].error
    return [
        *findings,
        identity("the engine's step is minus the mean over its batch", tables["steps"].error),
        identity("an epoch's batch gradients average to the gradient", epochs[~epochs.batch_norm].error),
        bound(
            "with batch norm they do not",
            float(normalised.median()),
            (float(normalised.min()), float(normalised.max())),
            len(normalised),
            "median relative difference, and its range",
            at_least=0.01,
        ),
    ]


def _variance_laws(model: str, table: pd.DataFrame) -> list[Finding]:
    examples = int(table.examples.iloc[0])
    drawn = table[table.replacement]
    means = drawn.groupby("size").ratio.mean()
    fit = fit_power_law(means.index, means)
    findings = [
        law(f"{model}: variance ∝ 1/B with replacement", fit.slope, fit.slope_interval, -1.0, n=fit.n)
    ]
    for size, label in ((examples // 2, "N/2"), (examples, "N")):
        ratio = table[~table.replacement & (table["size"] == size)].ratio * size
        findings.append(
            law(
                f"{model}: factor (N − B)/(N − 1) without replacement, B = {label}",
                float(ratio.mean()),
                bootstrap_interval(ratio, np.mean),
                theory=factor(size, examples),
                n=len(ratio),
            )
        )
    return findings


def figures_c9(tables: Tables) -> list[Drawing]:
    """Variance against batch size with both laws."""
    table = tables["errors"]
    table = table[table.model == table.model.iloc[0]]
    examples = int(table.examples.iloc[0])
    means = table.groupby(["replacement", "size"], sort=False).ratio.mean().reset_index()
    means = means[means.ratio > 1e-12].assign(
        scheme=means.replacement.map({True: "with replacement", False: "without replacement"})
    )
    drawn = figure("Variance of the batch gradient", "batch size B", "variance / σ²", log_x=True, log_y=True)
    lines(drawn, means, "size", "ratio", by="scheme", mode="markers")
    grid = np.unique(np.geomspace(1, 0.97 * examples, 200).round())
    shrunk = [factor(int(size), examples) / size for size in grid]
    predicted(drawn, (grid, 1 / grid), (grid, shrunk), name="1/B, and (N − B)/(N − 1)/B")
    return [
        Drawing(
            drawn,
            f"Mean squared distance of the mini-batch gradient from the gradient on {examples} digits, in "
            f"units of one sample's. Without replacement it ends at 0 for B = N = {examples}, which a "
            "logarithmic axis cannot show.",
        )
    ]


C9 = Claim(
    id="C9",
    section="6.2.1",
    title="A mini-batch approximates the gradient better",
    statement="The mean gradient over a mini-batch of training samples approximates the gradient.",
    source="Notes §6.2.1",
    experiment=experiment_c9,
    judge=judge_c9,
    figures=figures_c9,
    caveats=(
        "The variance falls like 1/B when samples are drawn with replacement, and by a further (N − B)/(N − "
        "1) when they are not, as in the notes' epochs: halving the noise takes four times the samples.",
        "With batch norm a batch's gradient is not a mean over its samples, because each sample's loss "
        "depends on the others; the variance laws are measured without it.",
    ),
)
