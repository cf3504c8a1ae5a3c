"""Any rule as a ``torch.optim.Optimizer``, for ordinary modules and ordinary training loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.rules.fused import Stepper, stepper
from losslab.rules.rule import Rule

_ONE = torch.ones(())


class TorchOptimizer(torch.optim.Optimizer):
    """A rule that updates ``p`` from ``p.grad``, with torch's parameter groups and state-dict keys.

    ``optimizer.state[p]`` holds ``step`` and the rule's slots under the names torch uses for the same
    quantities (``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``, ``momentum_buffer``, ``square_avg``, ``sum``,
    ...); a rule without memory or schedule, such as plain SGD, keeps nothing. Hyperparameters stand
    in ``param_groups`` and may differ between groups or be changed by torch's learning-rate schedulers; one
    that the rule gives as a schedule is written there at every step.

    Unlike torch's optimizers this one never writes to ``p.grad``, and ``load_state_dict`` leaves the state
    in the dtype it was saved in (torch casts float32 moments of bfloat16 weights to bfloat16). A parameter
    without a gradient is skipped and its own step count stands still, as in torch. A group counts as one
    network: clipping takes the norm of the group's whole gradient. The matrix of a rule over the whole vector
    is kept with the first parameter of its group.

    Args:
        params: Parameters, or groups of them: ``[{"params": ..., "lr": 0.1}, ...]``.
        rule: The rule, its hyperparameters single values.

    Raises:
        LosslabError: The rule needs a Hessian, or has one value a member for several members.

    Example:
        >>> from losslab.rules import Adam
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = TorchOptimizer([weight], Adam(lr=0.1))
        >>> (3 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data, list(optimizer.state[weight])
        (tensor([0.9000]), ['step', 'exp_avg', 'exp_avg_sq'])
    """

    def __init__(self, params: Iterable[Any], rule: Rule) -> None:
        if rule.needs_curvature:
            raise LosslabError(
                f"{rule.name} needs the Hessian, which an optimizer is not given: "
                "call rule.update with curvature=, or train a population"
            )
        rule.check_members(1)
        self.rule = rule
        self._made: dict[int, tuple[list[Any], Rule, Stepper | None]] = {}
        self._choose_names()
        values = vars(rule.at(0))
        super().__init__(params, {n: v.item() if isinstance(v, Tensor) else v for n, v in values.items()})

    def __getstate__(self) -> dict[str, Any]:
        """Torch's state and the rule; kernels' buffers are made anew."""
        return {**super().__getstate__(), "rule": self.rule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The counterpart of ``__getstate__``."""
        self._made = {}
        super().__setstate__(state)
        self._choose_names()

    def _choose_names(self) -> None:
        names = self.rule.hyperparameters()
        self._scheduled = [n for n in names if callable(getattr(self.rule, n))]
        self._settable = [n for n in names if n not in self._scheduled]
        self._timeless = not self._scheduled and not self.rule.slots()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's, with the group's hyperparameters checked."""
        super().add_param_group(param_group)
        self._rule_of(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: Evaluates the model and returns the loss, called before the update.

        Returns:
            What the closure returned.

        Raises:
            LosslabError: A gradient is sparse, or a weight complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule, fast = self._rule_of(group)
            if self._timeless:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._advance(rule, fast, params, [self._begin(p) for p in params], 0)
                continue
            cohorts: dict[int, tuple[list[Tensor], list[dict[str, Any]]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p] or self._begin(p)
                    params, states = cohorts.setdefault(int(state["step"]), ([], []))
                    params.append(p)
                    states.append(state)
            for step, (params, states) in cohorts.items():
                for name in self._scheduled:
                    group[name] = float(getattr(rule, name)(step))
                self._advance(rule, fast, params, states, step)
        return loss

    def _rule_of(self, group: dict[str, Any]) -> tuple[Rule, Stepper | None]:
        """The rule with this group's values, and its kernel; made anew when a value has changed."""
        made = self._made.get(id(group))
        values = [v.tolist() if isinstance(v := group[n], Tensor) else v for n in self._settable]
        if made is None or made[0] != values:
            rule = self.rule.replace(**dict(zip(self._settable, values, strict=True)))
            rule.check_members(1)
            made = (values, rule, stepper(rule) if rule.members() is None else None)
            self._made[id(group)] = made
        return made[1], made[2]

    def _begin(self, p: Tensor) -> dict[str, Any]:
        if p.is_complex() or (p.grad is not None and p.grad.is_sparse):
            kind = "complex" if p.is_complex() else "sparse"
            raise LosslabError(
                f"{self.rule.name} got a {kind} gradient, it wants dense real ones: use torch.optim"
            )
        if not self._timeless:
            self.state[p]["step"] = torch.tensor(0.0)
        return self.state[p]

    def _advance(
        self, rule: Rule, fast: Stepper | None, params: list[Tensor], states: Any, step: int
    ) -> None:
        """One update of parameters that have taken equally many steps."""
        keys = [rule.torch_names.get(slot, slot) for slot in rule.slots()]
        holders = states[:1] if rule.whole_vector else states
        if keys and keys[-1] not in holders[0]:
            start = rule.init(_stacked(params))
            for slot, key in zip(rule.slots(), keys, strict=True):
                for state, tensor in zip(holders, start[slot].values(), strict=True):
                    state.setdefault(key, tensor.squeeze(0))
        slots = [[state[key] for state in holders] for key in keys]
        grads: list[Any] = [p.grad for p in params]
        if fast is not None and _uniform(params, grads, *slots):
            fast.apply(params, grads, slots, rule.at(step), step + 1)
        else:
            _general(rule, params, grads, slots, step)
        if not self._timeless:
            # A float in place of the tensor is much slower.
            torch._foreach_add_([state["step"] for state in states], _ONE, alpha=1.0)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Torch's, but the state keeps the dtype it was saved in.

        A state dict of the torch optimizer that this rule equals may be loaded too; hyperparameters that its
        groups do not have under the names used here (``betas``) stay as they are.

        Raises:
            LosslabError: The state is not this rule's.
        """
        wanted = {"step"} | {self.rule.torch_names.get(slot, slot) for slot in self.rule.slots()}
        wanted -= {"step"} if self._timeless else set()
        for held in state_dict["state"].values():
            if not (set(held) == wanted or (self.rule.whole_vector and set(held) == {"step"})):
                raise LosslabError(
                    f"the saved state holds {', '.join(sorted(held))}, {self.rule.name} keeps "
                    f"{', '.join(sorted(wanted))}: load it into the optimizer that saved it"
                )
        before = self.param_groups
        super().load_state_dict(dict(state_dict))
        for old, new in zip(before, self.param_groups, strict=True):
            for name in self.rule.hyperparameters():
                new.setdefault(name, old[name])
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        mine = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, p in zip(saved, mine, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if self.state[p][key].dtype != value.dtype:
                    self.state[p][key] = value.detach().to(p.device, copy=True)


def _uniform(first: list[Tensor], *others: list[Tensor]) -> bool:
    """Whether a kernel may run over these tensors as flat memory."""
    dtype, device = first[0].dtype, first[0].device
    for tensors in (first, *others):
        for t in tensors:
            if t.dtype is not dtype or t.device != device or not t.is_contiguous():
                return False
    return True


def _stacked(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): t.detach().unsqueeze(0) for i, t in enumerate(tensors)}


def _general(
    rule: Rule, params: list[Tensor], grads: list[Tensor], slots: list[list[Tensor]], step: int
) -> None:
    """One pure update of a stack of one, copied back."""
    weights, names = _stacked(params), [""] if rule.whole_vector else [str(i) for i in range(len(params))]
    state = {
        slot: {n: t.unsqueeze(0) for n, t in zip(names, tensors, strict=True)}
        for slot, tensors in zip(rule.slots(), slots, strict=True)
    }
    new, kept = rule.update(_stacked(grads), state, weights, step)
    for name, p in weights.items():
        p.copy_(new[name])
    for slot, tensors in state.items():
        for name, tensor in tensors.items():
            tensor.copy_(kept[slot][name])
