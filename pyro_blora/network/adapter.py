"""Changes to the network while it is adapted, all of which are undone afterwards."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyro_blora.debts import checkpointing_through, hooks_of, is_offloaded, slots_of
from pyro_blora.errors import ConfigurationError
from pyro_blora.network.targets import body_of, head_names, is_quantized, matches
from pyro_blora.updates import LayerUpdate

_INPUTS = ("hidden_states", "hidden_state", "input", "x")  # names of a block's or layer's input


class LayerHook:
    """Adds the current update, if any, to the output of a layer, which itself stays the same."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.update: LayerUpdate | None = None
        self._handle: RemovableHandle = module.register_forward_hook(self, with_kwargs=True)
        # torch.compile has no guard on hooks, so it would go on running a graph that it compiled
        # without one; replacing the layer's forward makes it compile again
        self.module, self._before = module, vars(module).get("forward")
        self._forward = module.forward if self._before is None else partial(self._before)
        module.forward = self._forward

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """The forward hook: ``output + dW x``."""
        update = self.update
        if update is None:
            return output
        if not isinstance(output, Tensor):
            raise ConfigurationError(
                f"{self.name} returns a {type(output).__name__}, to which no update can be added; "
                "it may be a router. Leave it out with exclude_modules."
            )
        if update.A.device != output.device:  # the layers of a group may be on several devices
            update = _moved(update, output.device)
        return update(layer_input(args, kwargs).to(output.device), output)

    def remove(self) -> None:
        """Takes the hook off the layer."""
        self._handle.remove()
        if vars(self.module).get("forward") is self._forward:  # not wrapped again since
            del self.module.forward
            if self._before is not None:  # set by another library
                self.module.forward = self._before


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or the tensors of a dataclass, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})


def layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a layer or block gets: its first argument, or one of ``_INPUTS``."""
    if args:
        return args[0]
    for name in _INPUTS:
        if name in kwargs:
            return kwargs[name]
    raise ConfigurationError(
        f"A layer or a block of the network is given {', '.join(kwargs) or 'nothing'} by name; "
        f"its input must be the first argument, or be called one of {', '.join(_INPUTS)}."
    )


def layer_hook_of(module: nn.Module) -> LayerHook | None:
    """The hook on ``module`` that adds its update, or ``None``."""
    return next((hook for hook in hooks_of(module) if isinstance(hook, LayerHook)), None)


@contextmanager
def updates_in_place(
    hooks: Sequence[LayerHook], updates: Sequence[LayerUpdate | None]
) -> Iterator[None]:
    """Each hook adds its update within the context, and its previous one afterwards."""
    before = [hook.update for hook in hooks]
    try:
        for hook, update in zip(hooks, updates, strict=True):
            hook.update = update
        yield
    finally:
        for hook, update in zip(hooks, before, strict=True):
            hook.update = update


def updates_kept_for_backward(
    modules: Sequence[nn.Module], hooks: Sequence[LayerHook], updates: Sequence[LayerUpdate]
) -> AbstractContextManager[None]:
    """Makes checkpointed blocks that run in the context use ``updates`` again in backward."""

    def with_updates(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        return lambda block, *args, **kwargs: checkpoint(
            updates_in_place(hooks, updates)(block), *args, **kwargs
        )

    return checkpointing_through(modules if torch.is_grad_enabled() else (), with_updates)


class Frozen:
    """Freezes all parameters of a network until :meth:`thaw`."""

    def __init__(self, net: nn.Module) -> None:
        # By module and name, because sharding replaces the parameters
        self._before = [
            (module, name, parameter.requires_grad)
            for module in net.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        net.requires_grad_(False)

    def thaw(self) -> None:
        """Restores ``requires_grad`` of each parameter; those added since stay as they are."""
        for module, name, trained in self._before:
            if (parameter := slots_of(module).get(name)) is not None:
                parameter.requires_grad_(trained)


@contextmanager
def in_mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts ``net`` into training or evaluation mode, and restores each part's mode afterwards."""
    before = {module: module.training for module in net.modules()}
    try:
        net.train(training)
        yield
    finally:
        net.train(before[net])  # because a class may override it
        for module, mode in before.items():
            module.training = mode


