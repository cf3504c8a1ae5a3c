"""What a population and a wrong task tell about themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from losslab import LosslabError, train
from losslab.tasks import digits_task


def test_a_population_is_printed_in_one_line() -> None:
    population = train(digits_task(), "sgd", seeds=3, steps=2, evaluate=None)
    assert repr(population) == "Population(3 members, sgd, digits, step 2)"


def test_what_is_no_task_is_told_first() -> None:
    with pytest.raises(LosslabError, match="the task is a Linear: pass a losslab"):
        train(nn.Linear(2, 2), "adam")  # type: ignore[arg-type]


def test_nothing_to_resume_is_told(tmp_path: Path) -> None:
    population = train(digits_task(), "sgd", steps=1, evaluate=None, out=tmp_path / "new", resume=True)
    assert population.notices == [f"{tmp_path / 'new'} holds no run to resume: a new one was started"]
