"""What a few tokens show of a network, and what its configuration and its hooks say of it."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.debts import hooks_of, is_compiled
from pyro_blora.network.adapter import (
    LayerHook,
    in_mode,
    layer_hook_of,
    updates_in_place,
)
from pyro_blora.network.targets import device_of, layer_shape
from pyro_blora.updates import LayerUpdate

_WINDOW = re.compile(r"((window|chunk)(_size)?|index_topk)$")


@contextmanager
def plainly(net: nn.Module) -> Iterator[None]:
    """Runs the network in evaluation mode, without updates, gradients, autocast and compilation."""
    eager = runs_eagerly(net.modules())
    hooks = [hook for hook in map(layer_hook_of, net.modules()) if hook is not None]
    with (
        updates_in_place(hooks, [None] * len(hooks)),
        in_mode(net, training=False),
        torch.no_grad(),
        torch.autocast(device_of(net.modules()).type, enabled=False),
        nullcontext() if eager else torch.compiler.set_stance("force_eager"),
    ):
        yield


def keeps_rows(
    net: nn.Module, hooks: Sequence[LayerHook], run: Callable[[int], Tensor | None]
) -> bool | None:
    """Whether two rows under two updates in one pass have the logits that each has in its own.

    They do not where Longformer and XLNet have the rows in the second dimension, or DeBERTa runs a
    layer on its relative positions, too. ``run`` gives the logits of so many equal rows. The result
    is None where the network cannot run on one of them, or where updates do not change its logits.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [layer_shape(hook.module) or (1, 1) for hook in hooks]
    random = partial(torch.randn, generator=generator)
    factors = [
        (random(2, 1, d_in), 0.3 / d_in**0.5 * random(2, d_out, 1)) for d_out, d_in in shapes
    ]

    def logits(*draws: int) -> Tensor | None:
        """A row for each draw, or one row without updates; ``None`` if the network raises."""
        at = list(draws)
        updates = [LayerUpdate(A[at], B[at]) if at else None for A, B in factors]
        with updates_in_place(hooks, updates), suppress(Exception):
            return run(max(1, len(at)))
        return None

    with plainly(net):
        bare, first, second = logits(), logits(0), logits(1)
        if bare is None or first is None or second is None:
            return None
        each, finite = torch.cat([first, second]), bare.isfinite()
        moved = (each - bare)[finite.expand_as(each)].norm()
        if moved <= 1e-3 * bare[finite].norm():  # as by the queries of a row of one token
            return None
        both = logits(0, 1)
        if both is None or both.shape != each.shape:
            return False
        # rounding is below a thousandth of what the updates change, rows that mix above a third
        return bool((both - each)[finite.expand_as(each)].norm() <= 0.1 * moved)


def logits_of_ids(net: nn.Module, rows: int) -> Tensor | None:
    """The logits of so many equal rows of a few token ids; ``None`` if the network raises."""
    return logits_of(net, input_ids=few_tokens(net, 1).expand(rows, -1))


def agree(given: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two tensors agree up to rounding, relative to the spread of their values."""
    if given is None or expected is None or given.shape != expected.shape:
        return False
    half = expected.dtype in (torch.float16, torch.bfloat16)
    scale = (expected - expected.mean()).norm()
    return bool((given - expected).norm() < (0.03 if half else 1e-4) * scale)


def few_tokens(net: nn.Module, rows: int) -> Tensor:
    """A few rows of eight token ids from 1 to 7."""
    ids = torch.arange(8 * rows, device=device_of(net.modules()))
    return (ids * 5 % 7 + 1).reshape(rows, 8)


def logits_of(net: nn.Module, **inputs: Tensor) -> Tensor | None:
    """The network's logits; ``None`` if it raises any exception on this input."""
    for options in ({"use_cache": False}, {}):  # an encoder may not take use_cache
        with suppress(Exception):
            logits: Tensor = net(**inputs, **options).logits
            return logits
    return None


def window_of(net: nn.Module) -> int | None:
    """The shortest attention span that the configuration declares: a window, chunk or top-k."""
    declared = getattr(_text_config(net), "__dict__", {}).items()
    windows = [v for name, v in declared if _WINDOW.search(name) and type(v) is int and v > 0]
    return min(windows, default=None)


def runs_eagerly(modules: Iterable[nn.Module]) -> bool:
    """Whether no module runs from a compiled graph."""
    return not any(map(is_compiled, modules))


def is_observed(net: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether the configuration or another library's hook reads what goes through ``modules``."""
    configs = (getattr(net, "config", None), _text_config(net))
    names = ("output_hidden_states", "output_attentions")
    if any(getattr(config, name, None) for config in configs for name in names):
        return True
    hooks = [hook for module in modules for hook in hooks_of(module)]
    packages = {str(getattr(hook, "__module__", "")).split(".")[0] for hook in hooks}
    return bool(packages - {"torch", "transformers", "pyro_blora"})


def _text_config(net: nn.Module) -> Any:
    """The configuration of a network, of its text part if it is multimodal."""
    config: Any = getattr(net, "config", None)
    with suppress(Exception):  # a user's own configuration class may do anything here
        return config.get_text_config()
    return config
