"""What is pruned, how much of it, and what controls keep of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from losslab import LosslabError, Points, Task, supervised
from losslab.engine import randomness
from losslab.tasks import conv2, conv4, lenet_300_100, mlp
from losslab.tickets import CONTROLS, CRITERIA, Evidence, Scope, criterion, kept, prunable, smaller
from losslab.tickets.controls import Ticket
from losslab.tickets.prunable import whole

LENET = prunable(lenet_300_100()())


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_paper_s_table_to_the_weight() -> None:
    shares = Scope(rate=0.2).shares(LENET, 21)
    assert LENET.total == 266_200
    assert {k: round(100 * shares[k], 2) for k in (1, 3, 7, 9, 15)} == {
        1: 80.04,
        3: 51.28,
        7: 21.07,
        9: 13.52,
        15: 3.58,
    }
    short = [
        100,
        80.0,
        64.1,
        51.3,
        41.1,
        32.9,
        26.3,
        21.1,
        16.9,
        13.5,
        10.8,
        8.7,
        7.0,
        5.6,
        4.5,
        3.6,
        2.9,
        2.3,
    ]
    assert [round(100 * s, 1) for s in shares[: len(short)]] == short
    assert [round(100 * s, 2) for s in shares[18:]] == [1.85, 1.49, 1.19, 0.96]


def test_a_rate_for_all_layers_together_gives_another_table() -> None:
    shares = Scope(rate=0.2, output=None, together=True).shares(LENET, 15)
    pool = 265_200
    assert round(266_200 * shares[1]) == 1000 + pool - round(0.2 * pool)


@pytest.mark.parametrize(
    ("model", "levels", "share"),
    [(conv2(), 11, 8.81), (conv2(), 14, 4.57), (conv4(), 11, 11.06), (conv4(), 12, 9.18)],
)
def test_the_paper_s_convolutional_networks(model: Any, levels: int, share: float) -> None:
    layers = prunable(model())
    convolutions = {n: 0.1 for n, p in model().named_parameters() if p.dim() == 4}
    scope = Scope(rate=0.2, rates=convolutions)
    assert round(100 * scope.shares(layers, levels)[-1], 2) == share


def test_masks_count_what_the_table_says() -> None:
    layers = prunable(mlp(20, 30, 10, 5)())
    scope, masks = (
        Scope(),
        whole(layers, {n: torch.ones(2, *p.shape) for n, p in mlp(20, 30, 10, 5)().named_parameters()}),
    )
    shares = scope.shares(layers, 4)
    for level in range(1, 5):
        scores = {n: torch.rand(m.shape, generator=draw(level)) for n, m in masks.items()}
        before, masks = masks, scope.prune(scores, masks, layers)
        assert kept(masks, layers).tolist() == [round(shares[level] * layers.total)] * 2
        for name in layers.sizes:
            assert not (masks[name] & ~before[name]).any()  # what is gone stays gone
            for i in range(2):
                left, gone = (
                    scores[name][i][masks[name][i]],
                    scores[name][i][before[name][i] & ~masks[name][i]],
                )
                assert left.min() >= gone.max()


def test_equal_scores_go_one_by_one() -> None:
    layers = prunable(nn.Linear(10, 10))
    masks = Scope(output=0.25).prune(
        {"weight": torch.zeros(1, 10, 10)}, {"weight": torch.ones(1, 10, 10) > 0}, layers
    )
    assert masks["weight"].sum() == 75


def test_a_round_takes_exactly_its_share() -> None:
    """One weight too many goes where shares are rounded up and then one more is taken, ties and all."""
    layers = prunable(nn.Linear(26_620, 10))
    like = {"weight": torch.randn(1, 10, 26_620, generator=draw())}
    masks = Scope(output=0.2).prune(like, whole(layers, like), layers)
    assert kept(masks, layers).item() == 212_960


@pytest.mark.parametrize("together", [False, True])
def test_a_member_is_pruned_as_if_alone(together: bool) -> None:
    layers, like = (
        prunable(mlp(6, 8, 4)()),
        {n: torch.ones(3, *p.shape) for n, p in mlp(6, 8, 4)().named_parameters()},
    )
    scores = {n: torch.rand(3, *like[n].shape[1:], generator=draw()) for n in layers.sizes}
    scope, masks = Scope(rate=0.5, together=together), whole(layers, like)
    found = scope.prune(scores, masks, layers)
    for i in range(3):
        alone = scope.prune(
            {n: s[i : i + 1] for n, s in scores.items()}, {n: m[i : i + 1] for n, m in masks.items()}, layers
        )
        assert all(torch.equal(alone[n][0], found[n][i]) for n in layers.sizes)
    if together:
        assert found["2.weight"].all()  # the output layer is left alone


def test_a_subset_and_whole_units() -> None:
    module = mlp(6, 8, 4)()
    layers = prunable(module)
    like = {n: torch.ones(2, *p.shape) for n, p in module.named_parameters()}
    scores = {n: torch.rand(2, *like[n].shape[1:], generator=draw()) for n in layers.sizes}
    some = Scope(layers=("2.weight",), output=0.5).prune(scores, whole(layers, like), layers)
    assert some["0.weight"].all()
    assert some["2.weight"].sum().item() == 2 * 16
    units = Scope(rate=0.25, units=True).prune(scores, whole(layers, like), layers)
    rows = units["0.weight"].any(2)
    assert (rows.sum(1) == 6).all()
    assert torch.equal(units["0.weight"], rows[:, :, None].expand(2, 8, 6))
    assert torch.equal(units["0.bias"], rows)
    assert units["2.weight"].all()
    again = Scope(rate=0.25, units=True).prune(scores, units, layers)
    assert (again["0.bias"].sum(1) == 4).all()  # 1.5 rounds up


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": 1.0}, "rate is 1"),
        ({"rates": {"0.weight": 1.5}}, "0.weight is 1.5"),
        ({"output": -0.1}, "output is -0.1"),
        ({"together": True, "units": True}, "ranked together"),
    ],
)
def test_rates_that_cannot_be(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        Scope(**settings)


def test_a_level_that_would_empty_a_layer_and_unknown_layers() -> None:
    layers = prunable(mlp(2, 2, 2)())
    with pytest.raises(LosslabError, match=r"level 1 would leave '0\.weight' without weights"):
        Scope(rate=0.9).shares(layers, 5)
    for scope, levels in (
        (Scope(), 2),
        (Scope(together=True), 2),
        (Scope(layers=("2.weight",), output=0.2), 2),
    ):
        assert len(scope.shares(layers, levels)) == levels + 1
        with pytest.raises(
            LosslabError, match=f"level {levels + 1} would prune nothing.* {levels} levels at"
        ):
            scope.shares(layers, 60)
    with pytest.raises(LosslabError, match="ask for a higher rate"):
        Scope(rate=0.01).shares(layers, 1)
    with pytest.raises(LosslabError, match=r"level 10 would leave '0\.weight' without weights"):
        Scope().shares(layers, 60, at_once=True)
    masks = whole(layers, scores := {n: torch.rand(1, 2, 2, generator=draw()) for n in layers.sizes})
    for level, share in list(enumerate(Scope(together=True, rate=0.4).shares(layers, 2, at_once=True)))[1:]:
        left = Scope(together=True, rate=0.4).prune(scores, masks, layers, level)
        assert int(kept(left, layers)) / layers.total == share
    with pytest.raises(LosslabError, match="prunable weight"):
        Scope(layers=("9.weight",)).of(layers)
    with pytest.raises(LosslabError, match="no linear or convolutional"):
        prunable(nn.ReLU())
    three = prunable(mlp(2, 2, 2, 2)())
    lopsided = {n: torch.full((1, 2, 2), float(n[0])) for n in three.sizes}
    with pytest.raises(LosslabError, match=r"would leave '0\.weight'"):
        Scope(rate=0.5, together=True).prune(lopsided, whole(three, lopsided), three)


# -- criteria ------------------------------------------------------------------------------------------

X = torch.randn(40, 4, generator=draw(), dtype=torch.float64)
TASK = supervised(mlp(4, 6, 3, activation="tanh"), (X, (X[:, 0] > 0).long()))


def evidence(task: Task = TASK, level: int = 1) -> Evidence:
    modules = []
    for seed in range(4):
        with randomness.seeded(seed, "case"):
            modules.append(task.model().double())
    start, end = Points.from_modules(modules[:2]), Points.from_modules(modules[2:])
    layers = prunable(modules[0])
    masks = {n: torch.rand(start[n].shape, generator=draw(5)) < 0.7 for n in layers.sizes}
    return Evidence(task, task.model(), layers, start, end, masks, [0, 1], level)


def test_scores_of_trained_weights() -> None:
    at = evidence()
    for name in at.layers.sizes:
        a, b = at.start[name], at.end[name]
        assert torch.equal(criterion("magnitude").score(at)[name], b.abs())
        assert torch.equal(criterion("distance").score(at)[name], (b - a).abs())
        assert torch.equal(criterion("movement").score(at)[name], b**2 - a**2)


def test_movement_is_the_sum_of_gradient_times_weight() -> None:
    from losslab import train

    lr, steps = 1e-4, 50
    total: dict[str, Tensor] = {}
    task = TASK
    population = train(task, "gd", seeds=1, steps=0, dtype="float64", evaluate=None, progress=False)
    start = population.points.clone()
    module = task.model().double()
    from losslab.rules import GD

    end = train(
        task, GD(lr=lr), seeds=1, steps=steps, dtype="float64", evaluate=None, progress=False, record=[0]
    ).points
    weights = {n: w[0].clone() for n, w in start.weights.items()}
    x, y = task.train.all()
    slope = grad(lambda w: F.cross_entropy(functional_call(module, w, (x,)), y))
    for _ in range(steps):
        g = slope(weights)
        for n in weights:
            total[n] = total.get(n, 0) - 2 * lr * g[n] * weights[n]
            weights[n] = weights[n] - lr * g[n]
    for n in ("0.weight", "2.weight"):
        torch.testing.assert_close((end[n] ** 2 - start[n] ** 2)[0], total[n], rtol=1e-2, atol=1e-8)


def test_snip_and_grasp_against_autograd() -> None:
    at = evidence()
    module = at.module.double()
    x, y = TASK.train.all()
    slope = grad(lambda w: F.cross_entropy(functional_call(module, w, (x,)), y))
    for i in range(2):
        w = {n: t[i] * at.masks[n][i] if n in at.masks else t[i] for n, t in at.start.weights.items()}
        g = slope(w)
        held = {n: t.detach() for n, t in g.items()}
        bent = grad(lambda v, held=held: sum((slope(v)[n] * held[n]).sum() for n in held))(w)
        for name in at.layers.sizes:
            torch.testing.assert_close(
                criterion("snip").score(at)[name][i], (g[name] * w[name]).abs(), rtol=1e-9, atol=1e-14
            )
            torch.testing.assert_close(
                criterion("grasp").score(at)[name][i], bent[name] * w[name], rtol=1e-8, atol=1e-12
            )


def test_snip_and_grasp_against_differences() -> None:
    """How the loss, and half the squared gradient norm, answer to the weight's own connection c at 1."""
    at, h = evidence(), 1e-5
    module = at.module.double()
    x, y = TASK.train.all()

    def loss(w: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(module, w, (x,)), y)

    def steep(w: dict[str, Tensor]) -> Tensor:
        return sum(g.square().sum() for g in grad(loss)(w).values()) / 2

    base = {n: t[0] * at.masks[n][0] if n in at.masks else t[0] for n, t in at.start.weights.items()}
    name = "2.weight"
    for criterion_name, of in (("snip", loss), ("grasp", steep)):
        slow = torch.empty_like(base[name])
        for i, j in itertools.product(*map(range, slow.shape)):
            ends = []
            for c in (1 + h, 1 - h):
                moved = base[name].clone()
                moved[i, j] *= c
                ends.append(of(base | {name: moved}))
            slow[i, j] = (ends[0] - ends[1]) / (2 * h)
        found = criterion(criterion_name).score(at)[name][0]
        torch.testing.assert_close(
            found, slow.abs() if criterion_name == "snip" else slow, rtol=1e-5, atol=1e-9
        )


