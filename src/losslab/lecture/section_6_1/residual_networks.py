"""C2: linear residual networks, whose critical points are global minima inside of a ball."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from losslab.curvature.finding import flatten
from losslab.engine import Objective, Points
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import figure, lines, predicted, reference, spread
from losslab.lecture.statistics import fit_power_law
from losslab.lecture.training import one_thread, trained
from losslab.lecture.verdicts import bound, count, identity, law
from losslab.rules import GD
from losslab.tasks import Batch, Task

if TYPE_CHECKING:
    import pandas as pd

DIMENSION = 5
DEPTHS = (2, 4, 8, 16)
BAD = 1e-6
"""Share of the loss at A = 0 above which a critical point is no global minimum (which has loss 0)."""

STILL = 1e-6
"""Length of the gradient, as a share of that at A = 0, at which a point counts as critical."""

BOUND = "gradient bound inside of the ball"
INSIDE = "critical points inside of the ball that are no global minimum"
ANYWHERE = "every critical point is a global minimum"
LAW = "max ‖Aᵢ‖ ∝ depth⁻¹ after descent from A = 0"
REACHED = "gradient descent from A = 0 reaches the global minimum, det R > 0"
STALLED = "gradient descent from A = 0 stalls on the way to diag(−1, 1, …, 1)"
OUTSIDE = "gradient descent from outside of the ball reaches the global minimum"


class Sizes(NamedTuple):
    """How much work to do: random points of the bound, searches, descents a depth (even), steps of each."""

    points: int
    searches: int
    search_depths: tuple[int, ...]
    descents: int
    search_steps: int
    descent_steps: int


class Residual(nn.Module):
    """``(I + A_l) ... (I + A_1)``, the matrix R to be learned, and the root of the inputs' covariance."""

    def __init__(self, depth: int, dimension: int = DIMENSION) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(depth, dimension, dimension, dtype=torch.float64))
        for name in ("R", "root"):
            self.register_buffer(name, torch.eye(dimension, dtype=torch.float64))

    def forward(self) -> Tensor:
        """The product less R, times the root."""
        eye = torch.eye(self.A.shape[-1], dtype=self.A.dtype)
        product = eye
        for a in self.A.unbind(0):
            product = (eye + a) @ product
        return (product - self.R) @ self.root  # type: ignore[operator]


def excess(model: nn.Module, batch: Batch) -> Tensor:
    """``f - C``: the expected squared error less its least value, that of the noise."""
    return model().square().sum()


def objective(depth: int) -> Objective:
    """The population loss of a network of this depth; R and the covariance belong to the point."""
    return Objective(Task(lambda: Residual(depth), excess, None), execution="stacked")


def problems(count: int, seed: int, near: bool = False, turned: bool = False) -> dict[str, Tensor]:
    """Matrices R ``[count, 5, 5]`` and roots of covariances, alternating between two kinds of each.

    Even ones: ``R = I + 0.3 G / sqrt(5)``; odd ones: random singular vectors and a condition number up to 10.
    Every third covariance is not the identity. With ``near`` all are of the first kind; ``turned`` makes all
    determinants negative, else they are positive.
    """
    rng = np.random.default_rng(seed)
    found, roots = [], []
    for k in range(count):
        close = np.eye(DIMENSION) + 0.3 * rng.standard_normal((DIMENSION, DIMENSION)) / DIMENSION**0.5
        u, _, v = np.linalg.svd(rng.standard_normal((DIMENSION, DIMENSION)))
        r = close if near or k % 2 == 0 else (u * 10 ** rng.uniform(-0.5, 0.5, DIMENSION)) @ v
        if (np.linalg.det(r) < 0) != turned:
            r[0] *= -1
        found.append(r)
        q = np.linalg.qr(rng.standard_normal((DIMENSION, DIMENSION)))[0]
        roots.append((q * 10 ** rng.uniform(-0.5, 0.5, DIMENSION)) @ q.T if k % 3 == 2 else np.eye(DIMENSION))
    return {"R": torch.from_numpy(np.array(found)), "root": torch.from_numpy(np.array(roots))}


