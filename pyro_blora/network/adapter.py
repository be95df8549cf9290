"""How a layer of the network receives its update.

The network is not rebuilt: each adapted layer gets a forward hook, so its parameters, its name, its
class (quantised or not) and its ties stay what they were, and taking the hook off gives the
network back exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyro_blora.errors import ConfigurationError
from pyro_blora.updates.low_rank_update import LayerUpdate

__all__ = [
    "Adapter",
    "adapter_of",
    "check_free",
    "layer_input",
    "put_forward_back",
    "updates_in_place",
    "updates_kept_for_backward",
]

# Names of what a block or a layer is given
_INPUTS = ("hidden_states", "hidden_state", "input", "x")


class Adapter:
    """Adds the current update to the output of one layer; without one, the layer is untouched.

    Attributes:
        name: the layer's full name.
        update: what is added, or ``None``.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        check_free(name, module)
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


def check_free(name: str, module: nn.Module) -> None:
    """Raises ConfigurationError where a layer has an adapter already."""
    if adapter_of(module) is not None:
        raise ConfigurationError(
            f"{name} is adapted already; call .unwrap() on the BayesianLoRA that holds it."
        )


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
    """Within, those of ``modules`` under activation checkpointing take ``updates`` along.

    Backward runs such a block a second time, when the updates are off the layers again, or are
    those of another pass; transformers runs it through ``_gradient_checkpointing_func``.
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
