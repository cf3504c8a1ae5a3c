"""Watching a network's code as it runs, by hooks on a private copy and a mode that sees torch functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from losslab.engine.stacked import Stacked
from losslab.errors import LosslabError, first_line, unknown
from losslab.signals import activations
from losslab.signals.activations import Activation
from losslab.tasks.nest import map_leaves

SHAPING = (nn.Identity, nn.Flatten, nn.Unflatten)
"""Modules that pass their input on: not reported unless they are asked for."""

WHOLE = (nn.MultiheadAttention,)
"""Modules with children that they do not call."""

CHANNELS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.GroupNorm,
)
FEATURES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RNNBase, nn.MultiheadAttention, nn.Flatten)


@dataclass(frozen=True)
class Layer:
    """Something in a network that has an output: a module, or an activation called as a function.

    Attributes:
        name: The module's name; ``"2.relu()"`` for a function called inside of module 2. A second call in the
            same forward pass is ``name#2``.
        kind: The class of the module, or the name of the function.
        activation: The elementwise function, if it is one that is known.
        weights: Names of the module's own weights, in order; a tied one by its first name in the network.
        unit_axis: Which axis of ``[N, B, ...]`` counts the units: 2 after convolutions, else the last (-1).
    """

    name: str
    kind: str
    activation: Activation | None = None
    weights: tuple[str, ...] = ()
    unit_axis: int = -1


Value = Any
"""What flows: a tensor, or a `Stacked` one."""


@dataclass
class Capture:
    """What was seen in one run of the network's code.

    Attributes:
        layers: In the order of their calls.
        outputs: Layer -> output.
        inputs: Layer -> input, for layers with weights and for activations.
        versions: How often each captured tensor had been changed in place when it was captured.
        calls: Layer -> how often it was called.
        several: Layers with more than one floating output, of which the first is kept.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    several: set[str] = field(default_factory=set)

    def changed(self) -> bool:
        """Whether something captured was changed in place later on."""
        return any(t._version != version for t, version in self.versions)


