"""The experiment: its arms, its rewinding, what resuming keeps, and the tables and verdicts it gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from losslab import LosslabError, Task, supervised, train
from losslab.engine import Branch
from losslab.layers import xavier
from losslab.rules import Adam, Momentum
from losslab.rules.schedules import warmup
from losslab.tasks import mlp
from losslab.tickets import Lottery, Plan, Scope, lottery, prunable
from losslab.tickets import experiment as room

G = torch.Generator().manual_seed(0)
X = torch.randn(90, 6, generator=G)
Y = (X[:, 0] > 0).long() + (X[:, 1] * X[:, 2] > 0.3).long()
DATA = [(X[:50], Y[:50]), (X[50:70], Y[50:70]), (X[70:], Y[70:])]
TASK = supervised(mlp(6, 12, 8, 3), DATA[0], DATA[1], DATA[2])
SHORT = Plan(levels=2, replicates=2, steps=12, evaluate=4, batch_size=10, rule=Adam(lr=0.02))


def drawn(task: Task = TASK, out: Path | None = None, resume: bool = False, **changes: Any) -> Lottery:
    plan = Plan(**{**{n: getattr(SHORT, n) for n in SHORT.__dataclass_fields__}, **changes})
    return lottery(task, plan, out=out, resume=resume, progress=False)


def same(a: Lottery, b: Lottery) -> None:
    assert a.table.equals(b.table)
    assert a.curves.equals(b.curves)
    for one, other in zip(a.levels, b.levels, strict=True):
        for kind in ("final", "best"):
            assert torch.equal(getattr(one, kind).matrix(), getattr(other, kind).matrix())
        assert all(torch.equal(m, other.masks[n]) for n, m in one.masks.items())


@pytest.fixture(scope="module")
def found() -> Lottery:
    return drawn(controls=("reinit", "random", "dense"))


def test_the_table_has_every_arm_and_the_counts_of_the_scope(found: Lottery) -> None:
    table = found.table
    shares = SHORT.scope.shares(found.layers, 2)
    assert list(table[table.level == 1].arm.unique()) == ["ticket", "reinit", "random", "small dense"]
    for level in (1, 2):
        rows = table[(table.level == level) & (table.arm != "small dense")]
        assert (rows.remaining - shares[level]).abs().max() < 1e-12
        small = table[(table.level == level) & (table.arm == "small dense")]
        assert (small.kept <= rows.kept.min()).all()
    assert {"test_accuracy", "final_test_accuracy", "final_train_loss", "validation_loss"} <= set(table)


def test_early_stop_is_the_least_validation_loss_and_test_is_read_there(found: Lottery) -> None:
    for keys, rows in found.curves.groupby(["level", "arm", "replicate"]):
        level, arm, replicate = keys
        row = found.table.set_index(["level", "arm", "replicate"]).loc[keys]
        assert rows.step.tolist() == [0, 4, 8, 12]
        best = rows.loc[rows.validation_loss.idxmin()]
        assert row.stop_step == best.step
        assert row.validation_loss == pytest.approx(best.validation_loss, rel=1e-5)
        if arm in ("ticket", "dense"):
            network = found.ticket(int(level), int(replicate))
            with torch.no_grad():
                right = (network(X[50:70]).argmax(-1) == Y[50:70]).float().mean()
            assert row.test_accuracy == pytest.approx(float(right))


def test_tickets_start_where_the_dense_network_did(found: Lottery) -> None:
    dense = train(TASK, "sgd", seeds=2, steps=0, evaluate=None, progress=False)
    for level in (0, 1, 2):
        for i in range(2):
            start = found.ticket(level, i, "start")
            for name, mask in found.masks(level, i).items():
                assert torch.equal(start.get_parameter(name), dense.points[name][i] * mask)
            assert torch.equal(start.get_parameter("0.bias"), dense.points["0.bias"][i])
    assert (found.ticket(2, 1, "final").get_parameter("0.weight")[~found.masks(2, 1)["0.weight"]] == 0).all()


def test_a_ticket_trains_as_the_engine_trains_it_alone(found: Lottery) -> None:
    level = found.outcome(1)
    alone = train(
        TASK, SHORT.rule, seeds=[1], steps=12, batch_size=10, start=found.ticket(1, 1, "start"),
        masks=found.masks(1, 1), evaluate=None, execution="stacked", progress=False,
    )  # fmt: skip
    torch.testing.assert_close(alone.points.matrix()[0], level.final.matrix()[1], rtol=1e-4, atol=1e-6)


def test_magnitude_prunes_the_smallest_trained_weights(found: Lottery) -> None:
    before, now = found.outcome(1), found.outcome(2)
    for name in found.layers.sizes:
        for i in range(2):
            alive, left = before.masks[name][i], now.masks[name][i]
            size = before.final[name][i].abs()
            assert size[left].min() >= size[alive & ~left].max()


def test_rewinding_to_a_step_hands_on_weights_moments_and_schedule() -> None:
    rule = Momentum(lr=warmup(0.1, steps=6), beta=0.9)
    found = drawn(rewind=5, rule=rule, controls=("random",), levels=1)
    early = train(
        TASK, rule, seeds=2, steps=5, batch_size=10, evaluate=None, execution="stacked", progress=False
    )
    assert torch.equal(found.outcome(0).start.points.matrix(), early.points.matrix())
    onward = train(
        TASK, rule, seeds=2, steps=12, batch_size=10, start=early.branch(), masks=found.outcome(1).masks,
        evaluate=None, execution="stacked", progress=False,
    )  # fmt: skip
    torch.testing.assert_close(onward.points.matrix(), found.outcome(1).final.matrix(), rtol=1e-4, atol=1e-6)
    whole = train(
        TASK, rule, seeds=2, steps=12, batch_size=10, evaluate=None, execution="stacked", progress=False
    )
    torch.testing.assert_close(whole.points.matrix(), found.outcome(0).final.matrix(), rtol=1e-4, atol=1e-6)
    assert found.curves.step.max() == 7  # counted from the rewind point


@pytest.mark.parametrize(
    ("rewind", "steps"), [("learning-rate", (0, 12)), ("fine-tune", (12, 24)), ("continue", (24, 36))]
)
def test_other_ways_to_go_on(rewind: str, steps: tuple[int, int]) -> None:
    found = drawn(rewind=rewind, controls=(), levels=2)
    assert found.plan.steps_at(2) == steps
    start, before = found.outcome(2).start, found.outcome(1)
    assert torch.equal(start.points.matrix(), before.final.matrix())
    assert start.step == steps[0]
    assert bool(start.state) is (rewind == "continue")
    held: Branch = start
    alone = train(
        TASK, SHORT.rule, seeds=2, steps=steps[1], batch_size=10, start=held, masks=found.outcome(2).masks,
        evaluate=None, execution="stacked", progress=False,
    )  # fmt: skip
    torch.testing.assert_close(alone.points.matrix(), found.outcome(2).final.matrix(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": "snip", "one_shot": True},
        {"criterion": "synflow", "rounds": 4},
        {"criterion": "random"},
        {"criterion": "movement", "scope": Scope(together=True)},
        {"scope": Scope(units=True, rate=0.3)},
        {"one_shot": True, "init": xavier()},
        {"controls": ("shuffled", "signs"), "control_levels": (2,)},
    ],
    ids=str,
)
def test_other_plans(changes: dict[str, Any]) -> None:
    found = drawn(**changes)
    assert found.table.groupby(["level", "arm"]).size().eq(2).all()
    first, second = (found.outcome(k).masks["0.weight"] for k in (1, 2))
    assert second.sum() < first.sum() < first.numel()
    if "scope" not in changes:
        shares = SHORT.scope.shares(found.layers, 2)
        size = found.layers.total
        remaining = found.table[found.table.arm == "ticket"].groupby("level").remaining.first()
        assert [abs(remaining[k] - shares[k]) * size <= 2 for k in (1, 2)] == [True, True]
    if "control_levels" in changes:
        assert set(found.table[found.table.level == 1].arm) == {"ticket"}
        assert set(found.table[found.table.level == 2].arm) == {"ticket", "shuffled", "signs"}


def test_validation_data_are_held_out_where_there_are_none() -> None:
    task = supervised(mlp(6, 12, 8, 3), DATA[0], DATA[1])
    found = drawn(task, levels=1)
    assert (len(found.task.train or ()), len(found.task.validation or ())) == (46, 4)


# -- the disk ------------------------------------------------------------------------------------------


class Broken(Exception):
    """Stands for anything that ends a process."""


@pytest.mark.parametrize("place", [(1, 6), (2, 3), (0, 9)])
def test_a_lottery_broken_off_within_a_level_goes_on_bit_for_bit(
    place: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Lottery
) -> None:
    controls = ("reinit", "random", "dense")
    original = room.train

    def breaking(*given: Any, **told: Any) -> Any:
        name = str(told.get("out", ""))
        if name.endswith(f"level-{place[0]:02d}"):

            def watch(population: Any) -> None:
                if population.step == place[1]:
                    raise Broken

            told |= {"watch": watch, "record": [0, place[1] - 1], "checkpoint_every": 0}
        return original(*given, **told)

    plan = Plan(**{**{n: getattr(SHORT, n) for n in SHORT.__dataclass_fields__}, "controls": controls})
    monkeypatch.setattr(room, "train", breaking)
    with pytest.raises(Broken):
        lottery(TASK, plan, out=tmp_path, progress=False)
    monkeypatch.setattr(room, "train", original)
    settings = lottery_settings(tmp_path)
    assert settings == place[0]
    with pytest.raises(LosslabError, match="already holds a lottery"):
        drawn(out=tmp_path, controls=controls)
    again = [0, place[1] - 1]
    monkeypatch.setattr(room, "train", lambda *a, **k: original(*a, **(k | {"record": again})))
    resumed = drawn(out=tmp_path, controls=controls, resume=True)
    same(resumed, found)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "curves.csv", *(f"level-0{k}.safetensors" for k in range(3)), "plan.json", "table.csv",
    ]  # fmt: skip


def lottery_settings(folder: Path) -> int:
    return len(list(folder.glob("level-*.safetensors")))


def test_a_finished_lottery_is_read_and_may_go_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn(out=tmp_path, levels=1)
    more = drawn(out=tmp_path, levels=2, resume=True)
    whole = drawn(levels=2)
    same(more, whole)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(room, "train", never)
    same(drawn(out=tmp_path, levels=2, resume=True), whole)
    same(drawn(out=tmp_path, levels=1, resume=True), first)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 13}, "steps"),
        ({"controls": ("reinit",)}, "controls"),
        ({"scope": Scope(rate=0.3)}, "scope"),
        ({"rule": Adam(lr=0.03)}, "rule"),
    ],
)
def test_another_plan_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    drawn(out=tmp_path, levels=1)
    with pytest.raises(LosslabError, match=f"differs in {told}"):
        drawn(out=tmp_path, levels=1, resume=True, **changes)


KILLED = """
from tests.tickets.test_lottery import TASK, Plan, Adam, lottery
from pathlib import Path
plan = Plan(
    levels=2, replicates=2, steps=500, evaluate=100, batch_size=10, rule=Adam(lr=0.02), controls=("reinit",)
)
lottery(TASK, plan, out=Path({out!r}), resume={resume}, checkpoint_every=0, progress=False)
"""


def test_a_lottery_killed_with_signal_9_goes_on_bit_for_bit(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    out, resume = tmp_path / "killed", False
    for _ in range(2):
        code = KILLED.format(out=str(out), resume=resume)
        child = subprocess.Popen([sys.executable, "-c", code], env=environment)
        deadline = time.monotonic() + 60
        before = len(list(out.glob("**/*.safetensors")))
        while (
            len(list(out.glob("**/step-*.safetensors"))) < 2
            or len(list(out.glob("**/*.safetensors"))) <= before
        ):
            assert time.monotonic() < deadline
            if child.poll() is not None:
                break
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL) if child.poll() is None else None
        child.wait()
        resume = True
    plan = Plan(
        levels=2, replicates=2, steps=500, evaluate=100, batch_size=10, rule=Adam(lr=0.02),
        controls=("reinit",),
    )  # fmt: skip
    resumed = lottery(TASK, plan, out=out, resume=True, progress=False)
    same(resumed, lottery(TASK, plan, progress=False))


# -- comparisons ---------------------------------------------------------------------------------------


def planted(ticket: float, control: float, dense: float = 0.9, spread: float = 0.001) -> Lottery:
    """A lottery of one level with accuracies of one's choice."""
    real = drawn(levels=1, replicates=2)
    rows: dict[str, list[float]] = {"dense": [], "ticket": [], "reinit": [], "random": []}
    middle = {"dense": dense, "ticket": ticket, "reinit": control, "random": control}
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) * spread
    for k, arm in enumerate(rows):
        rows[arm] = (middle[arm] + noise[k]).tolist()
    for outcome in real.levels:
        arms = ("dense",) if outcome.level == 0 else ("ticket", "reinit", "random")
        base = outcome.rows[0]
        outcome.rows = [
            base
            | {
                "arm": a,
                "replicate": i,
                "test_accuracy": rows[a][i],
                "stop_step": 100 if a == "ticket" else 200,
            }
            for a in arms
            for i in range(8)
        ]
    return real


