"""Which examples a member sees at a step: a pure function of its seed, nothing to replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losslab.engine import randomness
from losslab.errors import LosslabError


class Batches:
    """The order in which N members read a data set of n examples.

    Without replacement, each epoch is a fresh permutation cut into ``ceil(n / batch_size)`` batches (the last
    one smaller, or dropped); with replacement every batch is drawn uniformly and an epoch is as many batches.

    Args:
        examples: n.
        batch_size: Examples a batch; None for all of them (gradient descent).
        seeds: One seed a member: its order is a function of its seed alone.
        shared: One order for all members, that of ``order_seed``; the first layer then reads one batch.
        order_seed: Seed of the shared order.
        replacement: Draw with replacement.
        drop_last: Leave out the last, smaller batch of an epoch.

    Raises:
        LosslabError: A batch size below one or, with ``drop_last``, above n.

    Example:
        >>> batches = Batches(10, 4, seeds=[0, 1])
        >>> batches.per_epoch, batches.at(0).shape, batches.at(2).shape
        (3, torch.Size([2, 4]), torch.Size([2, 2]))
        >>> sorted(torch.cat([batches.at(k)[0] for k in range(3)]).tolist()) == list(range(10))
        True
    """

    def __init__(
        self,
        examples: int,
        batch_size: int | None,
        seeds: Sequence[int],
        shared: bool = False,
        order_seed: int = 0,
        replacement: bool = False,
        drop_last: bool = False,
    ) -> None:
        if batch_size is not None and (batch_size < 1 or batch_size != int(batch_size)):
            raise LosslabError(
                f"batch_size is {batch_size}: pass at least 1, or None for all {examples} examples, "
                "in whole numbers"
            )
        if drop_last and batch_size is not None and batch_size > examples:
            raise LosslabError(
                f"batch_size is {batch_size} of {examples} examples: nothing is left when the last batch "
                "is dropped; pass a smaller batch_size"
            )
        self.examples, self.batch_size = examples, min(int(batch_size or examples), examples)
        self.whole = self.batch_size == examples and not replacement
        # Members of one seed read in one order: that is a shared batch too.
        self.shared = shared or self.whole or len(set(seeds)) == 1
        self.seeds = [order_seed] if shared else [seeds[0]] if self.shared else list(seeds)
        self.replacement = replacement
        full, rest = divmod(examples, self.batch_size)
        self.per_epoch = full if drop_last or not rest else full + 1
        self._epoch = -1
        self._orders: Tensor = torch.empty(0)
        self._keys = randomness.member_keys(self.seeds, "sample")

    def at(self, step: int) -> Tensor:
        """Indices of the batch of one step: int64 ``[B]`` when shared, else ``[N, B]``."""
        if self.whole:
            return torch.arange(self.examples)
        if self.replacement:
            rows = randomness.integers(randomness.fold(self._keys, step), (self.batch_size,), self.examples)
            return rows[0] if self.shared else rows
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            draw = torch.Generator()  # one, seeded anew: making one costs as much as a permutation
            orders = [
                torch.randperm(
                    self.examples, generator=draw.manual_seed(randomness.key(seed, "order", epoch))
                )
                for seed in self.seeds
            ]
            self._orders, self._epoch = torch.stack(orders), epoch
        rows = self._orders[:, place * self.batch_size : (place + 1) * self.batch_size]
        return rows[0] if self.shared else rows

    def select(self, index: Sequence[int]) -> Batches:
        """The batches of some members."""
        picked = object.__new__(Batches)
        picked.__dict__.update(self.__dict__)
        if not self.shared:
            picked.seeds = [self.seeds[i] for i in index]
            picked._epoch = -1
            picked._keys = randomness.member_keys(picked.seeds, "sample")
        return picked
