"""Saving an adapter to a folder or the hub, and loading it onto its base.

A safetensors file is the whole adapter, with the configuration that rebuilds it in its header.
"""

import functools
import importlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pyro.infer.autoguide as autoguide
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import transform_to

import pyro_blora.guides as guides
import pyro_blora.likelihoods as likelihoods
import pyro_blora.models as models
from pyro_blora._version import __version__
from pyro_blora.checkpoints.card import CARD, MARK, Training, figures_of, model_card
from pyro_blora.checkpoints.files import write_file
from pyro_blora.errors import CheckpointError, first_line, readable
from pyro_blora.guides import SiteGuide
from pyro_blora.methods import Method
from pyro_blora.network.pretrained import load_network, name_of
from pyro_blora.network.targets import (
    CLASS,
    is_classifier,
    is_quantized,
    kind_of_head,
    layer_shape,
)
from pyro_blora.posterior.guide import start_guide
from pyro_blora.posterior.posterior import Posterior
from pyro_blora.posterior.store import constraint_of, read_store

WEIGHTS = "bayesian_lora.safetensors"
CONFIG = "bayesian_lora_config.json"
_HEADER = "bayesian_lora"
_OF_BASE = "base."  # prefix of the tensors that identify the base


def save_pretrained(
    blora: nn.Module,
    posterior: Posterior,
    folder: str | os.PathLike[str],
    *,
    result: Training | None = None,
    notes: Mapping[str, object] | None = None,
    place: str = "path/to/this/folder",
) -> None:
    """Writes an adapter: its tensors, its configuration, and a model card.

    Of the base it writes only the name on the hub and a few numbers that identify the weights. A
    kill at any moment leaves either the old adapter or the new one. A ``README.md`` of your own is
    kept.

    Args:
        blora: the adapter, all of whose tensors are written.
        posterior: its posterior.
        folder: the folder to write to, which is created if needed.
        result: the result of ``fit``, whose figures override notes of the same names.
        notes: further rows of the card and the JSON, such as ``{"accuracy": 0.93}``.
        place: the folder or hub id that the card's example loads.
    """
    folder, model, method = Path(folder), posterior.model, posterior.method
    start_guide(posterior.guide)
    figures = {} if result is None else figures_of(result)
    notes = {**figures, **(notes or {}), **figures}  # the figures come first and override notes
    heads = list(model.trained_heads.names)
    config = {
        "pyro_blora": __version__,
        **_base_of(model.net),
        "layers": {n: [g.d_out, g.d_in] for g in model.groups for n in g.module_names},
        "modules_to_save": heads,
        "method": {n: v for n, v in vars(method).items() if n not in ("prior", "guide")},
        "prior": _describe(method.prior),
        "guide": _describe_guide(method.guide, posterior.guide),
        "likelihood": _describe(model.likelihood),
        "notes": {name: str(value) for name, value in notes.items()},
    }
    read_store(model)
    prints = {f"{_OF_BASE}{n}": t for n, t in fingerprint(model.net, heads).items()}
    tensors = blora.state_dict() | prints
    write_tensors(folder / WEIGHTS, tensors, {_HEADER: json.dumps(config)})
    write_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    card = folder / CARD
    written_before = card.is_file() and MARK in card.read_text("utf-8", errors="replace")
    if written_before or not os.path.lexists(card):
        page = model_card(config, posterior, place)
        write_file(card, f"{page}\n{MARK}\n")