def heads_to_train(
    net: nn.Module, modules_to_save: Sequence[str] | None, targets: Iterable[str], new_head: bool
) -> list[str]:
    """Full names of modules to train as point estimates; by default new heads without targets."""
    targets = tuple(targets)
    if modules_to_save is None:
        heads = head_names(net) if new_head else []
        adapted = [head for head in heads if any(_within(t, head) for t in targets)]
        if parts := [head for head in adapted if head not in targets]:
            warnings.warn(
                f"target_modules adapts layers of {', '.join(parts)}, a head of the network, the "
                "rest of which stays frozen; leave a new head out with exclude_modules.",
                stacklevel=4,
            )
        return [head for head in heads if head not in adapted]
    heads = [name for name, _ in net.named_modules() if name and matches(name, modules_to_save)]
    after, body = _after_blocks(net), body_of(net)
    for name in modules_to_save:
        chosen = [head for head in heads if matches(head, [name])]
        held = [h for h in chosen if not any(_within(h, part) for part in after)]
        pairs = [*product(chosen, targets), *product(held, filter(None, [body]))]
        if not chosen or any(_within(h, t) or _within(t, h) for h, t in pairs):
            raise ConfigurationError(
                f"modules_to_save must name heads among {[*head_names(net), *after]} that "
                f"target_modules does not adapt, got {name!r}; leave it out."
            )
    return [h for h in heads if not any(h != other and _within(h, other) for other in heads)]


def _after_blocks(net: nn.Module) -> list[str]:
    """The parts of a body after its blocks, such as a pooler that is new, as a head is."""
    after, behind = list[str](), False
    if (body := body_of(net)) is not None:
        for name, part in net.get_submodule(body).named_children():
            if any(isinstance(module, nn.ModuleList) for module in part.modules()):
                after, behind = [], True
            elif behind and any(True for _ in part.parameters()):
                after.append(f"{body}.{name}")
    return after


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


class TrainedHeads(PyroModule):
    """Trained copies, at least in single precision, of the parameters of some modules."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.roles: dict[str, str] = {}
        self._owners: dict[str, tuple[str, nn.Module, str]] = {}
        #: ``|h|_1`` of the input ``h`` of each tensor's module, if its entries are about one
        self.sizes: dict[str, float] = {}
        for head in names:
            for path, owner in net.get_submodule(head).named_modules(prefix=head):
                away = is_offloaded(owner)
                if away or is_quantized(owner):
                    raise ConfigurationError(
                        f"{path} is {'offloaded' if away else 'quantized'} and cannot be trained; "
                        "load it on a device, unquantized, or pass modules_to_save=()."
                    )
                shapes = [p.shape for p in owner.parameters(recurse=False)]
                for name, parameter in owner.named_parameters(recurse=False):
                    attribute = f"{path}.{name}".replace(".", "_")
                    self._owners[attribute] = f"{path}.{name}", owner, name
                    self.roles[attribute] = "head"
                    self.sizes[attribute] = float(max(shapes, key=len)[-1])
                    dtype = torch.promote_types(parameter.dtype, torch.float32)
                    setattr(self, attribute, PyroParam(parameter.detach().to(dtype, copy=True)))

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by their full names in the network."""
        return {full: getattr(self, name) for name, (full, _, _) in self._owners.items()}

    @contextmanager
    def input_sizes(self) -> Iterator[dict[str, float]]:
        """Measures ``sizes`` within the context, on the modules' inputs there."""
        sizes = dict(self.sizes)

        def measure(module: nn.Module, args: tuple[Any, ...]) -> None:
            h = args[0] if args else None
            if isinstance(h, Tensor) and h.is_floating_point():
                size = float(h.detach().float().abs().sum(-1).mean())
                sizes.update({k: size for k, (_, m, _) in self._owners.items() if m is module})

        with ExitStack() as hooks:
            for owner in {owner for _, owner, _ in self._owners.values()}:
                hooks.enter_context(owner.register_forward_pre_hook(measure))
            yield sizes

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replaces the network's tensors with the trained ones within the context."""
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        for full, owner, name in self._owners.values():
            parameters = slots_of(owner)
            before.append((parameters, name, parameters[name]))
            if hasattr(parameters[name], "full_tensor"):
                raise ConfigurationError(
                    f"{full} is sharded and cannot be trained: call fully_shard on the blocks of "
                    "the network, not on all of it, or pass modules_to_save=()."
                )
        try:
            for attribute, (parameters, name, old) in zip(self._owners, before, strict=True):
                parameters[name] = getattr(self, attribute).to(old.device, old.dtype)
            yield
        finally:
            for parameters, name, old in before:
                parameters[name] = old
