"""Shortcuts that give the network's own logits, and how the network is asked whether they do.

A shortcut is tried on a few tokens against the plain path, once for each network.
"""

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

from pyro_blora.network.adapter import (
    adapter_of,
    in_mode,
    layer_input,
    put_forward_back,
    updates_in_place,
)
from pyro_blora.network.targets import device_of, head_of

_WINDOW = re.compile(r"((window|chunk)(_size)?|index_topk)$")
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")


class Shortcuts:
    """Which shortcuts a likelihood takes, and what the networks that it scored have answered."""

    def __init__(self) -> None:
        self.on = True
        self.asking = False  # True during a verification pass, which must not use shortcuts
        self._answers: dict[tuple[Any, ...], bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"on": self.on, "asking": False, "_answers": {}}  # a copied network is asked anew

    def verified(self, net: nn.Module, shortcut: str, question: Callable[[], bool]) -> bool:
        """Whether a shortcut is on and ``question`` finds the plain path's logits with it.

        It is asked once for each implementation of attention and of experts.
        """
        if not self.on or getattr(_text_config(net), "vocab_size", 0) < 8:
            return False
        config = getattr(net, "config", None)
        settings = (
            getattr(config, f"_{kind}_implementation", None) for kind in ("attn", "experts")
        )
        key = (weakref.ref(net), shortcut, *settings)
        if key not in self._answers:
            with self._as_pretrained(net):
                self._answers[key] = question()
            if not self._answers[key]:
                warnings.warn(
                    f"{type(net).__name__} does not give the same logits with {shortcut}; it runs "
                    "without, which is right and slower, as all does with fast=False.",
                    stacklevel=2,
                )
        return self._answers[key]

    @contextmanager
    def _as_pretrained(self, net: nn.Module) -> Iterator[None]:
        """Within, a question is asked: no dropout, updates, gradients, autocast or graphs."""
        adapters = [a for a in map(adapter_of, net.modules()) if a is not None]
        eager = runs_eagerly(net.modules())
        with (
            in_mode(net, training=False),
            torch.no_grad(),
            torch.autocast(device_of(net.modules()).type, enabled=False),
            updates_in_place(adapters, [None] * len(adapters)),
            nullcontext() if eager else torch.compiler.set_stance("force_eager"),
        ):
            self.asking = True
            try:
                yield
            finally:
                self.asking = False

    def skippable_blocks(
        self, net: nn.Module, names: Sequence[str], trained: Sequence[str] = ()
    ) -> list[nn.Module]:
        """The frozen blocks, where the network gives the same logits without running them again.

        None where one is compiled, sharded or observed, or a ``trained`` module stands before them.
        """
        blocks = frozen_blocks(net, names)
        if not blocks or not self.on:
            return []
        inside = [module for block in blocks for module in block.modules()]
        before = set(takewhile(lambda module: module is not blocks[0], net.modules()))
        usable = (
            not any(net.get_submodule(name) in before for name in trained)
            and runs_eagerly(net.modules())
            and not any(hasattr(p, "full_tensor") for p in net.parameters())  # of sharded weights
            and not is_observed(net, inside)
            and self.verified(
                net, "its frozen blocks skipped", partial(_skips, net, FrozenPrefix(blocks, self))
            )
        )
        return blocks if usable else []


