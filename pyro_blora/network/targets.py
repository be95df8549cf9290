"""Which layers of a network are adapted, and how they are grouped.

Targets are named as PEFT names them: a list of name suffixes, one regular expression, or
``"all-linear"``. Layers of equal shape form one :class:`LayerGroup`, and one group is one sample
site under one plate: the cost of Pyro does not grow with the depth of the network.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pyro_blora.errors import ConfigurationError, NoTargetError

__all__ = [
    "LayerGroup",
    "body_of",
    "device_of",
    "find_targets",
    "group_layers",
    "head_names",
    "layer_shape",
    "matches",
]

# Tried in order when target_modules is not given; the attention projections LoRA's authors adapt.
_DEFAULT_TARGETS = (
    ("q_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, OPT, ...
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("query", "value"),  # BERT, RoBERTa
    ("q_lin", "v_lin"),  # DistilBERT
    ("q", "v"),  # T5
)

# Of networks that do not say what their body is
_CLASSIFICATION_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class LayerGroup:
    """``n`` layers of one shape, adapted by one stacked update.

    Attributes:
        name: what the group is called in site and parameter names, e.g. ``"q_proj"``.
        module_names: the full names of the ``n`` layers inside the network.
        d_out: number of output features of each layer.
        d_in: number of input features of each layer.
        modules: the layers themselves; read by priors that start from the pretrained weight.
    """

    name: str
    module_names: tuple[str, ...]
    d_out: int
    d_in: int
    modules: tuple[nn.Module, ...] = field(repr=False, compare=False, default=())

    @property
    def n(self) -> int:
        """Number of layers in the group."""
        return len(self.module_names)

    @property
    def device(self) -> torch.device:
        """Where the first of the layers computes; see :func:`device_of`."""
        return device_of(self.modules)


def device_of(modules: Iterable[nn.Module]) -> torch.device:
    """Where the first of ``modules`` that tells computes.

    Args:
        modules: layers, or all modules of a network.

    Returns:
        The device at which Accelerate runs an offloaded module, or that of its tensors; the CPU
        where nothing has storage (device ``meta``).

    Example::

        >>> device_of([nn.ReLU(), nn.Linear(2, 2)])
        device(type='cpu')
    """
    for module in modules:
        # Between passes an offloaded weight is on the meta device
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("cpu")


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(d_out, d_in)`` of a linear layer, or ``None`` if ``module`` is not one.

    Linear layers are recognised by their declared features, never by their weight, so quantised
    layers count; transformers' ``Conv1D`` (GPT-2), which stores the weight transposed, counts too.
    """
    out_features, in_features = (getattr(module, k, None) for k in ("out_features", "in_features"))
    if isinstance(out_features, int) and isinstance(in_features, int):
        return out_features, in_features
    nf, nx = getattr(module, "nf", None), getattr(module, "nx", None)
    if type(module).__name__ == "Conv1D" and isinstance(nf, int) and isinstance(nx, int):
        return nf, nx
    return None


