"""The runs that several claims share, and the looks at activations while networks train."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from losslab.engine import train
from losslab.layers import BatchNorm, NoisyBatchNorm, he, with_batchnorm
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import runs, sigmoid_runs
from losslab.lecture.section_6_4.looks import Looks
from losslab.lecture.section_6_4.runs import NOISY, NORMALISED, STANDARD, Setting, bench, side_by_side
from losslab.rules import SGD
from losslab.tasks import Task, mlp, supervised, vgg

NETWORK = he().on(mlp(64, 8, 6, 10))


@pytest.fixture
def tiny() -> Setting:
    return Setting(
        "tiny", NETWORK, "digits", None, epochs=2, every=4, seeds=2, least=10, looked=40, examples=300
    )


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


def tanh_net() -> nn.Module:
    return with_batchnorm(
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Sigmoid(), nn.Linear(4, 2))
    )


def looked(task: Task, steps: int = 3, seeds: int = 2) -> tuple[dict[str, pd.DataFrame], list[nn.Module]]:
    """Looks after every update, and member 0 as it was at each."""
    assert task.train is not None
    looks, seen = Looks(task.train.all()), []

    def watch(population: object) -> None:
        before = copy.deepcopy({n: t.clone() for n, t in population.points.items()})  # type: ignore[attr-defined]
        state = torch.get_rng_state()
        looks(population)  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[n], t) for n, t in population.points.items())  # type: ignore[attr-defined]
        seen.append(population[0])  # type: ignore[index]

    settings = {"execution": "stacked", "record": 1, "evaluate": None, "progress": False}
    train(task, SGD(lr=0.5), seeds=seeds, steps=steps, batch_size=20, watch=watch, **settings)
    return looks.tables(), seen


def test_a_look_is_what_the_network_gives_in_training_mode(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    tables, networks = looked(supervised(tanh_net, data))
    looks = tables["looks"].query("member == 0").set_index(["step", "layer"])
    earlier = None
    for step, network in enumerate(networks, start=1):
        network = network.double().train()
        inputs = network[:2](data[0].double()).detach().numpy()  # what the tanh gets
        row = looks.loc[(step, 1)]
        assert row["saturated"] == pytest.approx(np.mean(1 - np.tanh(inputs) ** 2 < 0.1), abs=1e-12)
        assert [row[f"p{p}"] for p in (15, 50, 85)] == pytest.approx(
            np.percentile(inputs[:, 0], [15, 50, 85])
        )
        assert row["variance"] == pytest.approx(np.median(inputs.var(0)), rel=1e-9)
        if earlier is not None:
            spread = np.subtract(*np.percentile(inputs, [75, 25], axis=0))
            moved = np.abs(np.median(inputs, 0) - np.median(earlier, 0)) / spread
            apart = np.abs(np.sort(inputs, 0) - np.sort(earlier, 0)).mean(0) / spread
            assert row["drift"] == pytest.approx(np.median(moved), rel=1e-6)
            assert row["wasserstein"] == pytest.approx(np.median(apart), rel=1e-6)
        earlier = inputs
        second = looks.loc[(step, 2)]
        assert max(row["mean_error"], row["variance_error"], second["mean_error"]) < 1e-12
        out = network(data[0].double())
        told = tables["outputs"].query("member == 0 and step == @step").iloc[0]
        assert told["loss"] == pytest.approx(nn.functional.cross_entropy(out, data[1]).item(), rel=1e-9)
        assert told["accuracy"] == (out.argmax(1) == data[1]).double().mean().item()
    assert math.isnan(looks.loc[(1, 1), "drift"])


def test_drift_before_the_affine_map_does_not_see_it(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    tables, networks = looked(supervised(tanh_net, data))
    looks = tables["looks"].query("member == 0 and layer == 1").set_index("step")
    normalised = [(m.double()[0](data[0].double()).detach().numpy()) for m in networks]
    normalised = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in normalised]
    spread = np.subtract(*np.percentile(normalised[2], [75, 25], axis=0))
    moved = np.abs(np.median(normalised[2], 0) - np.median(normalised[1], 0)) / spread
    assert looks.loc[3, "drift_normalised"] == pytest.approx(np.median(moved), rel=1e-6)


def test_noise_is_seen_and_has_no_exact_moments(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    def noisy() -> nn.Module:
        return with_batchnorm(tanh_net(), NoisyBatchNorm)

    tables, _ = looked(supervised(noisy, data))
    plain, _ = looked(supervised(lambda: with_batchnorm(tanh_net(), BatchNorm), data))
    assert tables["looks"]["mean_error"].isna().all()
    assert tables["looks"]["drift"].mean() > 2 * plain["looks"]["drift"].mean()


def test_without_batch_norm_there_is_nothing_before_the_affine_map(
    data: tuple[torch.Tensor, torch.Tensor],
) -> None:
    tables, _ = looked(supervised(mlp(5, 6, 4, 2, activation="sigmoid"), data))
    assert tables["looks"]["drift_normalised"].isna().all()
    assert set(tables["looks"]["layer"]) == {1, 2}
    assert tables["samples"].groupby(["step", "layer"]).size().eq(60).all()


def test_units_of_convolutions_are_channels() -> None:
    x = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    task = supervised(
        he().on(vgg(1, width=3, channels=1, size=4, classes=2)), (x, (x.mean((1, 2, 3)) > 0).long())
    )
    tables, networks = looked(task, steps=1)
    inputs = networks[0].double().train()[0](x.double())[:, 0].flatten().detach().numpy()
    assert tables["looks"].query("member == 0")["p50"].iloc[0] == pytest.approx(np.median(inputs))


def test_members_that_diverged_are_nan_and_the_others_go_on(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    task = supervised(mlp(5, 6, 6, 2), data)
    looks = Looks(data)
    settings = {"execution": "stacked", "record": 1, "evaluate": None, "progress": False}
    train(task, SGD(lr=[0.1, 1e30]), seeds=[0, 0], steps=6, batch_size=20, watch=looks, **settings)
    last = looks.tables()["looks"].query("step == 6").set_index(["member", "layer"])["drift"]
    assert np.isfinite(last[0]).all()
    assert last[1].isna().all()


# -- the bench --------------------------------------------------------------------------------------------


def test_a_bench_trains_each_arm_and_rate_once(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, calls = runs.trained, []

    def counted(task: Task, rule: SGD, **settings: object) -> object:
        calls.append(sorted(set(rule.describe()["lr"])))
        return trained(task, rule, **settings)

    monkeypatch.setattr(runs, "trained", counted)
    desk = runs.Bench(tiny)
    first = desk.runs(STANDARD, (0.1, 0.5))
    again = desk.runs(STANDARD, (0.5, 1.0))
    assert calls == [[0.1, 0.5], [1.0]]
    same = first["curves"].query("lr == 0.5").reset_index(drop=True)
    pd.testing.assert_frame_equal(again["curves"].query("lr == 0.5").reset_index(drop=True), same)
    assert set(first["looks"]["lr"]) == {0.1}
    assert "looks" not in again


def test_a_run_does_not_depend_on_its_company(tiny: Setting) -> None:
    together = runs.Bench(tiny).runs(NORMALISED, (0.1, 0.5))
    alone = runs.Bench(tiny).runs(NORMALISED, (0.1,))
    columns = ["step", "seed", "train_loss"]
    pd.testing.assert_frame_equal(
        together["curves"].query("lr == 0.1")[columns].reset_index(drop=True),
        alone["curves"][columns].reset_index(drop=True),
        rtol=1e-4,
    )
    pd.testing.assert_frame_equal(
        together["looks"]["drift"].to_frame(), alone["looks"]["drift"].to_frame(), rtol=1e-3
    )


def test_curves_go_on_after_all_have_diverged(tiny: Setting) -> None:
    curves = runs.Bench(tiny).runs(STANDARD, (1e25,))["curves"]
    assert set(curves["step"]) == {0, 4, 6}
    assert curves.query("step > 0")["train_loss"].eq(math.inf).all()
    assert curves.query("step > 0")["train_accuracy"].isna().all()
    assert np.isfinite(curves.query("step == 0")["train_loss"]).all()


def test_arms_share_their_start_and_noise_has_few_seeds(tiny: Setting) -> None:
    weights = []
    for arm in (STANDARD, NORMALISED, NOISY[0]):
        torch.manual_seed(3)
        weights.append(arm.on(NETWORK)()[0].weight)
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert isinstance(NOISY[1].on(NETWORK)()[1], NoisyBatchNorm)
    assert NOISY[1].on(NETWORK)()[1].strength == 2.0
    many = runs.Bench(Setting(**{**tiny.__dict__, "seeds": 6}))
    assert many.runs(NOISY[1], (0.1,))["curves"]["seed"].nunique() == runs.FEW
    assert many.runs(NOISY[0], (0.1,))["curves"]["seed"].nunique() == 6


def test_side_by_side_tells_which_network(tiny: Setting) -> None:
    tables = side_by_side(Lab(), [tiny], (STANDARD, NORMALISED))
    assert set(tables) == {"curves", "looks", "samples", "outputs"}
    for table in tables.values():
        assert set(table["network"]) == {"tiny"}
        assert set(table["arm"]) == {"standard", "batch norm"}
    assert bench(tiny) is bench(Setting(**tiny.__dict__))


def test_settings_follow_the_profile(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.deep(Lab()).data == runs.deep(Lab("paper")).data == "digits"
    assert runs.deep(Lab("full", data=tmp_path)).data == "MNIST"  # type: ignore[arg-type]
    assert runs.deep(Lab(seeds=3)).seeds == 3
    assert runs.convolutional(Lab("full", data=tmp_path)).data == "digit images"  # type: ignore[arg-type]
    paper = Lab("paper", data=tmp_path)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = runs.convolutional(paper)
    assert (small.data, small.device, small.examples) == ("CIFAR-10", "cpu", 2000)
    assert "no GPU" in small.note
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    large = runs.convolutional(paper)
    assert (large.device, large.examples, large.note) == ("cuda", None, "")
    assert sigmoid_runs.setting_of(paper).steps == 50_000
    assert sigmoid_runs.setting_of(Lab("paper")).data == "digits"


# -- the sigmoid networks -----------------------------------------------------------------------------------

SIGMOIDS = sigmoid_runs.Setting("digits", 64, 0.3, 60, 40, 10, 2, 10)


def test_sigmoid_runs_have_every_comparison() -> None:
    found = sigmoid_runs.run(SIGMOIDS)
    rates = found.curves.groupby(["network", "rated"])["lr"].first()
    own = {
        network: rates[network, sigmoid_runs.OWN]
        for network in (*sigmoid_runs.BASELINES, sigmoid_runs.NORMALISED)
    }
    for baseline in sigmoid_runs.BASELINES:
        assert rates[sigmoid_runs.NORMALISED, baseline] == own[baseline]
    best = found.tuning.loc[found.tuning.groupby("network")["score"].idxmin()].set_index("network")["lr"]
    assert best.to_dict() == own
    ends = found.curves.groupby("rated")["step"].max()
    assert (ends[sigmoid_runs.OWN], ends[sigmoid_runs.GAUSSIAN]) == (60, 30)
    assert (
        found.looks.query("layer == 1 and rated == @sigmoid_runs.OWN").groupby("network").size().eq(2).all()
    )


def test_accuracy_is_measured_more_often_at_first() -> None:
    assert SIGMOIDS.when(60) == [0, 2, 4, 6, 16, 26, 36, 46, 56, 60]
    assert SIGMOIDS.when(30) == [0, 2, 4, 6, 16, 26, 30]


def test_reached_counts_the_target_itself() -> None:
    rows = pd.DataFrame(
        {"member": 0, "step": [0, 5, 10], "accuracy": np.float32([0.1, 0.9, 0.95]).astype(float)}
    )
    assert sigmoid_runs.reached(rows, "accuracy", 0.9).tolist() == [5.0]
    assert sigmoid_runs.reached(rows, "accuracy", 0.96).tolist() == [math.inf]
