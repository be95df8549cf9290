"""Shortcuts that save computation without changing the logits, each verified once a network."""

import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.debts import attention_of, experts_of, hooks_of, is_compiled
from pyro_blora.network.adapter import (
    LayerHook,
    in_mode,
    layer_hook_of,
    layer_input,
    put_forward_back,
    updates_in_place,
)
from pyro_blora.network.targets import device_of, head_of, layer_shape
from pyro_blora.updates import LayerUpdate

_WINDOW = re.compile(r"((window|chunk)(_size)?|index_topk)$")
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")


class Shortcuts:
    """Whether a likelihood takes shortcuts, and which ones are verified for its networks."""

    def __init__(self) -> None:
        self.on = True
        self.verifying = False  # a verification pass must not use shortcuts
        self._answers: dict[tuple[Any, ...], bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy is for another network, which is verified anew
        return {"on": self.on, "verifying": False, "_answers": {}}

    def verified(self, net: nn.Module, shortcut: str, check: Callable[[], bool]) -> bool:
        """Whether this shortcut is on and was verified for this network by ``check``."""
        if not self.on or getattr(_text_config(net), "vocab_size", 0) < 8:
            return False
        key = (weakref.ref(net), shortcut, attention_of(net), experts_of(net))
        if key not in self._answers:
            hooks = [hook for hook in map(layer_hook_of, net.modules()) if hook is not None]
            with _plainly(net), updates_in_place(hooks, [None] * len(hooks)):
                try:
                    self.verifying = True
                    self._answers[key] = check()
                finally:
                    self.verifying = False
            if not self._answers[key]:
                warnings.warn(
                    f"{type(net).__name__} does not give the same logits with {shortcut}; it runs "
                    "without this shortcut, which is correct but slower (fast=False uses none).",
                    stacklevel=2,
                )
        return self._answers[key]

    def skippable_blocks(
        self, net: nn.Module, names: Sequence[str], trained: Sequence[str] = ()
    ) -> list[nn.Module]:
        """The frozen blocks that need not run for every draw, because the logits stay the same."""
        blocks = frozen_blocks(net, names)
        if not blocks or not self.on:
            return []
        inside = [module for block in blocks for module in block.modules()]
        before = set(takewhile(lambda module: module is not blocks[0], net.modules()))
        check = partial(_skips, net, FrozenPrefix(blocks, self))
        usable = (
            not any(net.get_submodule(name) in before for name in trained)
            and runs_eagerly(net.modules())
            and not any(hasattr(p, "full_tensor") for p in net.parameters())  # sharded
            and not is_observed(net, inside)
            and self.verified(net, "its frozen blocks skipped", check)
        )
        return blocks if usable else []


@contextmanager
def _plainly(net: nn.Module) -> Iterator[None]:
    """Runs the network in evaluation mode, not compiled, without gradients and autocast."""
    eager = runs_eagerly(net.modules())
    with (
        in_mode(net, training=False),
        torch.no_grad(),
        torch.autocast(device_of(net.modules()).type, enabled=False),
        nullcontext() if eager else torch.compiler.set_stance("force_eager"),
    ):
        yield


def keeps_rows(net: nn.Module, hooks: Sequence[LayerHook]) -> bool:
    """Whether two rows under two updates in one pass have the logits that each has in its own.

    They do not where Longformer and XLNet have the rows in the second dimension, or DeBERTa runs a
    layer on its relative positions, too. A network that cannot run on token ids alone passes.
    """
    ids, generator = few_tokens(net, 2), torch.Generator().manual_seed(0)
    shapes = [layer_shape(hook.module) or (1, 1) for hook in hooks]
    random = partial(torch.randn, generator=generator)
    factors = [
        (random(2, 1, d_in), 0.3 / d_in**0.5 * random(2, d_out, 1)) for d_out, d_in in shapes
    ]

    def logits(rows: slice) -> Tensor | None:
        updates = [LayerUpdate(A[rows], B[rows]) for A, B in factors]
        with updates_in_place(hooks, updates):
            return logits_of(net, input_ids=ids[rows])

    with _plainly(net), updates_in_place(hooks, [None] * len(hooks)):
        plain = logits_of(net, input_ids=ids)
        apart = [logits(slice(k, k + 1)) for k in range(2)]
        if plain is None or apart[0] is None or apart[1] is None or not plain.isfinite().all():
            return True
        both, each = logits(slice(0, 2)), torch.cat([apart[0], apart[1]])
        # rounding is below a thousandth of what the updates change, rows that mix above a third
        return both is not None and bool((both - each).norm() <= 0.1 * (each - plain).norm())


class FrozenPrefix:
    """Records the frozen blocks' output for a batch in one pass, and reuses it in later ones."""

    def __init__(self, blocks: Sequence[nn.Module], shortcuts: Shortcuts) -> None:
        self.blocks, self.shortcuts = blocks, shortcuts
        self.kept: Tensor | None = None
        self._tuples: dict[int, tuple[type, int]] = {}  # type and length of a block's outputs
        self._copies, self._passes = 1, 0
        self._verifying = self._skips = False

    @contextmanager
    def copies(self, number: int) -> Iterator[None]:
        """Expects ``number`` copies of the batch per pass; the recording pass must run only one."""
        self._copies, self._passes = number, 0
        self._verifying = self.shortcuts.verifying
        before = [vars(block).get("forward") for block in self.blocks]  # set by another library
        for index, block in enumerate(self.blocks):
            block.forward = partial(self._forward, index, block.forward)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                put_forward_back(block, forward)

    def _forward(
        self, index: int, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a block, or returns what it returned in the recording pass."""
        if self.shortcuts.verifying != self._verifying:
            return forward(*args, **kwargs)
        hidden, last = layer_input(args, kwargs), index == len(self.blocks) - 1
        if index == 0:
            self._passes += 1
            self._skips = self.kept is not None and len(hidden) == len(self.kept) * self._copies
        if self._passes > 1:  # a likelihood that runs the network again, on another input
            return forward(*args, **kwargs)
        if self._skips and self.kept is not None:
            hidden = self.kept.repeat(self._copies, 1, 1) if last else hidden
            if index not in self._tuples:
                return hidden
            kind, count = self._tuples[index]
            return kind((hidden, *[None] * (count - 1)))
        output = value = forward(*args, **kwargs)
        if isinstance(output, tuple | list):
            self._tuples[index], value = (type(output), len(output)), output[0]
        if last and self.kept is None:
            self.kept = value.detach()
        return output


def frozen_blocks(net: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks before all adapted layers, in order; none if there are several block lists."""
    outside = [name for name in names if not _BLOCK.match(name)]
    if any(net.get_submodule(name) is not head_of(net) for name in outside):
        return []
    inside = [match for match in map(_BLOCK.match, names) if match is not None]
    if not inside:  # only the head is adapted
        lists = [m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        return list(lists[0]) if len(lists) == 1 else []
    blocks = net.get_submodule(inside[0][1])
    if not isinstance(blocks, nn.ModuleList) or len({match[1] for match in inside}) > 1:
        return []
    below = list(blocks)[: min(int(match[2]) for match in inside)]
    return below if len(set(below)) == len(below) else []


def _skips(net: nn.Module, prefix: FrozenPrefix) -> bool:
    """Whether the logits stay the same when the same rows, once and twice, skip the blocks."""
    ids = few_tokens(net, 3)
    mask = (torch.arange(8, device=ids.device) < ids.new_tensor([[8], [5], [4]])).long()
    for copies in (1, 2):
        rows = {"input_ids": ids.repeat(copies, 1), "attention_mask": mask.repeat(copies, 1)}
        expected = logits_of(net, **rows)
        with prefix.copies(copies):
            logits = logits_of(net, **rows)
        if logits is not None and expected is not None and expected.shape[:2] == (3 * copies, 8):
            logits, expected = (x[rows["attention_mask"].bool()] for x in (logits, expected))
        if not agree(logits, expected):
            return False
    return prefix.kept is not None


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