@pytest.mark.parametrize(
    ("ticket", "control", "said"),
    [
        (0.9, 0.88, "winning ticket"),
        (0.88, 0.85, "no winning ticket"),
        (0.9, 0.92, "no winning ticket"),
        (0.9, 0.9, "undecided"),
    ],
)
def test_the_verdict(ticket: float, control: float, said: str) -> None:
    spread = 0.001 if control != ticket else 0.01
    found = planted(ticket, control, spread=spread)
    assert found.verdict(1) == said
    assert found.verdicts().verdict.tolist() == ["dense", said]
    rows = found.compare(1).set_index("opponent")
    assert rows.loc["dense", "difference"] == pytest.approx(ticket - 0.9, abs=2 * spread)
    assert rows.faster.tolist() == pytest.approx([2.0] * 3)
    assert (rows.low <= rows.difference).all()
    assert said in found.line(1)


def test_intervals_are_student_s() -> None:
    from scipy import stats

    from losslab.tickets.outcome import _interval

    values = [0.3, -0.1, 0.5, 0.2, 0.9]
    mean, low, high = _interval(values)
    told = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    assert (low, high) == pytest.approx(told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rewind": 12}, "rewind step is 12"),
        ({"rewind": -1}, "rewind step is -1"),
        ({"rewind": "start"}, "rewind point"),
        ({"controls": ("luck",)}, "control"),
        ({"control_levels": (3,)}, "control_levels names 3"),
        ({"levels": 0}, "levels is 0"),
        ({"replicates": 0}, "replicates is 0"),
        ({"rule": Adam(lr=[0.1, 0.2])}, "single value"),
        ({"rounds": 3}, "trained weights"),
        ({"scope": Scope(rate=0.9), "levels": 20}, "without weights"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        drawn(**changes)


def test_levels_and_weights_that_are_not_there(found: Lottery) -> None:
    with pytest.raises(LosslabError, match="was not drawn"):
        found.ticket(3)
    with pytest.raises(LosslabError, match="no tickets"):
        found.compare(0)
    with pytest.raises(LosslabError, match="weights of a ticket"):
        found.ticket(1, 0, "last")
    assert prunable(TASK.model()).output == "4.weight"