class FrozenPrefix:
    """What the frozen blocks put out for one batch, recorded once for all draws of a prediction.

    The first pass records what the last block puts out, and later passes give the record back.
    """

    def __init__(self, blocks: Sequence[nn.Module], shortcuts: Shortcuts) -> None:
        self.blocks, self.shortcuts = blocks, shortcuts
        self.kept: Tensor | None = None
        self._tuples: dict[int, tuple[type, int]] = {}  # of blocks that put out several things
        self._copies, self._passes = 1, 0
        self._asked = self._skips = False

    @contextmanager
    def copies(self, number: int) -> Iterator[None]:
        """Within, a pass of the network is the batch that many times over; first of all once."""
        self._copies, self._passes = number, 0
        self._asked = self.shortcuts.asking
        before = [vars(block).get("forward") for block in self.blocks]  # another library's
        for index, block in enumerate(self.blocks):
            block.forward = partial(self._forward, index, block.forward)
        try:
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                put_forward_back(block, own)

    def _forward(self, index: int, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.shortcuts.asking != self._asked:
            return own(*args, **kwargs)
        hidden, last = layer_input(args, kwargs), index == len(self.blocks) - 1
        if index == 0:
            self._passes += 1
            self._skips = self.kept is not None and len(hidden) == len(self.kept) * self._copies
        if self._passes > 1:  # another input of the same rows, or row by row
            return own(*args, **kwargs)
        if self._skips and self.kept is not None:
            hidden = self.kept.repeat(self._copies, 1, 1) if last else hidden
            if index not in self._tuples:
                return hidden
            kind, count = self._tuples[index]
            return kind((hidden, *[None] * (count - 1)))
        output = value = own(*args, **kwargs)
        if isinstance(output, tuple | list):
            self._tuples[index], value = (type(output), len(output)), output[0]
        if last and self.kept is None:
            self.kept = value.detach()
        return output


def frozen_blocks(net: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks that come before every adapted layer (named in full), in order.

    None where they cannot be told, as with layers in two lists (an encoder and a decoder).
    """
    found = {name: _BLOCK.match(name) for name in names}
    head = head_of(net)
    if any(match is None and net.get_submodule(name) is not head for name, match in found.items()):
        return []
    inside = [match for match in found.values() if match is not None]
    if not inside:  # the head alone is adapted
        lists = [m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        return list(lists[0]) if len(lists) == 1 else []
    blocks = net.get_submodule(inside[0][1])
    if not isinstance(blocks, nn.ModuleList) or len({match[1] for match in inside}) > 1:
        return []
    below = list(blocks)[: min(int(match[2]) for match in inside)]
    return below if len(set(below)) == len(below) else []


def _skips(net: nn.Module, prefix: FrozenPrefix) -> bool:
    """Whether rows that come again, twice over, skip the blocks."""
    ids = few_tokens(net, 3)
    mask = (torch.arange(8, device=ids.device) < ids.new_tensor([[8], [5], [4]])).long()
    for copies in (1, 2):
        rows = {"input_ids": ids.repeat(copies, 1), "attention_mask": mask.repeat(copies, 1)}
        expected = logits_of(net, **rows)
        with prefix.copies(copies):
            found = logits_of(net, **rows)
        if found is not None and expected is not None and expected.shape[:2] == (3 * copies, 8):
            found, expected = (x[rows["attention_mask"].bool()] for x in (found, expected))
        if not agree(found, expected):
            return False
    return prefix.kept is not None


def agree(given: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two answers are the same but for rounding, relative to what varies in them."""
    if given is None or expected is None or given.shape != expected.shape:
        return False
    half = expected.dtype in (torch.float16, torch.bfloat16)
    scale = (expected - expected.mean()).norm()
    return bool((given - expected).norm() < (0.03 if half else 1e-4) * scale)


def few_tokens(net: nn.Module, rows: int) -> Tensor:
    """A few rows of eight tokens, of the first of any vocabulary."""
    ids = torch.arange(8 * rows, device=device_of(net.modules()))
    return (ids * 5 % 7 + 1).reshape(rows, 8)


def logits_of(net: nn.Module, **inputs: Tensor) -> Tensor | None:
    """The network's logits; ``None`` where it refuses the input, in whatever way it does."""
    for options in ({"use_cache": False}, {}):  # an encoder may not know of caches
        with suppress(Exception):
            logits: Tensor = net(**inputs, **options).logits
            return logits
    return None


def window_of(net: nn.Module) -> int | None:
    """The fewest positions that a layer declares to attend to: a window, a chunk, the top few."""
    declared = getattr(_text_config(net), "__dict__", {}).items()
    windows = [v for name, v in declared if _WINDOW.search(name) and type(v) is int and v > 0]
    return min(windows, default=None)


def runs_eagerly(modules: Iterable[nn.Module]) -> bool:
    """Whether the modules run as they stand, and not from a compiled graph."""
    return not any(
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in modules
    )


def is_observed(net: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether the configuration or a hook of others looks at what ``modules`` get or put out."""
    configs = (getattr(net, "config", None), _text_config(net))
    names = ("output_hidden_states", "output_attentions")
    if any(getattr(config, name, None) for config in configs for name in names):
        return True
    homes = {
        str(getattr(hook, "__module__", "")).split(".")[0]
        for module in modules
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    }
    return bool(homes - {"torch", "transformers", "pyro_blora"})


def _text_config(net: nn.Module) -> Any:
    """What the network declares of its text, which has a part of its own beside images."""
    config: Any = getattr(net, "config", None)
    with suppress(Exception):  # whatever a class of one's own makes of the question
        return config.get_text_config()
    return config
