"""One module that stands in for every member: its weights are swapped, its code is run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


class Template:
    """A private copy of a network whose weights and buffers can be anything for the time of a call.

    Values are put straight into the module's tables of parameters and buffers, so they may be stacked or
    mapped tensors, and tied weights stay tied. The module given is copied and never touched.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)
        self.buffers = [n for n, b in self.module.named_buffers()]
        self.slots: list[tuple[dict[str, Any], str, str]] = []
        named = {id(t): n for n, t in [*self.module.named_parameters(), *self.module.named_buffers()]}
        for owner in self.module.modules():
            for table in (owner._parameters, owner._buffers):
                held: dict[str, Any] = table
                for key, tensor in held.items():
                    if tensor is not None:
                        self.slots.append((held, key, named[id(tensor)]))
        self.own = [table[key] for table, key, _ in self.slots]
        self.recurrent = [m for m in self.module.modules() if isinstance(m, nn.RNNBase)]

    def mode(self, training: bool) -> bool:
        """The mode that the module takes when it is asked for this one."""
        return training

    @contextmanager
    def holding(self, values: Mapping[str, Any], training: bool) -> Iterator[nn.Module]:
        """The module with these weights and buffers, in training or evaluation mode, for a ``with`` block."""
        training = self.mode(training)
        if self.module.training != training:
            self.module.train(training)
        try:
            for table, key, name in self.slots:
                table[key] = values[name]
            self._refresh_recurrent()
            yield self.module
        finally:
            for (table, key, _), tensor in zip(self.slots, self.own, strict=True):
                table[key] = tensor
            self._refresh_recurrent()

    def replaced(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Buffers that the network's code has given new tensors (``self.count = self.count + 1``).

        To be asked inside of `holding` these values; buffers changed in place are not among them.
        """
        now = {name: table[key] for table, key, name in self.slots}
        return {n: now[n].detach() for n in self.buffers if now[n] is not values[n]}

    def _refresh_recurrent(self) -> None:
        # Recurrent layers keep a second list of references to their weights.
        for layer in self.recurrent:
            layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
