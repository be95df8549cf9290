"""What is done to the network while it is adapted, all of which is undone afterwards.

Each adapted layer gets a forward hook, so its parameters, name, class and ties stay what they were.
Heads may be trained whole, as points: PEFT's ``modules_to_save``.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.quantized import is_quantized
from pyro_blora.network.targets import body_of, head_names, matches, name_in_base
from pyro_blora.updates.low_rank_update import LayerUpdate

# Names of what a block or a layer is given
_INPUTS = ("hidden_states", "hidden_state", "input", "x")


class Adapter:
    """Adds the current update to the output of one layer; without one, the layer is untouched."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.update: LayerUpdate | None = None
        self._handle: RemovableHandle = module.register_forward_hook(self, with_kwargs=True)
        # torch.compile does not see that a layer has got a hook, and would run the graph that it
        # made of one without; that a layer has another forward of its own, it does see
        self._module, self._before = module, vars(module).get("forward")
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
                f"{self.name} puts out a {type(output).__name__}, to which no update can be added: "
                "a router, perhaps. Leave it out with exclude_modules."
            )
        if update.A.device != output.device:  # a group's layers may lie on several devices
            update = _moved(update, output.device)
        return update(layer_input(args, kwargs).to(output.device), output)

    def remove(self) -> None:
        """Takes the hook off the layer."""
        self._handle.remove()
        if vars(self._module).get("forward") is self._forward:  # and nobody's on top of it
            put_forward_back(self._module, self._before)


def _moved(value: Any, device: torch.device) -> Any:
    """An update or its noise with all tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})


def layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a layer or a block is given: first, or by a name that is known."""
    if args:  # in every layer of every pass
        return args[0]
    for name in _INPUTS:
        if name in kwargs:
            return kwargs[name]
    raise ConfigurationError(
        f"A layer or a block of the network is given {', '.join(kwargs) or 'nothing'} by name; "
        f"its input must come first, or be one of {', '.join(_INPUTS)}."
    )


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter on ``module``, or ``None``."""
    return next((h for h in module._forward_hooks.values() if isinstance(h, Adapter)), None)


def put_forward_back(module: nn.Module, before: Callable[..., Any] | None) -> None:
    """Takes off what replaced a module's forward; ``before`` is another library's, or ``None``."""
    del module.forward
    if before is not None:
        module.forward = before


@contextmanager
def updates_in_place(
    adapters: Sequence[Adapter], updates: Sequence[LayerUpdate | None]
) -> Iterator[None]:
    """Within, each adapter adds its update; afterwards, what it added before."""
    before = [adapter.update for adapter in adapters]
    try:
        for adapter, update in zip(adapters, updates, strict=True):
            adapter.update = update
        yield
    finally:
        for adapter, update in zip(adapters, before, strict=True):
            adapter.update = update


@contextmanager
def updates_kept_for_backward(
    modules: Sequence[Any], adapters: Sequence[Adapter], updates: Sequence[LayerUpdate]
) -> Iterator[None]:
    """Within, checkpointed blocks apply ``updates`` again when backward recomputes them.

    Otherwise they would be recomputed without, because the updates are off the layers by then.
    """

    def taking_along(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return checkpoint(updates_in_place(adapters, updates)(block), *args, **kwargs)

        return run

    blocks = modules if torch.is_grad_enabled() else ()
    checkpointed = [block for block in blocks if block.gradient_checkpointing and block.training]
    before = {block: block._gradient_checkpointing_func for block in checkpointed}
    try:
        for block, checkpoint in before.items():
            block._gradient_checkpointing_func = taking_along(checkpoint)
        yield
    finally:
        for block, checkpoint in before.items():
            block._gradient_checkpointing_func = checkpoint


class Frozen:
    """Freezes all of a network until :meth:`thaw`.

    A parameter is known by its module and its name there, which sharding and compiling leave alone.
    """

    def __init__(self, net: nn.Module) -> None:
        self._before = [
            (module, name, parameter.requires_grad)
            for module in net.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        net.requires_grad_(False)

    def thaw(self) -> None:
        """Each parameter requires a gradient as it did; those that came later stay as they are."""
        for module, name, trained in self._before:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(trained)


@contextmanager
def in_mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Within, all of ``net`` is in training or evaluation mode; afterwards each part in its own.

    By ``train``, where all of a module is in one mode, for some modules do more there.
    """
    before = {module: module.training for module in net.modules()}
    try:
        net.train(training)
        yield
    finally:
        for module, mode in before.items():  # from the whole to its parts
            if module.training == mode:
                continue
            if all(before.get(part, mode) == mode for part in module.modules()):
                module.train(mode)
            else:
                module.training = mode