class Watch(TorchFunctionMode):
    """Captures what flows through a module, each time that its code runs.

    Args:
        module: A private copy: it gets hooks, and its activations stop working in place.
        layers: Names of modules, inner ones too; by default every module without children, and every
            activation called as a function.

    Raises:
        LosslabError: A name that the module does not have.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        self.names = {m: n for n, m in module.named_modules()}
        self.root = module
        named = {id(p): n for n, p in module.named_parameters()}  # a tied weight goes by its first name
        self.own = {
            m: tuple(named[id(p)] for p in m._parameters.values() if p is not None) for m in self.names
        }
        self.wanted = (
            None if layers is None else self._checked([layers] if isinstance(layers, str) else layers)
        )
        self.cloning = False
        self.members: int | None = None
        self.captures: list[Capture] = []
        self.inside: list[nn.Module] = []
        self.known: dict[tuple[nn.Module, int], Layer | None] = {}
        self.axis: int = -1
        for part, name in self.names.items():
            if "parametrizations" in name.split("."):
                continue
            if getattr(part, "inplace", False) is True:
                part.inplace = False
            part.register_forward_pre_hook(self._enter, with_kwargs=True)
            part.register_forward_hook(self._leave, with_kwargs=True)
        self.compiled = any(
            type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None
            for part in self.names
        )

    @contextmanager
    def watching(self, members: int | None, cloning: bool) -> Iterator[list[Capture]]:
        """Captures inside of the block.

        Args:
            members: How many networks one run of the code is for; None if it is for one alone.
            cloning: Whether the network goes on with copies, so that what is kept is never overwritten.
        """
        self.members, self.cloning, self.captures, self.inside = members, cloning, [], []
        # What torch.compile has made runs as it was written, or its hooks would be compiled too.
        plain = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        try:
            with plain, self:
                yield self.captures
        finally:
            self.captures = []

    def begin(self) -> None:
        """A new run of the network's code."""
        self.captures.append(Capture())
        self.inside.clear()
        self.axis = -1

    def in_a_row(self, names: Sequence[str]) -> dict[str, Layer] | None:
        """The layers that are reported of modules called one after the other, with tensors of units last.

        None if the order alone does not tell: one is called twice, or one that was asked for is not called.
        """
        modules = {name: module for module, name in self.names.items()}
        found = {}
        for name in names:
            layer = self._layer(modules[name], self._name(modules[name]))
            if self._reports(modules[name], layer.name):
                if layer.name in found:
                    return None
                found[layer.name] = layer
        return found if {*(self.wanted or ())} <= {*found} else None

    def check_called(self, captures: list[Capture]) -> None:
        """Raises if a layer that was asked for was not called."""
        called = {name for capture in captures for name in capture.outputs}
        called |= {name.partition("#")[0] for name in called}
        for name in self.wanted or ():
            if name not in called:
                raise LosslabError(
                    f"layer {name!r} has no output to look at, the loss does not call it or it gives no "
                    "floating tensor: leave it out of layers"
                )

    def blame(self, error: Exception) -> str:
        """What to say of an error that the network's code, or the loss, has raised."""
        who = f"layer {self._name(self.inside[-1])!r}" if self.inside else "the loss"
        told = next(iter(str(error).splitlines()), "")
        return f"{who} raised {type(error).__name__}: {told}: mend the network, the loss or the batch"

    # -- what the hooks do -----------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.captures:
            self.inside.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.captures:
            return None
        with torch._C.DisableTorchFunction():  # else the mode is asked at every look at a tensor's dtype
            return self._left(module, args, kwargs, output)

    def _left(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        while self.inside and self.inside.pop() is not module:  # a module that raised and was caught
            pass
        key = (module, self.axis)
        if key not in self.known:
            name = self._name(module)
            self.known[key] = self._layer(module, name) if self._reports(module, name) else None
        layer = self.known[key]
        return None if layer is None else self._keep(layer, _first(args or kwargs), output)

    def _layer(self, module: nn.Module, name: str) -> Layer:
        prefix = f"{self.names[module]}." if self.names[module] else ""
        return Layer(
            name,
            type(module).__name__,
            activations.of_module(module),
            (*self.own[module], *_parametrised(module, prefix)),
            self._units(module),
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Captures activations that are called as functions, inside of modules that have others."""
        kwargs = kwargs or {}
        if func not in activations.FUNCTIONS or not self.captures or not self.inside:
            return func(*args, **kwargs)
        module, known = self.inside[-1], activations.FUNCTIONS[func]
        name = ".".join(filter(None, (self.names[module], f"{known}()")))
        if _is_torchs_own(module) or not self._asked(name):
            return func(*args, **kwargs)  # the module's own output tells it, or nobody wants to know
        entered: Any = args[0] if args else kwargs.get("input")
        spelled = getattr(func, "__name__", "")
        if any(v is True for v in (*args, *kwargs.values())) or spelled.endswith("_"):
            entered = entered.clone()  # it may work in place
        output = func(*args, **kwargs)
        layer = Layer(name, known, activations.of_call(func, args, kwargs), (), self.axis)
        replaced = self._keep(layer, entered, output)
        return output if replaced is None else replaced

    def _keep(self, layer: Layer, entered: Value | None, output: Any) -> Any:
        """Notes a layer's input and output; returns what the network goes on with, None for the output."""
        given = found = _first(output)
        if found is None:
            return None
        capture = self.captures[-1]
        calls = capture.calls[layer.name] = capture.calls.get(layer.name, 0) + 1
        name = layer.name if calls == 1 else f"{layer.name}#{calls}"
        self.axis = layer.unit_axis
        if self.wanted is not None and not {name, layer.name} & set(self.wanted):
            return None
        goes_on = found
        if torch.is_grad_enabled() and not raw(found).requires_grad:
            # Nothing trainable lies before it, and its gradient is wanted all the same, member by member.
            data = raw(found).detach()
            if self.members is not None and isinstance(found, Tensor):
                found = Stacked(data.expand(self.members, *data.shape).requires_grad_())
            else:
                found = _like(found, data.requires_grad_())
            goes_on = _like(found, raw(found).clone())
        elif self.cloning:
            goes_on = _like(found, raw(found).clone())
        capture.layers[name] = layer if calls == 1 else dataclasses.replace(layer, name=name)
        capture.outputs[name] = found
        if not isinstance(output, (Tensor, Stacked)) and len([*_floating(output)]) > 1:
            capture.several.add(name)
        capture.versions.append((raw(found), raw(found)._version))
        if entered is not None and (layer.weights or layer.activation is not None):
            capture.inputs[name] = entered
            capture.versions.append((raw(entered), raw(entered)._version))
        return None if goes_on is given else _exchanged(output, goes_on)

    # -- names -----------------------------------------------------------------------------------------

    def _name(self, module: nn.Module) -> str:
        return self.names[module] or type(module).__name__

    def _reports(self, module: nn.Module, name: str) -> bool:
        if self.wanted is not None:
            return self._asked(name)
        inner = [n for n, _ in module.named_children() if n != "parametrizations"]
        return (not inner or isinstance(module, WHOLE)) and not isinstance(module, SHAPING)

    def _asked(self, name: str) -> bool:
        return self.wanted is None or any(w.partition("#")[0] == name for w in self.wanted)

    def _units(self, module: nn.Module) -> int:
        if isinstance(module, CHANNELS) or type(module).__name__.endswith("BatchNorm"):
            return 2
        return -1 if isinstance(module, FEATURES) else self.axis

    def _checked(self, layers: Sequence[str]) -> tuple[str, ...]:
        known = [self._name(module) for module in self.names]
        for layer in layers:
            if layer.partition("#")[0] not in known and not layer.partition("#")[0].endswith("()"):
                raise unknown("layer", layer, known)
        return tuple(layers)


def _is_torchs_own(module: nn.Module) -> bool:
    """Whether calls inside of the module are its own business."""
    known = activations.of_module(module) is not None
    return known or (type(module).__module__.startswith("torch.") and not any(module.children()))


def _parametrised(module: nn.Module, prefix: str) -> Iterator[str]:
    inner = getattr(module, "parametrizations", None)
    if isinstance(inner, nn.Module):
        for name, _ in inner.named_parameters():
            yield f"{prefix}parametrizations.{name}"


def _first(nest: Any) -> Value | None:
    """The first floating tensor of a nest."""
    return next(_floating(nest), None)


def _floating(nest: Any) -> Iterator[Value]:
    """The floating tensors of a nest."""
    if isinstance(nest, (Tensor, Stacked)):
        if nest.is_floating_point():
            yield nest
        return
    for part in (
        nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, (tuple, list)) else ()
    ):
        yield from _floating(part)


def _exchanged(nest: Any, new: Value) -> Any:
    """The nest with another first tensor."""
    old = _first(nest)
    return map_leaves(lambda leaf: new if leaf is old else leaf, nest)


def raw(value: Value) -> Tensor:
    """The tensor; of a `Stacked` value, that of all members."""
    return value.data if isinstance(value, Stacked) else value


def _like(value: Value, data: Tensor) -> Value:
    return Stacked(data) if isinstance(value, Stacked) else data


def sent_back(total: Tensor, sources: Sequence[Tensor], keep: bool = False) -> Sequence[Tensor | None]:
    """Gradients through the network's own code, None for what the total does not depend on.

    Raises:
        LosslabError: That code raised.
    """
    try:
        return torch.autograd.grad(total, sources, retain_graph=keep, allow_unused=True)
    except LosslabError:
        raise
    except Exception as error:  # the user's code
        raise LosslabError(
            f"the backward pass raised {first_line(error).rstrip('.')}: mend the network or the loss"
        ) from error
