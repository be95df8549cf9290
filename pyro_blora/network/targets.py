"""Which layers of a network are adapted, how they are grouped, and their pretrained weights.

Targets are given as in PEFT: a list of name suffixes, one regular expression, or ``"all-linear"``.
Layers with the same name ending and shape form a :class:`LayerGroup`, which is one sample site
under one plate, so that Pyro's overhead does not grow with the depth of the network.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_blora.debts import execution_device, is_made_by_compile, is_offloaded, slots_of
from pyro_blora.errors import ConfigurationError, near_miss

T = TypeVar("T")

# Tried in order if target_modules is not given: the attention projections of the LoRA paper
_DEFAULT_TARGETS = (
    ("q_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, OPT, ...
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("query", "value"),  # BERT, RoBERTa
    ("q_lin", "v_lin"),  # DistilBERT
    ("q", "v"),  # T5
)

_CLASSIFICATION_HEADS = ("score", "classifier")  # of a network that declares no base_model


@dataclass(frozen=True)
class LayerGroup:
    """``n`` layers of one kind and shape, adapted by one stacked update."""

    name: str  #: the group's name in site and parameter names, e.g. ``"q_proj"``
    module_names: tuple[str, ...]  #: the full names of the ``n`` layers inside the network
    d_out: int  #: number of output features of each layer
    d_in: int  #: number of input features of each layer
    #: the layers themselves, for priors that read the pretrained weight
    modules: tuple[nn.Module, ...] = field(repr=False, compare=False, default=())

    @property
    def n(self) -> int:
        """Number of layers in the group."""
        return len(self.module_names)

    @property
    def device(self) -> torch.device:
        """Device of the first layer; see :func:`device_of`."""
        return device_of(self.modules)


def device_of(modules: Iterable[nn.Module]) -> torch.device:
    """The device of the first module with storage, or the CPU."""
    for module in modules:
        if (device := execution_device(module)) is not None:
            return device
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("cpu")


def layer_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """``(d_out, d_in)`` of a linear layer, also a quantized one or a ``Conv1D``, else ``None``."""
    for names in (("out_features", "in_features"), ("nf", "nx")):
        d_out, d_in = (getattr(module, name, None) for name in names)
        if isinstance(d_out, int) and isinstance(d_in, int):
            return d_out, d_in
    return None


def matches(name: str, pattern: str | Sequence[str]) -> bool:
    """Whether a full name ends in one of several suffixes, or matches a regular expression."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(f".{name}".endswith(f".{suffix}") for suffix in pattern)