def heads_to_train(
    net: nn.Module, modules_to_save: Sequence[str] | None, targets: Iterable[str], new_head: bool
) -> list[str]:
    """Full names of the modules to train as points: those that ``modules_to_save`` ends.

    By default, and with ``new_head``, the heads that hold none of the adapted layers, ``targets``.
    """
    targets = tuple(targets)
    if modules_to_save is None:
        heads = head_names(net) if new_head else []
        adapted = [head for head in heads if any(_within(t, head) for t in targets)]
        if parts := [head for head in adapted if head not in targets]:
            warnings.warn(
                f"target_modules adapts layers of {', '.join(parts)}, a head of the network, and "
                "nothing trains the rest of it; if it is new, leave it out with exclude_modules.",
                stacklevel=4,
            )
        return [head for head in heads if head not in adapted]
    found = [name for name, _ in net.named_modules() if name and matches(name, modules_to_save)]
    taken = (*targets, *filter(None, [body_of(net)]))
    for name in modules_to_save:
        chosen = [f for f in found if matches(f, [name])]
        if not chosen or any(_within(f, t) or _within(t, f) for f in chosen for t in taken):
            raise ConfigurationError(
                f"modules_to_save must name heads, of {head_names(net)}, that target_modules does "
                f"not adapt, got {name!r}."
            )
    return [f for f in found if not any(f != other and _within(f, other) for other in found)]


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


class TrainedHeads(PyroModule):
    """Trained copies, in single precision, of the tensors of some modules of the network.

    Within :meth:`in_place` they stand for the network's own, which stay frozen and as they were.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.roles: dict[str, str] = {}
        self._owners: dict[str, tuple[str, nn.Module, str]] = {}
        for head in names:
            for path, owner in net.get_submodule(head).named_modules(prefix=head):
                if "original_module" in path.split("."):  # PEFT's wrapper keeps the untrained one
                    continue
                away = hasattr(owner, "_hf_hook") and any(p.is_meta for p in owner.parameters())
                if is_quantized(owner) or away:
                    raise ConfigurationError(
                        f"{path} is {'offloaded' if away else 'quantized'} and cannot be "
                        "trained; load the network with it whole, or pass modules_to_save=()."
                    )
                for name, own in owner.named_parameters(recurse=False):
                    attribute = name_in_base(f"{path}.{name}").replace(".", "_")
                    self._owners[attribute] = f"{path}.{name}", owner, name
                    self.roles[attribute] = "head"
                    dtype = torch.promote_types(own.dtype, torch.float32)
                    setattr(self, attribute, PyroParam(own.detach().to(dtype, copy=True)))

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by their full names in the network."""
        return {full: getattr(self, name) for name, (full, _, _) in self._owners.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the network computes with the trained tensors; its own must not be sharded."""
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        for full, owner, name in self._owners.values():
            parameters: dict[str, Any] = owner._parameters
            before.append((parameters, name, parameters[name]))
            if hasattr(parameters[name], "full_tensor"):
                raise ConfigurationError(
                    f"{full} is sharded and cannot be trained: call fully_shard on the blocks of "
                    "the network, not on all of it, or pass modules_to_save=()."
                )
        try:
            for attribute, (parameters, name, own) in zip(self._owners, before, strict=True):
                parameters[name] = getattr(self, attribute).to(own.device, own.dtype)
            yield
        finally:
            for parameters, name, own in before:
                parameters[name] = own