def test_synflow_is_what_is_lost_without_the_weight() -> None:
    """The flow is linear in each weight's size, so its share is the difference that removing it makes."""
    task = TASK.replace(model=mlp(4, 5, 4, 3, activation="relu"))
    at = evidence(task)
    alive = at.alive()

    def flow(w: dict[str, Tensor]) -> Tensor:
        out = torch.ones(4, dtype=torch.float64)
        for layer in ("0", "2", "4"):
            out = w[f"{layer}.weight"].abs() @ out + w[f"{layer}.bias"].abs()
        return out.sum()

    scores = criterion("synflow").score(at)
    for member in range(2):
        base = {n: t[member] for n, t in alive.weights.items()}
        for name in at.layers.sizes:
            slow = torch.empty_like(base[name])
            for i, j in itertools.product(*map(range, slow.shape)):
                without = base[name].clone()
                without[i, j] = 0
                slow[i, j] = flow(base) - flow(base | {name: without})
            torch.testing.assert_close(scores[name][member], slow, rtol=1e-10, atol=1e-12)


def test_synflow_is_conserved_and_touches_nothing() -> None:
    task = TASK.replace(model=mlp(4, 6, 3, activation="relu"))
    at = evidence(task)
    before = {n: p.clone() for n, p in at.module.named_parameters()}
    scores = criterion("synflow").score(at)
    assert all(torch.equal(before[n], p) for n, p in at.module.named_parameters())
    assert next(at.module.parameters()).dtype is torch.float32
    alive = at.alive()
    first, second = (alive[n].abs().double() for n in at.layers.sizes)
    hidden = torch.einsum("noi->no", first) + alive["0.bias"].abs()
    product = torch.einsum("nko,no->n", second, hidden)
    torch.testing.assert_close(scores["2.weight"].sum((1, 2)), product)
    by_hand = first * torch.einsum("nko->no", second)[:, :, None]
    torch.testing.assert_close(scores["0.weight"], by_hand)