def inside(depth: int, count: int, seed: int, largest: float) -> Tensor:
    """Random A ``[count, depth, 5, 5]`` with ``|A_i| = tau U(0.2, 1)``, tau up to ``largest``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, depth, DIMENSION, DIMENSION)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    tau = largest * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    norms = tau * (0.2 + 0.8 * torch.rand(count, depth, generator=generator, dtype=torch.float64))
    return a * (norms / torch.linalg.matrix_norm(a, 2))[:, :, None, None]


def widest(a: Tensor) -> Tensor:
    """``max_i |A_i|``, ``[N]``."""
    return torch.linalg.matrix_norm(a, 2).amax(1)


def gradient_bounds(points: int) -> pd.DataFrame:
    """``|grad f|^2`` against the corrected bound ``4 l (1 - tau)^(2l-2) sigma_min(Sigma) (f - C)``."""
    import pandas as pd

    tables = []
    for depth in DEPTHS:
        a, told = inside(depth, points, depth, 0.95), problems(points, 100 + depth)
        value, gradient = objective(depth).gradient(Points({"A": a}, told))
        least = torch.linalg.matrix_norm(told["root"], -2).square()
        tau = widest(a)
        bound = 4 * depth * (1 - tau) ** (2 * depth - 2) * least * value
        columns = {"tau": tau, "gradient": gradient.matrix().square().sum(1), "bound": bound}
        tables.append(pd.DataFrame({n: c.numpy() for n, c in columns.items()}).assign(depth=depth))
    return pd.concat(tables, ignore_index=True)


def counterexamples(count: int = 100) -> pd.DataFrame:
    """``A_i = -I``: the gradient and the excess, in units of those at A = 0."""
    import pandas as pd

    tables = []
    for depth in DEPTHS:
        f, told = objective(depth), problems(count, 200 + depth)
        zero = torch.zeros(count, depth, DIMENSION, DIMENSION, dtype=torch.float64)
        (start, slope), (value, gradient) = (
            f.gradient(Points({"A": a}, told)) for a in (zero, zero - torch.eye(DIMENSION, dtype=zero.dtype))
        )
        columns = {
            "gradient": gradient.matrix().norm(dim=1) / slope.matrix().norm(dim=1),
            "excess": value / start,
        }
        tables.append(pd.DataFrame({n: c.numpy() for n, c in columns.items()}).assign(depth=depth))
    return pd.concat(tables, ignore_index=True)


def searches(runs: int, depths: Sequence[int], steps: int) -> pd.DataFrame:
    """Ends of searches for a vanishing gradient from inside of the ball, R near the identity.

    Where R is far from it the searches of shallow networks leave the ball, about which they then say nothing.
    """
    import pandas as pd

    tables = []
    for depth in depths:
        each = -(-runs // len(depths))
        f, told = objective(depth), problems(each, 300 + depth, near=True)
        a = inside(depth, each, 10 + depth, 0.9)
        start, slope = f.gradient(Points({"A": torch.zeros_like(a)}, told))
        scale = slope.matrix().norm(dim=1)
        found = flatten(f, Points({"A": a}, told), tolerance=float(STILL * scale.min()), steps=steps)
        columns = {
            "gradient": found.gradient_norm / scale,
            "excess": found.value / start,
            "tau": widest(found.points["A"]),
        }
        tables.append(pd.DataFrame({n: c.numpy() for n, c in columns.items()}).assign(depth=depth))
    return pd.concat(tables, ignore_index=True)


def descents(runs: int, steps: int) -> pd.DataFrame:
    """Gradient descent at rate 0.1 / depth: from A = 0 with either sign of det R, and from outside the ball.

    Returns:
        One row a (arm, depth, run): ``excess`` in units of that at A = 0, and ``tau``, the largest |A_i|.
    """
    import pandas as pd

    tables = []
    for depth in DEPTHS:
        plain, turned = problems(runs, 400 + depth), problems(runs, 500 + depth, turned=True)
        told = {n: torch.cat([plain[n], turned[n], plain[n]]) for n in plain}
        a = torch.zeros(3 * runs, depth, DIMENSION, DIMENSION, dtype=torch.float64)
        out = inside(depth, runs, 20 + depth, 1.0)
        a[2 * runs :] = out * (1.5 / widest(out))[:, None, None, None]
        f = objective(depth)
        start = f.value(Points({"A": torch.zeros_like(a)}, told))
        # 0.1 / depth suits |R| and |Sigma| near 1; the steepest direction scales with both.
        steep = torch.linalg.matrix_norm(told["root"], 2) ** 2 * torch.linalg.matrix_norm(told["R"], 2).clamp(
            1
        )
        run = trained(
            f.task, GD(lr=0.1 / (depth * steep)), seeds=3 * runs, steps=steps, dtype="float64",
            start=Points({"A": a}, told),
        )  # fmt: skip
        end = Points({"A": run.points["A"]}, told)
        table = pd.DataFrame({"excess": (f.value(end) / start).numpy()})
        lost = (run.diverged >= 0).numpy()
        table["excess"] = table.excess.mask(lost, np.inf)
        table["tau"] = np.where(lost, np.inf, widest(end["A"].nan_to_num()).numpy())
        table["arm"] = np.repeat(["from 0", "from 0, det R < 0", "from outside"], runs)
        table["kind"] = np.resize(["near I", "κ ≤ 10"], 3 * runs) if runs % 2 == 0 else "mixed"
        tables.append(table.assign(depth=depth))
    return pd.concat(tables, ignore_index=True)


def reflection(steps: int) -> pd.DataFrame:
    """Gradient descent from A = 0 towards R = diag(-1, 1, 1, 1, 1), one row a depth."""
    import pandas as pd

    turned = torch.eye(DIMENSION, dtype=torch.float64)[None].clone()
    turned[0, 0, 0] = -1.0
    told = {"R": turned, "root": turned.abs()}
    rows = []
    for depth in DEPTHS:
        f = objective(depth)
        start = Points({"A": torch.zeros(1, depth, DIMENSION, DIMENSION, dtype=torch.float64)}, told)
        run = trained(f.task, GD(lr=0.1 / depth), steps=steps, dtype="float64", start=start)
        rows.append((depth, float(f.value(Points({"A": run.points["A"]}, told)) / f.value(start))))
    return pd.DataFrame(rows, columns=["depth", "excess"])


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """The bound, the counterexample, searches from inside, and descents."""
    lab.progress("critical points of linear residual networks")
    return {
        "bounds": gradient_bounds(sizes.points),
        "counterexample": counterexamples(),
        "searches": searches(sizes.searches, sizes.search_depths, sizes.search_steps),
        "descents": descents(sizes.descents, sizes.descent_steps),
        "reflection": reflection(sizes.descent_steps),
    }


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    depths = lab.pick((2, 4, 8), DEPTHS)
    sizes = Sizes(
        2000, lab.pick(501, 1000), depths, lab.pick(20, 60), lab.pick(200, 2000), lab.pick(1000, 5000)
    )
    with one_thread():
        return evidence(lab, sizes)


def judge(tables: Tables) -> list[Finding]:
    """V1 inside of the ball, V2 for the searches, a counterexample outside; descents as context."""
    bounds, against = tables["bounds"], tables["counterexample"]
    short = (1 - bounds.gradient / bounds.bound).clip(lower=0)
    ends = tables["searches"]
    critical = ends[(ends.gradient <= STILL) & (ends.tau < 1)]
    bad = int((critical.excess > BAD).sum())
    still = against[against.gradient <= 1e-12]
    return [
        identity(ANYWHERE, still.excess),
        identity(BOUND, short),
        count(
            INSIDE,
            bad,
            len(critical),
            at_most=0.02,
            note=f"of {len(ends)} searches from inside {len(critical)} ended at a critical point inside",
        ),
        *_judge_descents(tables["descents"], tables["reflection"]),
    ]


def _judge_descents(rows: pd.DataFrame, reflected: pd.DataFrame) -> list[Finding]:
    arms = dict(list(rows.groupby("arm")))
    zero, turned, out = (arms[arm] for arm in ("from 0", "from 0, det R < 0", "from outside"))
    near = zero[(zero.excess < BAD) & (zero.kind == "near I")]
    middle = near.groupby("depth").tau.median()
    fit = fit_power_law(middle.index, middle)
    left = int((zero.tau > 1).sum())
    return [
        law(LAW, fit.slope, fit.slope_interval, theory=-1.0, n=fit.n, note="medians, R near the identity"),
        count(
            REACHED,
            int((zero.excess < 1e-3).sum()),
            len(zero),
            at_least=0.5,
            note=f"{left} of {len(zero)} ended outside of the ball",
        ),
        bound(
            STALLED,
            float(reflected.excess.min()),
            (float(reflected.excess.min()), float(reflected.excess.max())),
            len(reflected),
            "share of the first loss that is left",
            at_least=0.1,
            note=f"of {len(turned)} random R with a negative determinant {int((turned.excess < 1e-3).sum())} "
            "were reached, by factors outside of the ball",
        ),
        count(OUTSIDE, int((out.excess < 1e-3).sum()), len(out), at_least=0.5),
    ]


def figures(tables: Tables) -> list[Drawing]:
    """The bound, and how small the factors stay."""
    bounds = tables["bounds"]
    drawn = figure("Gradient against its bound", "τ = max ‖Aᵢ‖", "‖∇f‖² / bound", log_y=True)
    some = bounds.groupby("depth").head(400)
    named = some.assign(ratio=some.gradient / some.bound, name=[f"depth {d}" for d in some.depth])
    lines(drawn, named, "tau", "ratio", by="name", mode="markers")
    drawn.update_traces(marker={"size": 4, "opacity": 0.6})
    reference(drawn, 1.0, "the bound")
    return [
        Drawing(
            drawn,
            "Random points inside of the ball. Nowhere is the squared gradient below 4 l (1 − τ)²ˡ⁻² "
            "σ_min(Σ) (f − C), so a critical point there has f = C; the bound goes to zero at τ = 1.",
        ),
        _factors(tables["descents"]),
    ]


def _factors(rows: pd.DataFrame) -> Drawing:
    zero = rows[rows.arm == "from 0"]
    drawn = figure("Size of the factors found", "depth l", "max ‖Aᵢ‖", log_x=True, log_y=True)
    for kind, group in zero.groupby("kind", sort=False):
        lines(drawn, spread(group, ["depth"], "tau"), "depth", "middle", band=("low", "high"),
              mode="lines+markers", name=f"R {kind}")  # fmt: skip
    depths = np.array(sorted(zero.depth.unique()), dtype=np.float64)
    first = zero[zero.depth == depths[0]].tau.median()
    predicted(drawn, (depths, first * depths[0] / depths), name="∝ 1/l")
    reference(drawn, 1.0, "the ball")
    return Drawing(
        drawn,
        "Gradient descent from A = 0: the deeper the network, the nearer each factor stays to the identity "
        "(median and 80 % of the runs). Matrices far from the identity leave the ball in shallow networks.",
    )


C2 = Claim(
    id="C2",
    section="6.1",
    title="Linear residual networks: every critical point is global",
    statement="All stationary points of linear residual networks are global minima.",
    source="Notes §6.1; Hardt & Ma 2017, Theorems 2.1 and 2.2",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(ANYWHERE, BOUND, INSIDE),
    caveats=(
        "The theorem is about the ball max ‖Aᵢ‖ < 1, which the notes leave out: at Aᵢ = −I the gradient is "
        "zero and the loss is not. Iterates may leave the ball; the theorem does not say that they won't.",
        "The paper prints the bound with the exponent l − 1 and σ_min(Σ)²; in one dimension with l = 4, "
        "Aᵢ = −1/2, R = 1 that is violated. Tested is the form with 2l − 2 and σ_min(Σ).",
        "With det R < 0 no product of factors near the identity equals R, and descent from A = 0 cannot get "
        "there: the existence theorem needs det R > 0.",
        "Descent runs at 0.1 / (l ‖Σ‖ ‖R‖), which is not tuned; the number of its steps is limited.",
        "Settled after a first run: the searches use R near the identity, since with R far from it most "
        "leave the ball; descent has more steps; and the descent that stalls is the one towards "
        "diag(−1, 1, …, 1), "
        "since some random R with a negative determinant are reached, by factors outside of the ball.",
    ),
    errata=("E1",),
)