@dataclass(frozen=True)
class Saved:
    """A saved adapter: its base, the arguments of ``BayesianLoRA`` to rebuild it, its tensors."""

    net: nn.Module
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path
    skipped: tuple[str, ...] = ()  # name parts of tensors that are not loaded

    def load_into(self, posterior: Posterior) -> None:
        """Loads the tensors into an adapter that has the same names and shapes."""
        start_guide(posterior.guide)
        parts = nn.ModuleDict({"model": posterior.model, "guide": posterior.guide})
        # AutoGaussian has a column for each example if a batch started it
        for name, columns in posterior.guide.named_parameters("guide"):
            if name.endswith(".labels_unconstrained") and name in self.tensors:
                columns.data = columns.new_empty(self.tensors[name].shape)
        current, tensors = parts.state_dict(), dict(self.tensors)
        for part in self.skipped:
            tensors = {n: t for n, t in tensors.items() if part not in n}
            tensors |= {n: t for n, t in current.items() if part in n}
        # AutoLaplaceApproximation's normal has constrained values under their bare names, and a
        # Cholesky factor whose diagonal is not one, although its constraint requires that
        if "guide.scale_tril" in tensors and "guide.scale_tril_unconstrained" in current:
            diagonal = tensors["guide.scale_tril"].diagonal()
            tensors["guide.scale_tril"] = tensors["guide.scale_tril"] / diagonal.unsqueeze(-1)
            tensors["guide.scale"] = tensors["guide.scale"] * diagonal
        for name in [n for n in tensors if f"{n}_unconstrained" in current]:
            parent, _, last = name.rpartition(".")
            constraint = constraint_of(parts.get_submodule(parent), last)
            tensors[f"{name}_unconstrained"] = transform_to(constraint).inv(tensors.pop(name))
        expected, saved = ({n: t.shape for n, t in each.items()} for each in (current, tensors))
        if differ := [n for n in expected | saved if expected.get(n) != saved.get(n)]:
            raise CheckpointError(
                f"{self.folder} has tensors that do not fit, among them {', '.join(differ[:4])}. "
                "Pass the prior, the guide and the likelihood that were saved, or leave them out."
            )
        parts.load_state_dict(tensors)


def read_pretrained(
    net: Any,
    folder: Any,
    prior: Any = None,
    guide: Any = None,
    likelihood: Any = None,
    trust_remote_code: bool = False,
) -> Saved:
    """Reads what :func:`save_pretrained` wrote, and compares the base with the saved one.

    A base with other weights of the same shapes gives a warning.

    Args:
        net: the base network. ``None`` loads it by its saved name.
        folder: the adapter's folder, or its id on the hub.
        prior: for a prior of your own, its class, or an object of it, which is rebuilt with the
            saved options. If priors were saved by group, a mapping with some of the groups. An
            object of another class is used as it is. Default: rebuilt from the file.
        guide: likewise for the guide, or the function that makes it.
        likelihood: likewise for the likelihood, but an object keeps its options. Of its class,
            it takes the saved ones where its own are ``None`` or empty.
        trust_remote_code: whether a class from outside this library may be imported by its name.
    """
    folder = fetched(folder, WEIGHTS, "adapter_config.json")  # the latter for an error's hint
    given = {"prior": prior, "guide": guide, "likelihood": likelihood}
    config, tensors = _read(folder)
    with readable(folder / WEIGHTS):
        base, kind = config["base_model"], config["base"]
        dtype, classes = getattr(torch, kind.get("dtype", "float32")), kind.get("num_labels")
        if net is None and not base:
            raise CheckpointError(
                f"{folder}: its {kind['class']} has no name on the hub; pass it as net."
            )
        if net is None:
            head = kind.get("head", CLASS)
            net = load_network(base, num_labels=classes, head=head, dtype=dtype)
        logits = getattr(getattr(net, "config", None), "num_labels", None)
        if is_classifier(net) and classes not in (None, logits):
            raise CheckpointError(
                f"The base of {folder} must have num_labels={classes}, got {logits}."
            )
        base = base or "another network"
        source = f"{folder} is an adapter for {base!r}"
        layers, heads = config["layers"], config["modules_to_save"]
        check_layers(net, {**dict.fromkeys(heads), **layers}, source)
        prints = {n.removeprefix(_OF_BASE): t for n, t in tensors.items() if n.startswith(_OF_BASE)}
        if differ := altered(net, prints):
            warnings.warn(
                f"{folder}: {len(differ)} of the {len(prints)} weights that were compared are not "
                f"those the adapter was trained on, such as {differ[0]}; load {base}, unaltered.",
                stacklevel=4,
            )
        parts = {n: _rebuild(n, config[n], part, trust_remote_code) for n, part in given.items()}
        likelihood, skipped = parts.pop("likelihood"), tuple[str, ...]()
        if type(likelihood).__name__ != config["likelihood"]["name"]:  # the user's own
            skipped = (".likelihood.", "model.temperature", "model.mean_temperature")
        options = {
            "method": Method(**config["method"], **parts),
            "likelihood": likelihood,
            "modules_to_save": heads,
            "target_modules": "|".join(map(re.escape, layers)),
        }
        tensors = {n: t for n, t in tensors.items() if not n.startswith(_OF_BASE)}
        return Saved(net, options, tensors, folder, skipped)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all."""
    dense = {"memory_format": torch.contiguous_format}  # safetensors refuses shared memory
    flat = {name: tensor.detach().cpu().clone(**dense) for name, tensor in tensors.items()}
    write_file(path, lambda place: save_file(flat, place, metadata={"format": "pt", **header}))


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads the header and the tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}.") from error


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads an adapter's configuration: its parts, the name of its base, and the notes."""
    return _read(Path(folder))[0]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / WEIGHTS
    if not path.exists():
        what = f"{path} does not exist; give"
        if (folder / "adapter_config.json").exists():
            what = f"{folder} is a PEFT adapter; start from it with BayesianLoRA.from_peft, or give"
        raise CheckpointError(f"{what} a folder that save_pretrained wrote.")
    header, tensors = read_tensors(path)
    with readable(path):
        return dict(json.loads(header[_HEADER])), tensors