def matches(name: str, pattern: str | Sequence[str]) -> bool:
    """Whether a module's full name ends in one of ``pattern``, or is what a string describes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in pattern)


def _layer_index(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _output_head(net: nn.Module) -> nn.Module | None:
    getter = getattr(net, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def body_of(net: nn.Module) -> str | None:
    """The name of the part of a transformer below its heads, or ``None`` where it has no such."""
    getter = getattr(net, "get_base_model", None)  # PEFT's
    body = getattr(getter() if callable(getter) else net, "base_model", None)
    return next((name for name, module in net.named_modules() if name and module is body), None)


def head_names(net: nn.Module) -> list[str]:
    """Full names of a network's heads: what has parameters and stands beside its body.

    Example::

        >>> head_names(nn.ModuleDict({"h": nn.Linear(4, 4), "score": nn.Linear(4, 2)}))
        ['score']
    """
    body = body_of(net)
    if body is None:
        return [name for name, _ in net.named_modules() if matches(name, _CLASSIFICATION_HEADS)]
    parent = body.rpartition(".")[0]
    return [
        f"{parent}.{name}".removeprefix(".")
        for name, module in net.get_submodule(parent).named_children()
        if f"{parent}.{name}".removeprefix(".") != body and any(True for _ in module.parameters())
    ]


def find_targets(
    net: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    *,
    exclude_modules: str | Sequence[str] = (),
    layers_to_transform: int | Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """The linear layers of ``net`` that ``target_modules`` names, in the network's order.

    Args:
        net: the network.
        target_modules: a list of suffixes (``["q_proj", "lm_head"]``), a regular expression that
            must match the whole name, ``"all-linear"`` (all but output and classification heads),
            or ``None`` for the attention projections usual for the architecture.
        exclude_modules: suffixes or a regular expression to leave out.
        layers_to_transform: indices of the blocks to adapt; a layer outside any block, such as
            ``lm_head``, is then left out, as in PEFT. Default: all.

    Returns:
        A mapping from full name to layer.

    Raises:
        NoTargetError: nothing matches; the message lists near misses.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(find_targets(net, ["2"]))
        ['2']
    """
    linear = {n: m for n, m in net.named_modules() if n and layer_shape(m) is not None}
    if target_modules is None:
        for candidate in _DEFAULT_TARGETS:
            if all(any(matches(name, [suffix]) for name in linear) for suffix in candidate):
                target_modules = list(candidate)
                break
        else:
            raise NoTargetError(
                f"{type(net).__name__} has none of the usual attention projections; pass "
                f"target_modules=, a list of some of {_suffixes(linear)} or 'all-linear'."
            )
    if isinstance(target_modules, str) and target_modules == "all-linear":
        head, heads = _output_head(net), tuple(f"{name}." for name in head_names(net))
        chosen = {
            name: module
            for name, module in linear.items()
            if module is not head and not f"{name}.".startswith(heads)
        }
    else:
        chosen = {name: m for name, m in linear.items() if matches(name, target_modules)}
    named = dict(chosen)
    if exclude_modules:
        chosen = {name: m for name, m in chosen.items() if not matches(name, exclude_modules)}
    if layers_to_transform is not None:
        wanted = (
            {layers_to_transform}
            if isinstance(layers_to_transform, int)
            else set(layers_to_transform)
        )
        chosen = {name: m for name, m in chosen.items() if _layer_index(name) in wanted}
    if not chosen:
        raise NoTargetError(_no_target(target_modules, named, linear, layers_to_transform))
    return chosen


def _suffixes(linear: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in linear})


def _no_target(
    target_modules: str | Sequence[str],
    named: dict[str, nn.Module],
    linear: dict[str, nn.Module],
    layers_to_transform: int | Sequence[int] | None,
) -> str:
    if named:
        what = "exclude_modules" if layers_to_transform is None else "layers_to_transform"
        return (
            f"target_modules={target_modules!r} matches {len(named)} layers, but {what} leaves "
            f"none of them; loosen it. Matched: {', '.join(list(named)[:4])}."
        )
    available = _suffixes(linear)
    asked = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    near = sorted({m for a in asked for m in difflib.get_close_matches(a, available, cutoff=0.5)})
    hint = f" Did you mean {near}?" if near else ""
    return (
        f"target_modules={target_modules!r} matches no linear layer.{hint} "
        f"The network's linear layers end in {available}."
    )


def group_layers(targets: dict[str, nn.Module]) -> list[LayerGroup]:
    """Groups layers of equal shape, in the order of their first member.

    Args:
        targets: full names and layers, as :func:`find_targets` returns them.

    Returns:
        One group for each shape. A group is named after its layers' last name parts, joined by
        ``_`` (``"k_proj_v_proj"``), with the shape added where two groups would be called alike.

    Raises:
        ConfigurationError: ``targets`` is empty.

    Example::

        >>> groups = group_layers({"a.q": nn.Linear(4, 4), "b.q": nn.Linear(4, 4)})
        >>> groups[0].name, groups[0].n
        ('q', 2)
    """
    if not targets:
        raise ConfigurationError("There are no layers to group; pass at least one.")
    by_shape: dict[tuple[int, int], dict[str, nn.Module]] = defaultdict(dict)
    for name, module in targets.items():
        shape = layer_shape(module)
        if shape is None:
            raise ConfigurationError(f"{name} is a {type(module).__name__}, not a linear layer.")
        by_shape[shape][name] = module
    names = {s: "_".join(_suffixes(members)) for s, members in by_shape.items()}
    groups = []
    for (d_out, d_in), members in by_shape.items():
        name = names[d_out, d_in]
        if list(names.values()).count(name) > 1 or name.isdigit():
            name = f"{name}_{d_out}x{d_in}"
        if name[0].isdigit():
            name = f"layer_{name}"
        groups.append(LayerGroup(name, tuple(members), d_out, d_in, tuple(members.values())))
    return groups
