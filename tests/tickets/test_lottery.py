"""The experiment: its arms, its rewinding, what resuming keeps, and the tables and verdicts it gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from losslab import LosslabError, Task, supervised, train
from losslab.engine import Branch, ExecutionNotice
from losslab.layers import xavier
from losslab.rules import SGD, Adam, Momentum
from losslab.rules.schedules import warmup
from losslab.tasks import conv2, mlp
from losslab.tickets import Lottery, Plan, Scope, lottery, prunable, reopened
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


def test_living_weights_of_either_sign_train(found: Lottery) -> None:
    level = found.outcome(2)
    for name, mask in level.masks.items():
        start, end = level.start.points[name], level.final[name]
        for sign in (-1, 1):
            there = mask & (start.sign() == sign)
            assert there.any()
            assert (start[there] != end[there]).float().mean() > 0.5  # those of dead units stay


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
        "curves.csv", *(f"level-0{k}.safetensors" for k in range(3)), "machine.json", "plan.json",
        "table.csv",
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
import os, signal, sys
from pathlib import Path
from tests.tickets.test_lottery import SHORT, TASK, lottery
from losslab.engine import checkpoints

def die():
    os.kill(os.getpid(), signal.SIGKILL)

save, place = checkpoints.save_step, sys.argv[2]

def dying(folder, step, *rest):
    save(folder, step, *rest)
    if place == "within" and folder.parent.name == "level-01" and step >= 5:
        die()

checkpoints.save_step = dying
watch = lambda found: die() if place == "between" and len(found.levels) == 2 else None
out, resume = Path(sys.argv[1]), place == "between"
lottery(TASK, SHORT, out=out, resume=resume, checkpoint_every=0, progress=False, watch=watch)
"""


def test_a_lottery_killed_with_signal_9_goes_on_bit_for_bit(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for place, levels in (("within", 1), ("between", 2)):
        child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), place], env=environment)
        assert child.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob("level-*.safetensors"))) == levels
        # Within a level it left checkpoints to go on from, between levels nothing but the levels.
        assert bool(list(tmp_path.glob("level-01/checkpoints/*"))) is (place == "within")
    same(drawn(out=tmp_path, resume=True), drawn())


@pytest.mark.parametrize("at", ["shutil.rmtree", "write_atomically"])
def test_a_lottery_broken_off_as_a_level_is_written_goes_on(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        if (tmp_path / "level-01.safetensors").exists():
            raise Broken
        if at == "write_atomically":
            original(*_, **__)

    original = room.write_atomically
    with monkeypatch.context() as patch:
        patch.setattr(room if at == "write_atomically" else room.shutil, at.rpartition(".")[2], broken)
        with pytest.raises(Broken):
            drawn(out=tmp_path)
    same(drawn(out=tmp_path, resume=True), drawn())


def test_files_of_a_folder_that_are_not_what_they_seem(tmp_path: Path) -> None:
    drawn(out=tmp_path, levels=1, controls=())
    first, second = (tmp_path / f"level-0{k}.safetensors" for k in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(LosslabError, match="holds level 0"):
        drawn(out=tmp_path, levels=1, controls=(), resume=True)
    for text in ("[]", "{", "1"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(LosslabError, match="damaged"):
            drawn(out=tmp_path, levels=1, controls=(), resume=True)


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
        ({"scope": Scope(rate=0.9, units=True), "levels": 2}, "without units"),
        ({"levels": 60}, "level 18 would prune nothing"),
        ({"levels": 60, "scope": Scope(units=True)}, "level [0-9] would prune nothing"),
        ({"levels": 60, "one_shot": True}, "level 23 would leave '0.weight' without"),
        ({"levels": 60, "criterion": "snip"}, "level 23 would leave '0.weight' without"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        drawn(**changes)


def test_what_cannot_be_done_is_told_before_anything_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(room, "train", never)
    images = torch.randn(40, 1, 8, 8, generator=G)
    task = supervised(conv2(1, 8), (images, torch.zeros(40, dtype=torch.int64)))
    with pytest.raises(LosslabError, match="dense control"):
        drawn(task, tmp_path, controls=("dense",))
    with pytest.raises(LosslabError, match="without units"):
        drawn(out=tmp_path, scope=Scope(rate=0.9, units=True))
    assert not list(tmp_path.iterdir())


class Recurrent(nn.Module):
    """Torch's recurrent layers cannot be batched over networks."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x.unflatten(1, (2, 3)))[0][:, -1])


def test_networks_that_cannot_be_batched_are_drawn_one_by_one() -> None:
    task = supervised(Recurrent, DATA[0], DATA[1], DATA[2])
    plan = Plan(levels=1, replicates=2, steps=4, evaluate=4, batch_size=10, controls=("reinit",))
    with pytest.raises(LosslabError, match="cannot be run as one program"):
        lottery(task, plan, progress=False)
    with pytest.warns(ExecutionNotice, match="they are trained one by one"):
        drawn = lottery(task, plan, progress=False, execution="auto")
    same(drawn, lottery(task, plan, progress=False, execution="loop"))
    with pytest.raises(LosslabError, match="not a scalar"):  # not taken for a network that cannot be batched
        lottery(task.replace(loss=lambda m, b: m(b[0])), plan, progress=False, execution="auto")


def test_a_folder_is_read_as_far_as_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(out=tmp_path, levels=2)
    (tmp_path / "level-02.safetensors").unlink()
    monkeypatch.setattr(room, "train", None)
    again = reopened(TASK, first.plan, tmp_path)
    assert len(again.levels) == 2
    assert again.table.equals(first.table[first.table.level < 2])
    with pytest.raises(LosslabError, match="holds no finished level"):
        reopened(TASK, first.plan, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(LosslabError, match="differs in steps"):
        reopened(TASK, Plan(**{**vars(first.plan), "steps": 13}), tmp_path)


def test_networks_that_diverge_have_no_final_accuracy_and_no_early_stop() -> None:
    found = drawn(levels=1, rule=SGD(lr=1e30), controls=("reinit",))
    table = found.table
    assert (table.diverged >= 0).all()
    assert table[["final_test_accuracy", "final_train_accuracy", "final_test_loss"]].isna().all(axis=None)
    assert table[["test_accuracy", "validation_loss"]].notna().all(axis=None)  # at the look before
    rows = found.compare(1)
    assert rows.diverged.tolist() == [2, 2]
    assert rows.difference.notna().all()
    assert rows.faster.isna().all()
    assert found.verdict(1) != "winning ticket"
    assert "diverged" in found.sentences()[-1]


def test_levels_and_weights_that_are_not_there(found: Lottery) -> None:
    with pytest.raises(LosslabError, match="was not drawn"):
        found.ticket(3)
    with pytest.raises(LosslabError, match="no tickets"):
        found.compare(0)
    with pytest.raises(LosslabError, match="weights of a ticket"):
        found.ticket(1, 0, "last")
    assert prunable(TASK.model()).output == "4.weight"
