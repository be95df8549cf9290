"""Whether a shortcut holds: the one question that is asked of a network, and its answer kept.

No declaration tells whether an architecture honours a mask of its own, or reads more of a block
than what it puts out. So a shortcut is tried on a few tokens against the plain path, once for each
setting of the network, and where the logits differ the plain path is taken.
"""

import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from pyro_blora.network.adapter import adapter_of, layer_input, updates_in_place
from pyro_blora.network.freezing import evaluated
from pyro_blora.network.quantised import is_quantised
from pyro_blora.network.targets import device_of

__all__ = [
    "agree",
    "holds",
    "is_asked",
    "is_observed",
    "is_on",
    "is_sharded",
    "logits_of",
    "padding_of",
    "put",
    "rows_come_first",
    "runs_eagerly",
    "tokens_for",
    "window_of",
]

_WINDOW = re.compile(r"((window|chunk)(_size)?|index_topk)$")
_OFF: WeakSet[nn.Module] = WeakSet()
_ASKED: WeakSet[nn.Module] = WeakSet()
_ANSWERS: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


def put(net: nn.Module, *, on: bool) -> None:
    """Turns every shortcut of a network on or off."""
    (_OFF.discard if on else _OFF.add)(net)


def is_on(net: nn.Module) -> bool:
    """Whether shortcuts may be taken at all."""
    return net not in _OFF


def holds(net: nn.Module, shortcut: str, question: Callable[[], bool], *about: Hashable) -> bool:
    """Whether a shortcut gives the plain path's logits; asked once for each setting.

    Args:
        net: the network.
        shortcut: what a warning calls it where the answer is no; empty: there is none.
        question: asks the network, as pretrained (see :func:`_asked`).
        about: what else tells the question from others; modules are held weakly.

    Returns:
        The answer, kept for as long as attention's implementation and all modules are the same.
    """
    config = getattr(net, "config", None)
    settings = (getattr(config, f"_{kind}_implementation", None) for kind in ("attn", "experts"))
    about = tuple(ref(each) if isinstance(each, nn.Module) else each for each in about)
    key = (shortcut, about, *settings, *map(ref, net.modules()))
    answers = _ANSWERS.setdefault(net, {})
    if key not in answers:
        with _asked(net):
            answers[key] = question()
        if shortcut and not answers[key]:
            warnings.warn(
                f"{type(net).__name__} does not give the same logits with {shortcut}; it runs "
                "without, which is right and slower, as all does with fast=False.",
                stacklevel=2,
            )
    return answers[key]


@contextmanager
def _asked(net: nn.Module) -> Iterator[None]:
    """Within, ``net`` is as pretrained: no dropout, updates, gradients, autocast or graphs.

    Quantised layers, which drop nothing out, stay in the mode they are in: bitsandbytes' of 8 bits
    multiply in another way in each.
    """
    adapters = [a for a in map(adapter_of, net.modules()) if a is not None]
    eager = runs_eagerly(net.modules())
    with (
        evaluated(module for module in net.modules() if not is_quantised(module)),
        torch.no_grad(),
        torch.autocast(device_of(net.modules()).type, enabled=False),
        updates_in_place(adapters, [None] * len(adapters)),
        nullcontext() if eager else torch.compiler.set_stance("force_eager"),
    ):
        _ASKED.add(net)
        try:
            yield
        finally:
            _ASKED.discard(net)


def is_asked(net: nn.Module) -> bool:
    """Whether a pass of the network, now, is one of a question, which no shortcut may answer."""
    return net in _ASKED


def agree(given: Tensor | None, expected: Tensor | None) -> bool:
    """Whether there are two answers, and they are the same but for rounding.

    Relative to what varies in ``expected``: 1e-4, and 0.03 in half precision. Where nothing varies
    (a head of zeros) they tell nothing.
    """
    if given is None or expected is None or given.shape != expected.shape:
        return False
    half = expected.dtype in (torch.float16, torch.bfloat16)
    scale = (expected - expected.mean()).norm()
    return bool((given - expected).norm() < (0.03 if half else 1e-4) * scale)


def tokens_for(net: nn.Module, rows: int) -> Tensor | None:
    """A few rows of eight tokens; ``None`` where the network declares no vocabulary for them."""
    config = _text_config(net)
    if config is None or config.vocab_size < 8:
        return None
    ids = torch.arange(8 * rows, device=device_of(net.modules()))
    ids = (ids * 5 % 7 + 1).reshape(rows, 8)
    return ids.masked_fill(ids == padding_of(net), 0)  # real tokens alone


def padding_of(net: nn.Module) -> int:
    """The token that pads a row; some declare one that is none of theirs, instead of which 0."""
    config = _text_config(net)
    token = getattr(config, "pad_token_id", 0)
    return token if isinstance(token, int) and 0 <= token < config.vocab_size else 0


def logits_of(net: nn.Module, **inputs: Tensor) -> Tensor | None:
    """The network's logits, at real tokens alone; ``None`` where it refuses the input."""
    mask = inputs["attention_mask"]
    for options in ({"use_cache": False}, {}):  # an encoder may not know of caches
        with suppress(Exception):  # in whatever way it refuses
            logits: Tensor = net(**inputs, **options).logits
            per_token = logits.dim() == 3 and logits.shape[:2] == mask.shape
            return logits[mask.bool()] if per_token else logits
    return None


def window_of(net: nn.Module) -> int | None:
    """The fewest positions that a layer declares to attend to: a window, a chunk, the top few."""
    declared = getattr(_text_config(net), "__dict__", {}).items()
    windows = [v for name, v in declared if _WINDOW.search(name) and type(v) is int and v > 0]
    return min(windows, default=None)


def rows_come_first(net: nn.Module, layer: nn.Module) -> bool:
    """Whether the rows of a batch are the first dimension of what ``layer`` is given.

    They are the second one in XLNet. Not asked where the network takes no tokens, and where its
    weights are sharded among processes, of which some may have one particle and not ask.
    """
    ids = tokens_for(net, 3)
    if ids is None or is_sharded(net):
        return True

    def question() -> bool:
        found: list[torch.Size] = []

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(layer_input(args, kwargs).shape[:2])

        with layer.register_forward_pre_hook(note, with_kwargs=True):
            logits_of(net, input_ids=ids, attention_mask=torch.ones_like(ids))
        return found[:1] != [ids.mT.shape]

    return holds(net, "", question, layer)


def is_sharded(net: nn.Module) -> bool:
    """Whether processes hold shares of the weights (DTensors)."""
    return any(hasattr(p, "full_tensor") for p in net.parameters())


def runs_eagerly(modules: Iterable[nn.Module]) -> bool:
    """Whether the modules run as they stand, and not from a compiled graph."""
    return not any(
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in modules
    )


def is_observed(net: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether somebody looks at what ``modules`` are given or put out, and so wants all of it.

    By the configuration's ``output_hidden_states`` or ``output_attentions``, or by hooks, but for
    those of torch, of this library and of transformers, which leaves its own behind.
    """
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
    """What the network, or the first of its parts that does, declares of its vocabulary."""
    for module in net.modules():
        config: Any = getattr(module, "config", None)
        with suppress(Exception):  # whatever a class of one's own makes of the question
            if not isinstance(getattr(config, "vocab_size", None), int):
                config = config.get_text_config()
        if isinstance(getattr(config, "vocab_size", None), int):
            return config
    return None
