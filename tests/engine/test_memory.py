"""Memory that a step frees is kept for the next one."""

from __future__ import annotations

import resource

import pytest
import torch

from losslab import supervised, train
from losslab.engine.memory import free_memory, keep_freed_memory, release_freed_memory
from losslab.errors import LosslabError
from losslab.tasks import mlp


def faults_of(work: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(work):
        torch.empty(1 << 21).fill_(1.0)  # 8 MiB, 2048 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept_and_given_back() -> None:
    if not keep_freed_memory():
        pytest.skip("not glibc")
    faults_of(2)
    assert faults_of(20) < 20 * 2048 / 4
    release_freed_memory()
    assert faults_of(1) >= 1024 // 2  # the pages are mapped anew; fewer with huge pages


def test_free_memory_is_a_number_of_bytes() -> None:
    assert free_memory(torch.device("cpu")) > 1e6


@pytest.mark.parametrize("execution", ["stacked", "auto", "loop"])
def test_a_last_batch_of_one_names_the_remedy(execution: str) -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    task = supervised(mlp(3, 4, 2, batch_norm=True), train=(x, (x[:, 0] > 0).long()))
    with pytest.raises(LosslabError, match=r"last batch has 1 example .*a channel.*drop_last"):
        train(task, "sgd", seeds=2, epochs=1, batch_size=4, execution=execution)
    train(task, "sgd", seeds=2, epochs=1, batch_size=4, drop_last=True, execution=execution)
