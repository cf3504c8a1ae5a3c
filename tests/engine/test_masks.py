"""Pruned weights are zero and stay so, and what is left trains as if they had never been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab import EarlyStopping, LosslabError, Points, Population, Task, TorchRule, supervised, train
from losslab.engine import checkpoints
from losslab.engine.gradients import Factored
from losslab.engine.masks import PrunedCurvature, Pruning, as_masks, stays_at_zero
from losslab.rules import RULES, Adam, make
from losslab.rules.schedules import warmup
from losslab.tasks import mlp

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()
TASK = supervised(mlp(3, 5, 3, activation="tanh"), (X, Y), (X, Y))
UNIT = torch.tensor([True, False, True, True, False])
UNITS = {
    "0.weight": UNIT[:, None].expand(5, 3),
    "0.bias": UNIT,
    "2.weight": UNIT[None].expand(3, 5),
}
STEPS = 4

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    (name, {"damping": 0.1} if name == "newton" else {}) for name in RULES
] + [
    ("adam", {"variant": "lecture"}),
    ("adam", {"weight_decay": 0.1, "decay": "decoupled", "lr": [0.01, 0.02]}),
    ("adam", {"weight_decay": 0.1, "clip": 0.01}),
    ("amsgrad", {"variant": "optax"}),
    ("momentum", {"variant": "sutskever", "weight_decay": 0.3}),
    ("adagrad", {"variant": "dual", "l1": 0.01}),
    ("rmsprop", {"centred": True}),
    ("sgd", {"box": 0.3}),
    ("nesterov", {"lr": warmup([0.01, 0.1], steps=3)}),
]


def masks(seed: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "0.weight": torch.rand(2, 5, 3, generator=g) < 0.5,
        "2.weight": torch.rand(3, 5, generator=g) < 0.4,
    }


def go(rule: Any, task: Task = TASK, **told: Any) -> Population:
    settings: dict[str, Any] = {
        "seeds": 2,
        "steps": STEPS,
        "batch_size": 8,
        "dtype": "float64",
        "execution": "stacked",
        "evaluate": None,
        "record": 1,
        "progress": False,
    }
    return train(task, rule, **(settings | told))


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_pruned_weights_are_zero_after_every_step_of_every_rule(name: str, settings: dict[str, Any]) -> None:
    seen = []

    def look(population: Population) -> None:
        seen.append(population.step)
        for weight, kept in population.masks.items():
            assert (population.points[weight][~kept] == 0).all()
            for tensors in population.state.values():
                if weight in tensors and tensors[weight].shape == kept.shape:
                    assert (tensors[weight][~kept] == 0).all()

    rule = make(name, **settings)
    batch = None if rule.full_batch else 8
    trained = go(rule, masks=masks(), watch=look, batch_size=batch)
    assert seen == [1, 2, 3, 4]
    assert torch.isfinite(trained.points.matrix()).all()
    assert (trained.points["0.bias"] != 0).all()  # what lives has trained


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.LBFGS, torch.optim.Rprop])
def test_pruned_weights_are_zero_under_torchs_optimizers(optimizer: Any) -> None:
    def look(population: Population) -> None:
        for weight, kept in population.masks.items():
            assert (population.points[weight][~kept] == 0).all()

    trained = go(TorchRule(optimizer, lr=0.1), masks=masks(), watch=look)
    assert torch.isfinite(trained.points.matrix()).all()


def small(of: Points) -> list[nn.Module]:
    """The networks of the units that live."""
    made = []
    for i in range(of.members):
        net = mlp(3, 3, 3, activation="tanh")().double()
        values = {
            "0.weight": of["0.weight"][i][UNIT],
            "0.bias": of["0.bias"][i][UNIT],
            "2.weight": of["2.weight"][i][:, UNIT],
            "2.bias": of["2.bias"][i],
        }
        net.load_state_dict(values)
        made.append(net)
    return made


DRAWS = ("perturbed", "auto-rate")  # as many numbers as there are weights


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_network_without_some_units_trains_as_the_smaller_one(name: str, settings: dict[str, Any]) -> None:
    rule = make(name, **settings)
    if any(word in name for word in DRAWS):
        pytest.skip("draws for every weight")
    batch = None if rule.full_batch else 8
    start = go("sgd", steps=0).points
    large = go(rule, masks=UNITS, start=start, batch_size=batch)
    less = TASK.replace(model=mlp(3, 3, 3, activation="tanh"))
    reference = go(rule, less, start=Points.from_modules(small(start)), batch_size=batch)
    found = Points.from_modules(small(large.points))
    torch.testing.assert_close(found.matrix(), reference.points.matrix(), rtol=1e-9, atol=1e-12)
    norms = [p.history[["loss", "gradient_norm", "update_norm"]] for p in (large, reference)]
    torch.testing.assert_close(*(torch.tensor(n.to_numpy()) for n in norms), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("execution", ["stacked", "loop"])
def test_a_member_alone_is_the_member_of_a_population(execution: str) -> None:
    both = go("adam", masks=masks(), execution=execution)
    one = {n: m[1] if m.dim() == 3 else m for n, m in masks().items()}
    alone = go("adam", seeds=[1], masks=one, execution=execution)
    torch.testing.assert_close(alone.points.matrix()[0], both.points.matrix()[1], rtol=1e-12, atol=0)


def test_large_gradients_stay_factors() -> None:
    g, x = torch.randn(2, 4, 6), torch.randn(2, 4, 8)
    kept = torch.rand(2, 6, 8) < 0.5
    weights = {"w": torch.randn(2, 6, 8)}
    pruning = Pruning({"w": kept}, weights, Adam(lr=0.1), fused=True)
    from losslab.engine.gradients import Gradients

    found = pruning.gradients(Gradients({"w": Factored(g, x)}))
    part = found.parts["w"]  # type: ignore[attr-defined]
    assert isinstance(part, Factored)
    assert not pruning.dead  # one product a step is all
    whole = torch.einsum("nbo,nbi->noi", g, x) * kept
    torch.testing.assert_close(torch.stack(list(part.unbind(0))), whole)
    torch.testing.assert_close(found["w"], whole)


def test_which_rules_need_to_be_set_to_zero() -> None:
    assert all(stays_at_zero(make(n)) for n in ("adam", "sgd", "momentum", "rmsprop", "nesterov"))
    assert not stays_at_zero(Adam(variant="lecture"))
    assert not stays_at_zero(make("newton"))
    assert not stays_at_zero(TorchRule(torch.optim.SGD, lr=0.1))


def test_members_that_leave_do_not_disturb_masks() -> None:
    lr = [1e308, 0.01]
    told = go(Adam(lr=lr), masks=masks(), steps=6)
    alone = go(
        Adam(lr=0.01), seeds=[1], masks={n: m[1] if m.dim() == 3 else m for n, m in masks().items()}, steps=6
    )
    assert told.diverged.tolist()[1] == -1
    assert told.diverged.tolist()[0] >= 0
    torch.testing.assert_close(told.points.matrix()[1], alone.points.matrix()[0], rtol=1e-12, atol=0)


class Broken(Exception):
    """Stands for anything that ends a process."""


@pytest.mark.parametrize("rule", ["adam", "newton", "torch"])
def test_a_masked_run_resumes_bit_for_bit(rule: str, tmp_path: Path) -> None:
    how = (
        TorchRule(torch.optim.Adam, lr=0.01)
        if rule == "torch"
        else make(rule, **({"damping": 0.1} if rule == "newton" else {}))
    )

    def breaks(population: Population) -> None:
        if population.step == 4:
            raise Broken

    unbroken = go(how, masks=masks(), steps=7)
    with pytest.raises(Broken):
        go(how, masks=masks(), steps=7, out=tmp_path, checkpoint_every=0, watch=breaks)
    held, _, _ = checkpoints.newest(tmp_path / "checkpoints") or ({}, {}, [])
    assert held["masks/0.weight"].dtype is torch.bool
    with pytest.raises(LosslabError, match="masks was"):
        go(how, masks=masks(4), steps=7, out=tmp_path, resume=True)
    with pytest.raises(LosslabError, match="masks was"):
        go(how, steps=7, out=tmp_path, resume=True)
    resumed = go(how, masks=masks(), steps=7, out=tmp_path, resume=True)
    assert torch.equal(resumed.points.matrix(), unbroken.points.matrix())
    assert all(torch.equal(resumed.masks[n], unbroken.masks[n]) for n in unbroken.masks)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"3.weight": torch.ones(2)}, "which the model has not"),
        ({"0.weight": torch.ones(3, 5)}, "has shape"),
        ({"0.weight": torch.full((5, 3), 0.5)}, "beside 0 and 1"),
    ],
)
def test_masks_of_another_model_are_refused(bad: dict[str, Tensor], told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        go("sgd", masks=bad)


def test_masks_are_copied_and_numbers_will_do() -> None:
    given = {"0.weight": torch.ones(5, 3)}
    assert as_masks(given, {"0.weight": torch.ones(2, 5, 3)})["0.weight"].shape == (2, 5, 3)
    given["0.weight"][0] = 0
    trained = go("sgd", masks=given)
    given["0.weight"][1] = 0
    assert (trained.points["0.weight"][:, 1] != 0).all()


@pytest.mark.parametrize("rule", [Adam(lr=warmup([0.01, 0.1], steps=5)), make("momentum")])
def test_a_branch_goes_on_as_the_unbroken_run(rule: Any) -> None:
    whole = go(rule, steps=7)
    first = go(rule, steps=3)
    onward = go(rule, steps=7, start=first.branch())
    assert torch.equal(onward.points.matrix(), whole.points.matrix())
    assert onward.history["step"].min() == 3
    other = go(rule, steps=7, seeds=[0, 9], start=first.branch([0, 0]))
    assert torch.equal(other.points.matrix()[0], whole.points.matrix()[0])
    assert not torch.equal(other.points.matrix()[1], whole.points.matrix()[1])
    pruned = go(rule, steps=7, start=first.branch(), masks=masks())
    assert all((pruned.points[n][~m] == 0).all() for n, m in pruned.masks.items())
    assert all((ts[n][~m] == 0).all() for n, m in pruned.masks.items() for ts in pruned.state.values())


def test_a_branch_that_cannot_be_gone_on_from() -> None:
    branch = go("adam", steps=3).branch()
    with pytest.raises(LosslabError, match="training ends at 2"):
        go("adam", steps=2, start=branch)
    with pytest.raises(LosslabError, match="the rule it was trained by"):
        go("momentum", steps=4, start=branch)
    with pytest.raises(LosslabError, match="cannot be handed on"):
        go(TorchRule(torch.optim.SGD, lr=0.1), steps=1).branch()


def test_the_best_weights_are_kept_beside_the_last() -> None:
    stop = EarlyStopping("test_loss", patience=None, restore="keep")
    settings = {"steps": 30, "evaluate": 1, "stop": stop}
    kept = go(make("sgd", lr=8.0), **settings)
    assert kept.step == 30
    best = kept.best_points()
    losses = [float(F.cross_entropy(best.load_into(kept[i], i)(X), Y).detach()) for i in range(2)]
    rows = kept.history.groupby("member").test_loss
    assert losses == pytest.approx(rows.min().tolist(), rel=1e-9)
    assert torch.equal(kept.points.matrix(), go(make("sgd", lr=8.0), steps=30).points.matrix())
    with pytest.raises(LosslabError, match="no best weights"):
        go("sgd").best_points()


def test_pruned_curvature_stays_on_its_device() -> None:
    class Whole:
        def hessian(self) -> torch.Tensor:
            return torch.zeros(2, 3, 3, device="meta")

    keep = torch.ones(2, 3, dtype=torch.bool, device="meta")
    assert PrunedCurvature(Whole(), keep).hessian().device.type == "meta"