@pytest.mark.parametrize("name", list(CRITERIA))
def test_scores_have_the_shape_of_the_weights_and_pages_say_so(name: str) -> None:
    at = evidence()
    found = criterion(name)
    assert found.equation
    assert found.source
    scores = found.score(at)
    assert {n: s.shape for n, s in scores.items()} == {n: at.start[n].shape for n in at.layers.sizes}
    assert all(not torch.equal(s[0], s[1]) for s in scores.values())


def test_an_unknown_criterion() -> None:
    with pytest.raises(LosslabError, match="magnitude"):
        criterion("magnitud")


# -- controls ------------------------------------------------------------------------------------------


def ticket() -> Ticket:
    at = evidence()
    return Ticket(TASK, at.layers, at.start, at.masks, [0, 1], 3)


@pytest.mark.parametrize("name", list(CONTROLS))
def test_controls_have_the_ticket_s_counts_and_draw_by_seed(name: str) -> None:
    mine = ticket()
    points, masks = CONTROLS[name](mine)
    again = CONTROLS[name](mine)
    assert torch.equal(points.matrix(), again[0].matrix())
    assert all(torch.equal(masks[n], again[1][n]) for n in masks)
    for n in mine.masks:
        assert torch.equal(masks[n].flatten(1).sum(1), mine.masks[n].flatten(1).sum(1))
        assert torch.equal(masks[n], mine.masks[n]) is (name != "random")
    alone = CONTROLS[name](
        Ticket(TASK, mine.layers, mine.start.select([1]), {n: m[1:] for n, m in mine.masks.items()}, [1], 3)
    )
    assert torch.equal(alone[0].matrix()[0], points.matrix()[1])


