"""Asking a network what it can do, where no declaration of its architecture tells."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from pyro_blora.network.adapter import entering, without_updates
from pyro_blora.network.modes import modes_kept
from pyro_blora.network.quantised import is_quantised
from pyro_blora.network.targets import device_of

__all__ = [
    "agree",
    "all_rows_seen",
    "among",
    "answer",
    "asked",
    "in_plain_sight",
    "is_asked",
    "logits_for",
    "padding_of",
    "remembered",
    "rows_come_first",
    "shared_out",
    "tokens_for",
    "vocabulary_of",
    "way_to",
    "window_of",
]

AboutBlocks = Callable[[nn.Module, Sequence[nn.Module]], bool | None]

_WINDOW = re.compile(r"(window|chunk)(_size)?$")
_ASKED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def among(nets: WeakSet[nn.Module], net: nn.Module) -> Iterator[None]:
    """Within, ``net`` is one of ``nets``."""
    added = net not in nets
    nets.add(net)
    try:
        yield
    finally:
        if added:
            nets.discard(net)


@contextmanager
def asked(net: nn.Module) -> Iterator[None]:
    """Within, ``net`` is as pretrained: no dropout, updates, gradients, autocast or compiled graph.

    Quantised layers, which drop nothing out, stay in the mode they are in: bitsandbytes' of 8 bits
    multiply in another way in each.
    """
    device = device_of(net.modules())
    with modes_kept(net.modules()):
        for module in net.modules():
            if not is_quantised(module):
                module.training = False
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            _without_graphs(net),
            without_updates(net),
            among(_ASKED, net),
        ):
            yield


def is_asked(net: nn.Module) -> bool:
    """Whether a pass of the network, now, is one of a question."""
    return net in _ASKED


@contextmanager
def _without_graphs(net: nn.Module) -> Iterator[None]:
    """Within, parts that ``compile()`` has given a graph run as they stand.

    Module by module, for a stance of the compiler's would be that of all threads.
    """
    graphs = {m: m._compiled_call_impl for m in net.modules() if m._compiled_call_impl is not None}
    try:
        for module in graphs:
            module._compiled_call_impl = None
        yield
    finally:
        for module, graph in graphs.items():
            module._compiled_call_impl = graph


def answer(question: Callable[[], Tensor]) -> Tensor | None:
    """What the network answers; ``None`` where it refuses the input, in whatever way."""
    try:
        return question()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def agree(given: Tensor | None, expected: Tensor | None) -> bool:
    """Whether there are two answers, and they are the same but for rounding.

    Relative to what varies in ``expected``: 1e-4, and 0.03 in half precision. Where nothing varies
    (a head of zeros) they tell nothing.
    """
    if given is None or expected is None:
        return False
    half = expected.dtype in (torch.float16, torch.bfloat16)
    scale = (expected - expected.mean()).norm()
    return bool((given - expected).norm() < (0.03 if half else 1e-4) * scale)


def vocabulary_of(net: nn.Module) -> int:
    """How many tokens the network declares to know; 0 where it declares none."""
    return int(getattr(_text_config(net), "vocab_size", 0))


def padding_of(net: nn.Module) -> int:
    """The token that pads a row; some declare one that is none of theirs, instead of which 0."""
    token = getattr(_text_config(net), "pad_token_id", 0)
    return token if isinstance(token, int) and 0 <= token < vocabulary_of(net) else 0


def window_of(net: nn.Module) -> int | None:
    """The fewest positions that a layer declares to attend to, in a window or a chunk of a row."""
    declared = getattr(_text_config(net), "__dict__", {}).items()
    windows = [v for name, v in declared if _WINDOW.search(name) and type(v) is int and v > 0]
    return min(windows, default=None)


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


def all_rows_seen(net: nn.Module, blocks: Sequence[nn.Module], batch: Mapping[str, Any]) -> bool:
    """Whether somebody looks at what blocks put out on their way, and so wants every row of it.

    As hidden states or attentions, which the configuration or the batch asks for, or by hooks, but
    for those of libraries, which transformers leaves behind where it was once asked.
    """
    configs = [getattr(net, "config", None), _text_config(net)]
    names = ("output_hidden_states", "output_attentions")
    if any(batch.get(name) or any(getattr(c, name, None) for c in configs) for name in names):
        return True
    modules = {module for block in blocks for module in block.modules()}
    hooks = (
        h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )
    homes = (str(getattr(hook, "__module__", "")).split(".")[0] for hook in hooks)
    return any(home not in ("torch", "transformers", "pyro_blora") for home in homes)


def shared_out(net: nn.Module) -> bool:
    """Whether processes hold shares of the weights (DTensors)."""
    return any(hasattr(p, "full_tensor") for p in net.parameters())


def way_to(net: nn.Module, name: str) -> list[nn.Module]:
    """The modules on the way from the network to one of its own, this one included."""
    way: list[nn.Module] = []
    for word in name.split(".") if name else []:
        way.append(getattr(way[-1] if way else net, word))
    return way


def in_plain_sight(way: list[nn.Module]) -> bool:
    """Whether the modules run now, as they stand, and not from a graph or a second time."""
    again = torch.is_grad_enabled() and any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in way
    )
    compiled = any(
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in way
    )
    return not again and not compiled


def tokens_for(net: nn.Module, rows: int) -> Tensor | None:
    """A few rows of eight tokens; ``None`` where the network declares no vocabulary for them."""
    if vocabulary_of(net) < 8:
        return None
    ids = torch.arange(8 * rows, device=device_of(net.modules()))
    return (ids * 5 % 7 + 1).reshape(rows, 8)


def logits_for(net: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """The network's logits of real tokens, or of rows; ``None`` where it refuses the rows.

    Args:
        net: the network.
        ids: rows of tokens, ``(R, T)``.
        mask: which of them are real; default: all.
    """
    real = torch.ones_like(ids) if mask is None else mask

    def question(**options: Any) -> Tensor:
        found: Tensor = net(input_ids=ids, attention_mask=real, **options).logits
        return found[real.bool()] if found.dim() == 3 and found.shape[:2] == ids.shape else found

    # an encoder may not know of caches, and a decoder beside one asks for tokens of its own
    ways: list[dict[str, Any]] = [{"use_cache": False}, {}, {"decoder_input_ids": ids}]
    for options in ways:
        found = answer(partial(question, **options))
        if found is not None:
            return found
    return None


def remembered(ask: AboutBlocks) -> AboutBlocks:
    """The same question of a network about its blocks, asked again where these are others."""
    answers: WeakKeyDictionary[nn.Module, deque[tuple[int, WeakSet[nn.Module], bool | None]]]
    answers = WeakKeyDictionary()

    @wraps(ask)
    def known(net: nn.Module, blocks: Sequence[nn.Module]) -> bool | None:
        about = WeakSet(blocks)
        held = answers.setdefault(net, deque(maxlen=4))
        for count, modules, answered in held:
            if count == len(about) and modules == about:
                return answered
        held.append((len(about), about, ask(net, blocks)))
        return held[-1][2]

    return known


@remembered
def rows_come_first(net: nn.Module, layers: Sequence[nn.Module]) -> bool | None:
    """Whether the rows of a batch are the first dimension of what these layers are given.

    They are the second one in XLNet. ``None`` where the network takes no tokens, and where its
    weights are shared out among processes, of which some may have one particle and not ask.
    """
    ids = tokens_for(net, 3)
    if ids is None or shared_out(net):
        return None
    leading: set[torch.Size] = set()

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leading.add(entering(args, kwargs).shape[:2])

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        with asked(net):
            logits_for(net, ids)
    return ids.mT.shape not in leading
