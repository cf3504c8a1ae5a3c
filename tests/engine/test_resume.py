"""A run that is broken off and resumed ends as the unbroken run, bit for bit."""

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
import torch.nn.functional as F
from tests.engine.cases import NAMED, Case, by, regressed, task_of

from losslab import EarlyStopping, Population, TorchRule, train
from losslab.engine import checkpoints
from losslab.rules import AdaGrad, Adam, Nesterov, make
from losslab.rules.schedules import warmup
from losslab.tasks import mlp

EVERYTHING = Case("everything", mlp(4, 9, 2, dropout=0.3, batch_norm=True), regressed(4, 2), by(F.mse_loss))
WIDE = Case("wide", mlp(4, 150, 150, 2, dropout=0.3), regressed(4, 2), by(F.mse_loss))
STOP = EarlyStopping("test_loss", patience=2)

RUNS: dict[str, tuple[Case, Any, dict[str, Any]]] = {
    "everything": (EVERYTHING, Adam(lr=[0.002, 0.02, 1e200, 0.1]), {"stop": STOP, "evaluate": 1}),
    "wide": (
        WIDE,
        Adam(lr=[0.002, 1e200, 0.001]),
        {},
    ),  # files of megabytes, to be killed while they are written
    "torch": (
        EVERYTHING,
        TorchRule(torch.optim.Adam, lr=[0.01, 0.02, 1e305, 0.03], amsgrad=True),
        {"stop": STOP},
    ),
    "lbfgs": (NAMED["square"], TorchRule(torch.optim.LBFGS, lr=[0.5, 0.1, 1e200], max_iter=3), {}),
    "schedule": (NAMED["conv"], Nesterov(lr=warmup([0.01, 0.1], steps=5), weight_decay=[0.0, 0.1]), {}),
    "full": (NAMED["linear-mse"], make("adagrad-full", lr=0.1), {"replacement": True}),
    "newton": (NAMED["bce"], make("newton", damping=0.1), {"batch_size": None}),
    "dual": (NAMED["mlp-tanh"], AdaGrad(lr=[0.1, 0.2], variant="dual", l1=0.01), {"shared_batches": True}),
    "loop": (NAMED["noise"], "adam", {"execution": "loop"}),
    "lstm": (NAMED["lstm"], "rmsprop", {"execution": "loop"}),
    "bfloat16": (NAMED["resnet"], "momentum", {"dtype": "bfloat16"}),
    "chunks": (NAMED["dropout-bn"], "adam", {"seeds": 5, "memory": 30_000}),
    "buffers": (NAMED["buffers"], "amsgrad", {"record": [1, 6]}),
}
STEPS = 13


class Broken(Exception):
    """Stands for anything that ends a process."""


def run(
    name: str, out: Path, breaks_at: int | None = None, resume: bool = False, steps: int = STEPS
) -> Population:
    case, rule, options = RUNS[name]

    def watch(population: Population) -> None:
        if breaks_at is not None and population.step >= breaks_at:
            raise Broken

    settings = {"seeds": 2, "batch_size": 6, "dtype": "float64", "record": 1, "execution": "stacked"}
    if not isinstance(rule, str):
        settings["seeds"] = rule.members() or 2
    settings |= options
    return train(
        task_of(case), rule, out=out, resume=resume, steps=steps, checkpoint_every=0, watch=watch, **settings
    )


def identical(ours: Population, theirs: Population) -> None:
    a, b = ours.tensors(), theirs.tensors()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert ours.step == theirs.step
    assert ours.history.equals(theirs.history)
    assert ours.settings() == theirs.settings()


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_unbroken(name: str, tmp_path: Path) -> None:
    unbroken = run(name, tmp_path / "unbroken")
    if name in ("everything", "wide", "torch", "lbfgs"):
        assert (unbroken.diverged >= 0).sum() == 1
    if name == "everything":
        assert (unbroken.stopped >= 0).any()
    out = tmp_path / "run"
    for step in (1, 4, 7, 8) if name != "buffers" else (2, 7):
        with pytest.raises(Broken):
            run(name, out, breaks_at=step, resume=out.exists())
    resumed = run(name, out, resume=True)
    identical(resumed, unbroken)
    for file in ("population.safetensors", "checkpoints/" + checkpoints.name(unbroken.step)):
        ours, theirs = (checkpoints.read(folder / file) for folder in (out, tmp_path / "unbroken"))
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
    identical(run(name, out, resume=True), unbroken)  # there is nothing left to do


def test_a_finished_run_goes_on_to_more_steps(tmp_path: Path) -> None:
    longer = run("loop", tmp_path / "longer", steps=20)
    run("loop", tmp_path / "run")
    resumed = run("loop", tmp_path / "run", resume=True, steps=20)
    assert resumed.step == 20
    for name, tensor in longer.tensors().items():
        if not name.startswith("history/"):  # it has the evaluation at the end of the shorter run, too
            torch.testing.assert_close(resumed.tensors()[name], tensor, rtol=0, atol=0)


def test_resume_without_a_checkpoint_begins(tmp_path: Path) -> None:
    identical(run("buffers", tmp_path / "a", resume=True), run("buffers", tmp_path / "b"))


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.engine.test_resume import run
out = Path(sys.argv[1])
run("wide", out, resume=True, steps=100_000)
"""


def test_a_process_killed_at_any_moment_loses_at_most_a_step(tmp_path: Path) -> None:
    """Killed three times while it does nothing but step and write; then the run goes on where it was."""
    root, out = Path(__file__).parents[2], tmp_path / "run"
    folder = out / "checkpoints"
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(root)))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    reached = []
    for wait in (0.031, None, None):  # seconds; None for the middle of the next write
        before = set(folder.glob("step-*")) if folder.exists() else set()
        with subprocess.Popen([sys.executable, tmp_path / "script.py", out], env=environment) as process:
            deadline = time.monotonic() + 120
            while not (folder.exists() and set(folder.glob("step-*")) - before):
                assert process.poll() is None, "it ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(wait or 0.0)
            until = time.monotonic() + 1.0
            while wait is None and not any(folder.glob(".*.tmp")) and time.monotonic() < until:
                pass
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        found = checkpoints.newest(folder)
        assert found is not None
        assert found[2] == []  # whatever was being written, what has the name of a checkpoint is whole
        reached.append(found[1]["step"])
    assert reached[0] < reached[1] < reached[2]
    end = reached[-1] + 5
    case, rule, options = RUNS["wide"]
    settings = {"batch_size": 6, "dtype": "float64", "record": 1, "execution": "stacked", **options}
    # As if a run of fewer steps had been broken off there: the test need not wait for the end.
    found[1]["settings"]["steps"] = end
    checkpoints.save_step(folder, reached[-1], *found[:2])
    resumed = run("wide", out, resume=True, steps=end)
    unbroken = train(task_of(case), rule, seeds=3, steps=end, **settings)
    identical(resumed, unbroken)