def test_what_each_control_changes() -> None:
    mine = ticket()
    made = {name: make(mine)[0] for name, make in CONTROLS.items()}
    name, alive = "0.weight", mine.masks["0.weight"]
    start = mine.start[name]
    assert torch.equal(made["random"].matrix(), mine.start.matrix())
    assert torch.equal(made["signs"][name].sign(), start.sign())
    assert not torch.equal(made["signs"][name], start)
    assert (made["reinit"][name].sign() != start.sign()).any()
    for i in range(2):
        before, after = start[i][alive[i]], made["shuffled"][name][i][alive[i]]
        assert not torch.equal(before, after)
        assert torch.equal(before.sort().values, after.sort().values)


@pytest.mark.parametrize("weights", [40, 41, 100, 10_000])
def test_the_small_dense_network(weights: int) -> None:
    task = TASK.replace(model=mlp(4, 60, 30, 3, activation="tanh"))
    found = prunable(smaller(task, prunable(task.model()), weights).model())
    assert found.total <= min(weights, 4 * 60 + 60 * 30 + 90)
    if weights >= 2000:
        assert found.total == 4 * 60 + 60 * 30 + 90


def test_a_dense_control_needs_a_chain() -> None:
    task = TASK.replace(model=conv2(1, 8))
    with pytest.raises(LosslabError, match="dense control"):
        smaller(task, prunable(task.model()), 100)