def head_of(net: nn.Module) -> nn.Module | None:
    """The output head of a language model, or ``None``."""
    getter = getattr(net, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def without_peft(net: nn.Module) -> nn.Module:
    """The base network of a ``PeftModel``, or the network itself."""
    getter = getattr(net, "get_base_model", None)
    return getter() if callable(getter) else net


def body_of(net: nn.Module) -> str | None:
    """The name of a transformer's body, to which its heads are attached, or ``None``."""
    body = getattr(without_peft(net), "base_model", None)
    return next((name for name, module in net.named_modules() if name and module is body), None)


def head_names(net: nn.Module) -> list[str]:
    """Full names of a network's heads: the siblings of its body that have parameters."""
    body = body_of(net)
    if body is None:
        return [name for name, _ in net.named_modules() if matches(name, _CLASSIFICATION_HEADS)]
    parent, dot, last = body.rpartition(".")
    beside = net.get_submodule(parent).named_children()
    return [f"{parent}{dot}{n}" for n, m in beside if n != last and list(m.parameters())]


def is_classifier(net: nn.Module) -> bool:
    """Whether a network has a head that is not a language model's."""
    return head_of(net) is None and bool(head_names(net))


#: What the head of a network may give for each row.
TEXT, CLASS, NUMBER = "text", "one of several classes", "a number"
LABELS, TAGS = "several labels at once", "a tag for each token"


def kind_of_head(net: nn.Module) -> str:
    """What the head of a network gives for each row, by its class and its configuration."""
    if not is_classifier(net):
        return CLASS if head_of(net) is None else TEXT
    config: Any = getattr(net, "config", None)
    problem, count = (getattr(config, name, None) for name in ("problem_type", "num_labels"))
    if "TokenClassification" in type(without_peft(net)).__name__:
        return TAGS
    if problem == "multi_label_classification":
        return LABELS
    return NUMBER if problem == "regression" or (problem is None and count == 1) else CLASS


def logit_names(net: nn.Module) -> tuple[str, ...]:
    """The names that a classifier gives its logits, or none for ``LABEL_0``, ``LABEL_1``, ...."""
    config: Any = getattr(net, "config", None)
    names = tuple(str(config.id2label[k]) for k in range(config.num_labels)) if config else ()
    return () if names == tuple(f"LABEL_{k}" for k in range(len(names))) else names


def check_bare(net: nn.Module) -> None:
    """Raises ConfigurationError if ``net`` has an adapter of PEFT, or torch.compile made it."""
    if is_made_by_compile(net):
        raise ConfigurationError(
            "The network must be the module that torch.compile was given, got what it returned, "
            "whose layers have other names; adapt the module, and compile it by net.compile()."
        )
    if any(hasattr(module, "peft_config") for module in net.modules()):
        raise ConfigurationError(
            f"The network must have no adapter of PEFT, got a {type(net).__name__}; call from_peft "
            "or bayesianize for a posterior around its LoRA, or merge the LoRA first."
        )


def find_targets(
    net: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    layers_to_transform: int | Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """The linear layers of ``net`` that match ``target_modules``, by full name, in order.

    As in PEFT, ``"all-linear"`` leaves out the heads, and ``layers_to_transform`` restricts the
    targets to the blocks with these indices.
    """
    check_bare(net)
    linear = {n: m for n, m in net.named_modules() if n and layer_shape(m) is not None}
    endings = {name.rpartition(".")[2] for name in linear}
    if target_modules is None:
        usual = [names for names in _DEFAULT_TARGETS if endings >= {*names}]
        if not usual:
            raise ConfigurationError(
                f"{type(net).__name__} has none of the usual attention projections; pass "
                f"target_modules=, a list of some of {sorted(endings)} or 'all-linear'."
            )
        target_modules = usual[0]
    if target_modules == "all-linear":
        head, heads = head_of(net), tuple(f"{name}." for name in head_names(net))
        named = [n for n, m in linear.items() if m is not head and not f"{n}.".startswith(heads)]
    else:
        named = [name for name in linear if matches(name, target_modules)]
    chosen = [name for name in named if not matches(name, exclude_modules or ())]
    if layers_to_transform is not None:
        indices = layers_to_transform
        wanted = {indices} if isinstance(indices, int) else {*indices}
        blocks = {name: re.search(r"\.(\d+)\.", name) for name in chosen}
        chosen = [name for name, block in blocks.items() if block and int(block[1]) in wanted]
    if chosen:
        given = {"target_modules": target_modules, "exclude_modules": exclude_modules}
        for option, names in given.items():
            rules: list[Any] = [names] if isinstance(names, str) else [[name] for name in names]
            rules = [rule for rule in rules if rule not in ("", "all-linear")]
            idle = ["".join(r) for r in rules if not any(matches(name, r) for name in linear)]
            if idle:  # most likely a typo, or a name where a regular expression is expected
                hint = near_miss(idle[0], endings)
                warnings.warn(f"{idle} of {option} matches no linear layer; {hint}", stacklevel=4)
        return {name: linear[name] for name in chosen}
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    raise ConfigurationError(
        f"target_modules={target_modules!r} matches {len(named)} linear layers, of which "
        "exclude_modules and layers_to_transform leave none. A list has suffixes, and a string is "
        f"a regular expression for whole names; {near_miss((*names, '')[0], endings)}."
    )


def group_layers(targets: Mapping[str, nn.Module]) -> list[LayerGroup]:
    """Groups layers with the same name ending and shape, in the order of their first member.

    The group is named after that ending, ``"q_proj"``, or ``"layer"`` if it is a number. If layers
    of one name differ in shape, the shape is added: ``"q_proj_16x32"``.
    """
    kinds: dict[tuple[str, tuple[int, int]], dict[str, nn.Module]] = defaultdict(dict)
    for name, module in targets.items():
        shape, ending = layer_shape(module), name.rsplit(".", 1)[-1]
        assert shape is not None
        kinds["layer" if ending.isdigit() else ending, shape][name] = module
    shapes = Counter(ending for ending, _ in kinds)
    groups = []
    for (ending, (d_out, d_in)), members in kinds.items():
        name = ending if shapes[ending] == 1 else f"{ending}_{d_out}x{d_in}"
        groups.append(LayerGroup(name, tuple(members), d_out, d_in, tuple(members.values())))
    return groups


def by_group(option: str, given: T | Mapping[str, T], groups: Sequence[LayerGroup]) -> dict[str, T]:
    """The object of each group: one for all, or the first match of a mapping's keys."""
    names = [group.name for group in groups]
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    keys = {name: [k for k in given if k == name or re.fullmatch(k, name)] for name in names}
    if not all(keys.values()) or {*given} - {key for each in keys.values() for key in each}:
        raise ConfigurationError(
            f"{option} must have keys that match groups of layers, and one for each of {names}, "
            f"got {list(given)}; a key is a name or a regular expression, such as '.*'."
        )
    return {name: given[name if name in given else each[0]] for name, each in keys.items()}


def _is_of_torchao(weight: Tensor) -> bool:
    """Whether a weight is a subclass that pretends to be floats, and dequantizes itself."""
    return type(weight).dequantize is not Tensor.dequantize


def is_quantized(module: nn.Module) -> bool:
    """Whether the module has a weight that torchao or bitsandbytes quantized."""
    weight = slots_of(module).get("weight")
    if weight is None:
        return False
    of_bitsandbytes = hasattr(weight, "quant_state") or not weight.is_floating_point()
    return of_bitsandbytes or _is_of_torchao(weight)


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """The weight of a linear layer, ``(d_out, d_in)``, dequantized, in torch's default dtype."""
    weight, shape = _dequantized(module), layer_shape(module)
    if weight is not None and type(module).__name__ == "Conv1D":
        weight = weight.mT
    plain = weight is not None and weight.is_floating_point() and weight.element_size() > 1
    if weight is None or not plain or weight.shape != shape:
        raise ConfigurationError(
            f"{name} has no weight of {shape} floats that can be read; pass KroneckerInducing("
            "sigma=...), or load the network unquantized, or quantized by torchao or bitsandbytes."
        )
    return weight.to(torch.get_default_dtype())


def _dequantized(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if is_offloaded(module):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            weight = module.weight
            assert isinstance(weight, Tensor)
    if hasattr(weight, "full_tensor"):  # a DTensor holds only a shard
        weight = weight.full_tensor()
    if getattr(weight, "quant_state", None) is not None or weight.dtype == torch.int8:
        from transformers.integrations import bitsandbytes

        weight = bitsandbytes.dequantize_bnb_weight(weight, getattr(module, "state", None))
    elif _is_of_torchao(weight):
        weight = weight.dequantize()
    return weight.detach()


@torch.no_grad()
def top_singular(group: LayerGroup, left: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors, ``(n, left, d_out)`` and ``(n, right, d_in)``, and all values."""
    vectors = []
    for name, module in zip(group.module_names, group.modules, strict=True):
        weight, size = dense_weight(module, name), min(group.d_out, group.d_in)
        if weight.is_meta:
            U, S, Vh = torch.eye(group.d_out), torch.ones(size), torch.eye(group.d_in)
        else:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=max(left, right) > size)
        vectors.append((U.mT[:left], Vh[:right], S))
    lefts, rights, values = map(torch.stack, zip(*vectors, strict=True))
    return lefts, rights, values