def fetched(source: str | os.PathLike[str], *files: str) -> Path:
    """The folder itself, or for a hub id a download of these files."""
    path = Path(source)
    is_id = isinstance(source, str) and source.count("/") == 1 and not path.is_absolute()
    if path.exists() or not is_id:
        return path
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(files)))
    except Exception as error:  # which HTTP library raises it depends on huggingface_hub's version
        raise CheckpointError(
            f"{source} is no folder here, and cannot be fetched from the hub: {first_line(error)}."
        ) from error


def push_to_hub(
    blora: nn.Module,
    posterior: Posterior,
    repo_id: str,
    *,
    private: bool | None = None,
    **about: Any,
) -> str:
    """Uploads an adapter, ``about`` as in :func:`save_pretrained`; returns the commit's URL."""
    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(blora, posterior, folder, place=repo_id, **about)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder).commit_url)


def _base_of(net: Any) -> dict[str, Any]:
    kind: dict[str, Any] = {"class": type(net).__name__}
    if isinstance(dtype := getattr(net, "dtype", None), torch.dtype):
        kind["dtype"] = str(dtype).removeprefix("torch.")
    if kind["class"].endswith(("ForSequenceClassification", "ForTokenClassification")):
        kind |= {"num_labels": net.config.num_labels, "head": kind_of_head(net)}
    return {"base_model": name_of(net), "base": kind}


