"""Tickets as ordinary modules: torch's masks, exact compaction, its speed; and instability."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from losslab import LosslabError, supervised, train
from losslab.engine import Branch, Objective, randomness
from losslab.rules import SGD, Momentum, State
from losslab.tasks import conv2, digits_task, mlp
from losslab.tickets import (
    Plan,
    compact,
    instability,
    lottery,
    speed,
    stability_sentences,
    stability_summary,
    with_torch_masks,
)

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def masked(
    density: float, *widths: int, activation: str = "relu", seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    module = mlp(*widths, activation=activation)()
    masks = {
        n: torch.rand(p.shape, generator=g) < density for n, p in module.named_parameters() if p.dim() == 2
    }
    return module, masks


def test_torch_s_pruning_knows_the_masks() -> None:
    module, masks = masked(0.4, 6, 9, 3)
    before = {n: p.clone() for n, p in module.named_parameters()}
    made = with_torch_masks(module, masks)
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters())
    with torch.no_grad():
        for n, mask in masks.items():
            layer = made.get_submodule(n.removesuffix(".weight"))
            assert torch.equal(layer.weight_mask, mask.float())
            assert torch.equal(layer.weight, before[n] * mask)
            prune.remove(layer, "weight")
            assert torch.equal(layer.weight, before[n] * mask)
    with pytest.raises(LosslabError, match="does not fit the network"):
        with_torch_masks(module, {"0.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.3, 0.9])
def test_a_compacted_network_is_the_same_function(density: float, activation: str) -> None:
    for seed in range(5):
        module, masks = masked(density, 6, 20, 15, 3, activation=activation, seed=seed)
        with torch.no_grad():
            for n, mask in masks.items():
                module.get_parameter(n).mul_(mask)
            found = compact(module)
            torch.testing.assert_close(found.module(X), module(X), rtol=1e-5, atol=1e-6)
        assert found.widths[0] == 6
        assert found.widths[-1] == 3
        assert found.before == [6, 20, 15, 3]
        assert found.weights == sum(p.numel() for n, p in found.module.named_parameters() if p.dim() == 2)
        if density < 0.1:
            assert found.widths[1] < 20


def test_dead_units_and_constant_inputs_go_together() -> None:
    module = mlp(2, 3, 3, 1)()
    with torch.no_grad():
        module[0].weight[0] = 0  # a constant, fed on
        module[2].weight[:, 1] = 0  # unheard
        module[2].weight[2] = 0  # a constant, and what only it heard is unheard too
        assert compact(module).widths == [2, 1, 2, 1]
    with pytest.raises(LosslabError, match="no chain"):
        compact(conv2(1, 8)())


def test_speed_tells_one_way_or_the_other() -> None:
    module, masks = masked(0.001, 64, 800, 800, 10)
    with torch.no_grad():
        for n, mask in masks.items():
            module.get_parameter(n).mul_(mask)
    found = speed(module, torch.randn(64, 64), rounds=3, calls=1)
    assert found.low <= found.ratio <= found.high
    assert ("times as fast" in found.told) is (found.low > 1)
    assert ("does not pay" in found.told) is (found.low <= 1)


def test_copies_of_a_finished_run_agree_and_early_ones_do_not() -> None:
    found = instability(
        digits_task(mlp(64, 12, 10)), SGD(lr=0.3), at=[0, 60], steps=60, replicates=2, points=7, batch_size=20
    )
    assert found.groupby(["k", "replicate"]).size().eq(2).all()
    late = found[found.k == 60]
    assert (late.instability.abs() < 1e-6).all()
    assert late[late.measure == "error"].stable.all()
    early = found[(found.k == 0) & (found.measure == "loss")]
    assert (early.instability > 1e-4).all()
    assert (early["first"] != early["second"]).all()


def test_the_barrier_is_that_of_the_segment() -> None:
    y = (X[:, :1] * 2).float()
    task = supervised(lambda: nn.Linear(6, 1), (X, y), criterion=nn.functional.mse_loss)
    found = instability(task, SGD(lr=0.05), at=[0], steps=3, replicates=1, points=5, batch_size=5)
    assert found.measure.tolist() == ["loss"]  # a convex loss has its maximum at an end
    row = found.iloc[0]
    assert row.instability == pytest.approx(
        max(row["first"], row["second"]) - (row["first"] + row["second"]) / 2
    )
    masks = {"weight": torch.tensor([[True, True, False, False, True, True]])}
    assert len(instability(task, SGD(lr=0.05), steps=2, replicates=2, batch_size=5, masks=masks)) == 2


def test_tickets_part_from_their_own_start_under_their_own_masks() -> None:
    y = (X[:, 0] > 0).long()
    task = supervised(mlp(6, 8, 2), (X, y), validation=(X, y))
    plan = Plan(levels=2, replicates=2, steps=8, evaluate=4, batch_size=5, rule=Momentum(lr=0.1), rewind=3)
    drawn = lottery(task, plan, progress=False)
    found = drawn.instability(2, [3, 5], points=3)
    assert found.groupby("k").replicate.nunique().to_dict() == {3: 2, 5: 2}
    own = drawn.outcome(2)
    for replicate in (0, 1):  # each ticket by itself, by hand
        masks = drawn.masks(2, replicate)
        keys = [randomness.key(replicate, "order of a copy", 3, copy) >> 1 for copy in (0, 1)]
        ends = [
            train(drawn.task, plan.rule, seeds=[key], steps=8, start=one, masks=masks, batch_size=5)
            for key in keys
            for one in [Branch(own.start.points.select([replicate]), rows(own.start.state, replicate), 3)]
        ]
        objective = Objective(drawn.task, "validation")
        a, b = (end.points for end in ends)
        middle = objective.value(a.at(0.5 * (a.matrix() + b.matrix())))
        losses = [float(objective.value(p)) for p in (a, b)]
        row = found[(found.k == 3) & (found.replicate == replicate) & (found.measure == "loss")].iloc[0]
        assert sorted([row["first"], row["second"]]) == pytest.approx(sorted(losses), rel=1e-5)
        assert row.instability == pytest.approx(max(*losses, float(middle)) - sum(losses) / 2, abs=1e-6)
    with pytest.raises(LosslabError, match="start at 3"):
        drawn.instability(2, [0])
    with pytest.raises(LosslabError, match="was not drawn"):
        drawn.instability(3, [3])
    with pytest.raises(LosslabError, match="masks of this model"):
        instability(task, steps=2, replicates=2, masks={"0.weight": torch.ones(3, 8, 6)})


def rows(state: State, row: int) -> State:
    return {slot: {n: t[[row]] for n, t in tensors.items()} for slot, tensors in state.items()}


@pytest.mark.parametrize(
    ("heights", "said"),
    [
        ([0.3, 0.2], "Not stable, even from step 100: 0 of 3 pairs"),
        (
            [0.3, 0.01],
            "Stable from step 100, where every pair's error barrier is below 2 %; not yet from step 0",
        ),
        ([0.01, 0.01], "Stable from step 0, the first asked for"),
        ([0.01, 0.3], "Not stable"),
    ],
)
def test_from_where_on_training_is_stable(heights: list[float], said: str) -> None:
    rows = [
        {"k": k, "replicate": i, "measure": "error", "instability": height, "first": 0.1, "second": 0.3}
        | {"stable": height < 0.02}
        for k, height in zip((0, 100), heights, strict=True)
        for i in range(3)
    ]
    found = pd.DataFrame(rows)
    assert stability_sentences(found)[-1].startswith(said)
    shown = stability_summary(found)
    assert shown.error_barrier.tolist() == pytest.approx(heights)
    assert shown.error_at_the_ends.tolist() == pytest.approx([0.2, 0.2])


def test_steps_that_cannot_be() -> None:
    task = digits_task()
    with pytest.raises(LosslabError, match="copied at"):
        instability(task, at=[11], steps=10)
    with pytest.raises(LosslabError, match="at least 1 and 3"):
        instability(task, steps=10, replicates=0)
    assert train(task, "sgd", steps=0, progress=False).step == 0