def check_layers(net: nn.Module, wanted: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError unless ``net`` has the wanted layers, by name, of their shapes."""
    modules = dict(net.named_modules())
    for name, shape in wanted.items():
        size = layer_shape(modules.get(name))
        if name not in modules or (shape is not None and list(size or ()) != list(shape)):
            what = "has no such layer" if size is None else f"has it as {size[0]} x {size[1]}"
            raise CheckpointError(
                f"{source} with {name} of {shape or 'any size'}, but {type(net).__name__} {what}."
            )


def fingerprint(net: nn.Module, heads: Sequence[str] = ()) -> dict[str, Tensor]:
    """Four elements of each tensor of the base, without ``heads``."""
    within = tuple(f"{head}." for head in heads)
    return {name: _numbers(t) for name, t in _plain_tensors(net) if not name.startswith(within)}


def altered(net: nn.Module, prints: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that differ from their fingerprint by more than their dtypes' rounding."""
    tensors, names = dict(_plain_tensors(net)), []
    for name in prints.keys() & tensors.keys():
        before, now = prints[name], _numbers(tensors[name])
        rounding = 0.0
        if before.dtype != now.dtype:
            rounding = 2 * max(torch.finfo(t.dtype).eps for t in (before, now))
        if before.shape != now.shape or not torch.allclose(
            now.double(), before.double(), rtol=rounding, atol=1e-6 * rounding, equal_nan=True
        ):
            names.append(name)
    return sorted(names)


def _plain_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors that can be compared: not quantized, sharded or offloaded."""
    for path, module in net.named_modules():
        if is_quantized(module):
            continue
        for name, tensor in module.named_parameters(prefix=path, recurse=False):
            here = tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta
            if here and tensor.numel() and not hasattr(tensor, "full_tensor"):  # as a DTensor has
                yield name, tensor


def _numbers(tensor: Tensor) -> Tensor:
    count = min(4, tensor.numel())
    at = [(2 * k + 1) * tensor.numel() // (2 * count) for k in range(count)]
    return tensor.detach().reshape(-1)[at].cpu()


# Public classes of these modules need no trust_remote_code
_HOMES: dict[str, tuple[ModuleType, ...]] = {
    "prior": (models,),
    "guide": (guides, autoguide),
    "likelihood": (likelihoods,),
}


def _describe(part: Any) -> dict[str, Any]:
    """Name, module and options of a part, or of each part of a mapping by group."""
    if isinstance(part, Mapping):
        return {"by_group": {key: _describe(each) for key, each in part.items()}}
    return _described(type(part), part.options())


def _describe_guide(family: Any, guide: nn.Module) -> dict[str, Any]:
    """Describes the guide family or function; a guide that was replaced, by its own class."""
    if isinstance(family, SiteGuide | Mapping):
        ours = type(guide).__module__.startswith("pyro_blora.")
        return _describe(family) if ours else _described(type(guide), {})
    options: Any = {}
    if isinstance(family, functools.partial):
        family, options = family.func, None if family.args else family.keywords
    if isinstance(family, type) and not isinstance(guide, family):
        family, options = type(guide), {}
    return _described(family, options)


def _described(factory: Any, options: Any) -> dict[str, Any]:
    """Leaves out the module of a public class, and options that JSON cannot represent."""
    name = getattr(factory, "__qualname__", type(factory).__qualname__)
    described: dict[str, Any] = {"name": name}
    is_public = any(public(noun, name) is factory for noun in _HOMES)
    if not is_public and "<" not in name:  # a local class or a lambda has no import path
        described["module"] = getattr(factory, "__module__", type(factory).__module__)
    try:
        plain = json.dumps(options, default=methodcaller("item"))  # of a number of NumPy's
        return {**described, "options": json.loads(plain)}
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return {**described, "options": None}


def public(noun: str, name: str) -> Any:
    """The public class of this name, of this library or of Pyro, or ``None``."""
    return next((getattr(home, name) for home in _HOMES[noun] if name in home.__all__), None)


def _rebuild(noun: str, described: Mapping[str, Any], given: Any, trusted: bool) -> Any:
    """Rebuilds a part, or a mapping by group, from its description and the user's ``given``."""
    if isinstance(given, Mapping) or "by_group" in described:
        groups, given = described.get("by_group", {}), given or {}
        if not isinstance(given, Mapping) or not given.keys() <= groups.keys():
            what = f"those of {[*groups]}" if groups else "one for all groups"
            raise CheckpointError(f"{noun}={given!r}, but the adapter was saved with {what}.")
        return {k: _rebuild(noun, each, given.get(k), trusted) for k, each in groups.items()}
    name, options = described["name"], described["options"]
    if given is None:
        given = _imported(noun, name, described.get("module"), trusted)
    elif not isinstance(given, type):
        same = type(given).__name__ == name.rpartition(".")[2]
        if noun == "likelihood" and same:
            return restored(given, options or {})
        if noun == "likelihood" or not same or options is None:
            return given
        given = type(given)  # because the tensors were trained with the saved options
    if options is None:
        raise CheckpointError(
            f"The options of {name} could not be saved; pass {noun}= with an object like the one "
            "that was saved."
        )
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    if noun == "guide" and not (isinstance(given, type) and issubclass(given, SiteGuide)):
        return functools.partial(given, **options) if options else given
    return given(**options)


def restored(likelihood: Any, saved: Mapping[str, Any]) -> Any:
    """The likelihood, or a copy with the saved values of options that are ``None`` or empty."""
    options = likelihood.options()
    saved = {n: tuple(v) if isinstance(v, list) else v for n, v in saved.items() if n in options}
    for name in ("classes", *likelihood.unit_options):
        value = saved.get(name)
        # a head without names of its classes takes any
        if value not in (None, ()) and options[name] not in (None, (), value):
            order = ", in this order" if isinstance(value, tuple) else ""
            shown = [*value] if order else value
            raise CheckpointError(
                f"The adapter was saved with the {name} {shown}{order}; leave {name}= out."
            )
    is_open = {n: v is None or (isinstance(v, tuple | list) and not v) for n, v in options.items()}
    is_open["data_names"] = True  # the numbers of a head without names keep their meaning
    kept = {n: v for n, v in saved.items() if is_open[n] and v not in (None, options[n])}
    return type(likelihood)(**options | kept) if kept else likelihood


def _imported(noun: str, name: str, module: str | None, trusted: bool) -> Any:
    """A public class of this library or Pyro by its name, or another one if trusted."""
    if module is None and (known := public(noun, name)) is not None:
        return known
    if not (trusted and module):
        raise CheckpointError(
            f"The {noun} {name!r} is of {module or 'another library'}; pass {noun}= with its class "
            "or an object, or trust_remote_code=True to import it."
        )
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
