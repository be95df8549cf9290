"""Starting from a LoRA that PEFT trained, and exporting a posterior as LoRAs for PEFT."""

import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora._version import __version__
from pyro_blora.checkpoints.checkpoint import (
    check_layers,
    fetched,
    public,
    read_tensors,
    restored,
    write_tensors,
)
from pyro_blora.checkpoints.files import write_file
from pyro_blora.errors import CheckpointError, ConfigurationError, check_count, readable
from pyro_blora.likelihoods import MultiLabel, SequenceClassification, usual_likelihood
from pyro_blora.models import LowRankUpdate
from pyro_blora.network.pretrained import load_network, name_of, name_of_folder
from pyro_blora.network.targets import (
    CLASS,
    LABELS,
    TAGS,
    check_bare,
    head_names,
    head_of,
    is_classifier,
    logit_names,
)
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.posterior import Posterior

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NUMBERS, _GENERATION = "one_pass.json", "generation_config.json"
_MARK = "pyro_blora"  # in the header of an export's tensors
_PREFIX = "base_model.model."  # before the names of the base in PEFT's files
# Options with which a LoRA is still ``W0 + s B A``; the others must be off, or as in _VALUES
_PLAIN = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "r"),
    *("inference_mode", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
    *("fan_in_fan_out", "use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "eva_config", "corda_config", "loftq_config"),
    *("lora_ga_config", "velora_config", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "runtime_config", _NUMBERS),
)
_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),  # others change the base
}


@dataclass(frozen=True)
class PeftAdapter:
    """A plain LoRA that PEFT trained; all names are full names in the base."""

    factors: Mapping[str, tuple[Tensor, Tensor]]  # (B, A), dW = B A; B includes PEFT's scaling
    others: Mapping[str, Tensor]  # the tensors of modules_to_save
    modules_to_save: Sequence[str]
    base: str | None  # its name for loading
    task: str | None
    where: str
    numbers: Mapping[str, Any]  # of ``one_pass.json`` if this library wrote the adapter

    def load_base(self) -> nn.Module:
        """Loads the base network by the name in the adapter's configuration."""
        classes = None
        if self.task in ("SEQ_CLS", "TOKEN_CLS"):  # the head's last layer has a row for each class
            classes = min((len(t) for t in self.others.values() if t.dim() == 2), default=None)
        if not self.base or (self.task != "CAUSAL_LM" and classes is None):
            raise ConfigurationError(
                f"{self.where} must name its base, and the task CAUSAL_LM, or SEQ_CLS or TOKEN_CLS "
                f"with a head, got {self.base!r} and {self.task!r}; load the network and give it "
                "to from_peft."
            )
        several = self.numbers.get("likelihood") == MultiLabel.__name__
        head = TAGS if self.task == "TOKEN_CLS" else LABELS if several else CLASS
        return load_network(self.base, num_labels=classes, head=head)

    def heads(self, net: nn.Module) -> list[str]:
        """Names of the trained heads; raises CheckpointError if ``net`` is another base."""
        shapes = {name: [len(B), A.shape[1]] for name, (B, A) in self.factors.items()}
        check_layers(
            net, shapes, f"{self.where} is an adapter for {self.base or 'another network'!r}"
        )
        modules = _saved_whole(net, self.modules_to_save)
        heads = [n for n in modules if any(name.startswith(f"{n}.") for name in self.others)]
        state, within = net.state_dict(), tuple(f"{head}." for head in heads)
        for name, tensor in self.others.items():
            there = state.get(name.replace(".base_layer.", "."), torch.empty(0))
            fits = there.shape == tensor.shape
            if not name.startswith(within):
                # PEFT also saves embeddings if a target is one of them; they must be the base's
                fits = fits and (there.is_meta or torch.equal(there.cpu().to(tensor), tensor.cpu()))
            if not fits:
                raise CheckpointError(
                    f"{self.where} has {name} of {tuple(tensor.shape)}, but {type(net).__name__} "
                    f"of {tuple(there.shape)} or with other values (a resized vocabulary or other "
                    "classes); pass the base that it was trained on."
                )
        return heads

    @torch.no_grad()
    def load_into(self, posterior: Posterior) -> None:
        """Loads the trained heads, and checks that the posterior mean is the adapter."""
        model = posterior.model
        for name, tensor in model.trained_heads.tensors().items():
            tensor.copy_(self.others[name])
        means = posterior.mean()
        for group in model.groups:
            layers = means[group.name].layers()
            for name, layer in zip(group.module_names, layers, strict=True):
                B, A = (f.to(layer.A) for f in self.factors[name])
                x = torch.randn(4, A.shape[1], generator=torch.Generator().manual_seed(0)).to(A)
                expected = x @ A.mT @ B.mT
                error = layer(x, torch.zeros_like(expected)) - expected
                if error.norm() > 1e-4 * expected.norm() + 1e-6:
                    raise ConfigurationError(
                        f"The posterior mean is not the adapter in {name}; take a guide whose mean "
                        "is a parameter, such as MatrixNormal, MeanField or Laplace."
                    )


def read_peft(source: str | os.PathLike[str] | nn.Module) -> PeftAdapter:
    """Reads a plain LoRA from a ``peft.PeftModel``, a folder that PEFT wrote, or a hub id.

    The factors include PEFT's scaling, ``alpha / r`` or ``alpha / sqrt(r)`` for rslora, with
    ``rank_pattern`` and ``alpha_pattern``. From a ``PeftModel`` it is the current scaling.

    Example::

        read_peft("my_lora").factors["model.layers.0.self_attn.q_proj"]  # B: d_out x r, A: r x d_in
    """
    read = _of_model if isinstance(source, nn.Module) else _of_folder
    config, tensors, scales, where = read(source)
    _check_plain(config, where)
    with readable(where):
        pairs: dict[str, dict[str, Tensor]] = {}
        others = {}
        for key, tensor in tensors.items():
            match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
            if match and tensor.dim() == 2:
                pairs.setdefault(match[1], {})[match[2]] = tensor.detach()
            elif "lora_" in key or not key.startswith(_PREFIX):
                raise ConfigurationError(
                    f"{where} is no plain LoRA of linear layers: {key} is {tuple(tensor.shape)}."
                )
            else:
                others[key.removeprefix(_PREFIX)] = tensor.detach()
        factors = {}
        for name, pair in pairs.items():
            scale = scales.get(name, _scaling(config, name, len(pair["A"])))
            factors[name] = pair["B"].float() * scale, pair["A"]
        if not factors:
            raise CheckpointError(f"{where} has no lora_A and lora_B; is it a PEFT adapter?")
        return PeftAdapter(
            factors=factors,
            others=others,
            modules_to_save=config.get("modules_to_save") or (),
            base=name_of_folder(config.get("base_model_name_or_path") or "") or None,
            task=config.get("task_type"),
            where=where,
            numbers=config.get(_NUMBERS) or {},
        )


# Configuration, tensors, current scalings of a model in memory, and the name for messages
_Source = tuple[dict[str, Any], dict[str, Tensor], dict[str, float], str]


def _of_folder(source: Any) -> _Source:
    folder = fetched(source, PEFT_CONFIG, PEFT_WEIGHTS, _NUMBERS)
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}; save the adapter by PEFT, as safetensors, not a pickle."
            )
    with readable(folder / PEFT_CONFIG):
        config = dict(json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8")))
        # that of an earlier export stays if PEFT saves another adapter here
        if (numbers := folder / _NUMBERS).is_file() and _is_export(folder):
            config[_NUMBERS] = json.loads(numbers.read_text(encoding="utf-8"))
    return config, read_tensors(folder / PEFT_WEIGHTS)[1], {}, str(folder)


def _of_model(model: Any) -> _Source:
    name = type(model).__name__
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        raise ConfigurationError(
            f"{name} is no peft.PeftModel; pass the adapter's folder, too: from_peft(net, folder)."
        )
    from peft import get_peft_model_state_dict

    active, merged = list(model.active_adapters), model.get_model_status().merged_adapters
    if len(active) != 1 or merged:
        raise ConfigurationError(
            f"{name} must have one active adapter and none merged, got {active} and {merged}; call "
            "model.set_adapter(name) or model.unmerge_adapter() first."
        )
    config = model.peft_config[active[0]].to_dict()
    tensors = get_peft_model_state_dict(model, adapter_name=active[0], save_embedding_layers=False)
    layers = model.get_base_model().named_modules()
    scales = {n: m.scaling[active[0]] for n, m in layers if active[0] in getattr(m, "lora_A", ())}
    return config, tensors, scales, name


def _check_plain(config: Mapping[str, Any], where: str) -> None:
    others = [
        f"{name}={value!r}" + ", which changes the base" * (name == "init_lora_weights")
        for name, value in config.items()
        if value and name not in _PLAIN and value not in _VALUES.get(name, ())
    ]
    if others:
        raise ConfigurationError(
            f"{where} must be a plain LoRA, dW = s B A, got {', '.join(others)}; train it without "
            "these options, or merge it into the base and adapt that."
        )


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    alphas = config.get("alpha_pattern") or {}
    chosen = (a for key, a in alphas.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(chosen, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def from_peft(
    make: Callable[..., Any],
    net: nn.Module | str | os.PathLike[str] | None,
    folder: str | os.PathLike[str] | None,
    prior: Any,
    guide: Any,
    likelihood: Any,
) -> Any:
    """The adapter that ``make`` builds, with its posterior mean at a trained LoRA."""
    adapter = read_peft(net if folder is None else folder)  # type: ignore[arg-type]
    base = net if isinstance(net, nn.Module) else adapter.load_base()
    is_whole = folder is None and base is net  # with the adapter
    with _unloaded(base) if is_whole else nullcontext(base) as network:
        check_bare(network)
        likelihood = _as_exported(network, adapter, likelihood)
        blora = make(
            network,
            target_modules="|".join(map(re.escape, adapter.factors)),
            modules_to_save=adapter.heads(network),
            start=adapter.factors,
            rank=max(len(A) for _, A in adapter.factors.values()) if prior is None else None,
            prior=prior,
            guide=guide,
            likelihood=likelihood,
        )
        try:
            if adapter.numbers.get("likelihood") == type(blora.likelihood).__name__:
                for temperature in (blora.model.temperature, blora.model.mean_temperature):
                    temperature.fill_(float(adapter.numbers["temperature"]))  # no head applies it
            adapter.load_into(blora.posterior)
        except ConfigurationError:
            blora.unwrap()
            raise
    return blora


def _as_exported(net: nn.Module, adapter: PeftAdapter, likelihood: Any) -> Any:
    """The likelihood with what an export says of it; without names, classes are numbers."""
    saved = dict(adapter.numbers)
    if likelihood is None and (kind := public("likelihood", saved.get("likelihood", ""))):
        options = {n: v for n, v in saved.items() if n in inspect.signature(kind).parameters}
        likelihood = kind(**options)
    elif likelihood is None and is_classifier(net):
        likelihood = usual_likelihood(net)
    if isinstance(likelihood, SequenceClassification):
        saved["classes"] = saved.get("classes") or likelihood.classes or logit_names(net)
    if likelihood is None or not saved:
        return likelihood
    again = restored(likelihood, saved).bind(torch.device("cpu"))  # a copy; the user's stays
    for name in [n for n in saved if f"{n}_unconstrained" in dict(again.named_parameters())]:
        value, start = torch.tensor(saved[name]), getattr(again, name)
        if value.shape != start.shape:
            raise CheckpointError(
                f"{adapter.where} has {name} of {tuple(value.shape)}, but {likelihood!r} of "
                f"{tuple(start.shape)}; pass the likelihood that was exported."
            )
        setattr(again, name, value)
    return again


@contextmanager
def put_back(model: Any) -> Iterator[None]:
    """Puts the adapter of a ``PeftModel`` back where it was if the block raises an error."""
    wrapped: Any = model.get_base_model() if hasattr(model, "get_base_model") else nn.Module()
    config = getattr(wrapped, "peft_config", None)
    layers = {
        name: module
        for name, module in wrapped.named_modules()
        if hasattr(module, "base_layer") or hasattr(module, "original_module")
    }
    try:
        yield
    except BaseException:
        for name, module in layers.items():
            wrapped.set_submodule(name, module)
        if config is not None:
            wrapped.peft_config = config
        raise


@contextmanager
def _unloaded(model: Any) -> Iterator[nn.Module]:
    """The base of a ``PeftModel``, with untrained heads; an exception restores the model."""
    with put_back(model):
        modules = dict(model.get_base_model().named_modules())
        net: Any = model.unload()
        for name, module in modules.items():
            if hasattr(module, "original_module"):  # unload() leaves the trained head
                net.set_submodule(name, module.original_module)
        yield net


def export_peft(posterior: Posterior, folder: str | os.PathLike[str], num_samples: int = 0) -> None:
    """Writes the posterior mean as one LoRA, or each of several draws, with the trained heads.

    The heads become PEFT's ``modules_to_save``. The temperature of the mean, or of the draws, is
    folded into a trained head. Without a head it is in ``one_pass.json``, and for text in
    ``generation_config.json``, too. ``one_pass.json`` also names the classes of a classifier, and
    has learned numbers such as the noise, in the unit of the exported scores.

    Args:
        posterior: the adapter's posterior.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        num_samples: 0 for the mean, or the number ``K`` of draws as in ``predict``, which go to
            ``folder/0`` to ``folder/K-1``. The mean of their probabilities is the posterior
            predictive.
    """
    check_count("num_samples", num_samples, 0)
    model, folder = posterior.model, Path(folder)
    places = [folder / str(k) for k in range(num_samples)] or [folder]
    if not num_samples:
        updates, temperature = posterior.draws(0), float(model.mean_temperature)
    else:
        posterior.method.check_draws()
        temperature = float(model.temperature)
        updates = posterior.pairs()(num_samples)
        if any(update.noise is not None for update in updates.values()):
            raise ConfigurationError(
                "A draw is not a LoRA if it has noise; export the mean, or use "
                "conditional='deterministic'."
            )
    _check_layers(model)
    loras = [_lora(model, updates, temperature, k) for k in range(len(places))]
    texts = _numbers_of(model, temperature)
    _check_exports(folder, places, (PEFT_WEIGHTS, PEFT_CONFIG, *texts), num_samples)
    for place, (config, tensors) in zip(places, loras, strict=True):
        write_tensors(place / PEFT_WEIGHTS, tensors, {_MARK: __version__})
        config_text = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted)
        for name, text in {**texts, PEFT_CONFIG: config_text}.items():
            write_file(place / name, text)


def _check_exports(
    folder: Path, places: Sequence[Path], names: Sequence[str], num_samples: int
) -> None:
    """Refuses to replace others' files, and to leave exports that would be read beside these."""
    for place in places:
        there = [name for name in names if os.path.lexists(place / name)]
        if there and not _is_export(place):
            raise ConfigurationError(
                f"{place / there[0]} was not written by export_peft; name another folder."
            )
    draws = (path for path in folder.glob("*") if path.name.isdecimal())
    left = [path for path in draws if int(path.name) >= num_samples]
    left += [folder] if num_samples else []
    left = [path for path in left if (path / PEFT_CONFIG).exists() and _is_export(path)]
    if left:
        raise ConfigurationError(
            f"{folder} must have no earlier export that would be read beside this one, got "
            f"{', '.join(map(str, left))}; remove it, or name another folder."
        )


def _is_export(folder: Path) -> bool:
    """Whether a folder has a LoRA that :func:`export_peft` wrote."""
    file = folder / PEFT_WEIGHTS
    return file.is_file() and _MARK in read_tensors(file)[0]


def _numbers_of(model: BayesianLoRAModel, temperature: float) -> dict[str, str]:
    """JSON files for exports whose logits need post-processing to become probabilities."""
    likelihood, folded = model.likelihood, _last_linear(model) is not None
    if folded and likelihood.unit(2.0) != likelihood.unit(1.0):
        temperature = 1.0  # which the exported head applies
    # for which PEFT's files have no place, such as the classes, the token_ids or the noise
    numbers = {"temperature": temperature, **likelihood.numbers(folded=folded)}
    numbers["likelihood"] = type(likelihood).__name__
    texts = {_NUMBERS: json.dumps(numbers, indent=2, default=str) + "\n"}
    if not likelihood.predicts:
        from transformers import GenerationConfig  # not at the top: it sets warning filters

        config = GenerationConfig(do_sample=True, temperature=temperature, top_k=0)
        texts[_GENERATION] = config.to_json_string()
    return texts


def _last_linear(model: BayesianLoRAModel) -> str | None:
    """The layer of a classifier's trained head that computes the logits, or ``None``."""
    last, shift = None, model.likelihood.unit(1.0)[1]
    if model.likelihood.new_head:
        classes = getattr(getattr(model.net, "config", None), "num_labels", None)
        for head in model.trained_heads.names:
            for name, module in model.net.get_submodule(head).named_modules(prefix=head):
                ends = isinstance(module, nn.Linear) and module.out_features == classes
                if ends and (module.bias is not None or not shift):
                    last = name
    return last


def merge_and_unload(posterior: Posterior, unwrap: Callable[[], nn.Module]) -> Any:
    """The network with E[dW] and the trained heads merged into its weights by PEFT."""
    model, temperature = posterior.model, float(posterior.model.mean_temperature)
    model.check_attached()
    _check_layers(model)
    config, tensors = _lora(model, posterior.draws(0), temperature, 0)
    from peft import get_peft_model, set_peft_model_state_dict

    scale, shift = model.likelihood.unit(temperature)
    if (scale, shift) != (1, 0) and _last_linear(model) is None:
        needed = "trained head with a bias" if shift else "trained head"  # a reload drops a new one
        warnings.warn(
            f"The merged network has no {needed} for the unit or the temperature of its scores; "
            f"multiply them by {scale:.7g}" + (f" and add {shift:.7g}." if shift else "."),
            stacklevel=4,
        )
    net: Any = unwrap()
    head: Any = head_of(net)
    targets = [net.get_submodule(name) for name in config.target_modules]
    if head in targets and head.weight is net.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())  # the embeddings stay the same
        net.config.tie_word_embeddings = False
    lora = get_peft_model(net, config)
    set_peft_model_state_dict(lora, tensors)
    merged: Any = lora.merge_and_unload()
    if (classes := getattr(model.likelihood, "classes", None)) and hasattr(merged, "config"):
        merged.config.id2label = dict(enumerate(classes))
        merged.config.label2id = {name: k for k, name in enumerate(classes)}
    return merged


def _lora(
    model: BayesianLoRAModel, updates: Mapping[str, LowRankUpdate], temperature: float, draw: int
) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's configuration and tensors; a head's last layer is divided by the temperature."""
    from peft import LoraConfig

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for group in model.groups:
        layers = updates[group.name].layers()
        for layer, name in zip(layers, group.module_names, strict=True):
            factors: tuple[Any, ...] = (layer.A, layer.B, layer.core)
            A, B, core = (f if f is None or f.dim() == 2 else f[draw] for f in factors)
            tensors[f"{name}.lora_A.weight"] = A
            tensors[f"{name}.lora_B.weight"] = B if core is None else B @ core
            ranks[name] = len(A)
    rank, heads = max(ranks.values()), model.trained_heads
    patterns = {re.escape(name): r for name, r in ranks.items() if r < rank}
    last, (scale, shift) = f"{_last_linear(model)}.", model.likelihood.unit(temperature)
    for name, tensor in heads.tensors().items():
        if name.startswith(last):
            tensor = scale * tensor + (shift if name == f"{last}bias" else 0)
        tensors[name] = tensor
    for name in _saved_whole(model.net, heads.names):
        if clash := [layer for layer in ranks if f"{layer}.".startswith(f"{name}.")]:
            raise ConfigurationError(
                f"PEFT cannot adapt {clash[0]}, because it saves {name} whole; adapt other layers."
            )
        for key, tensor in model.net.get_submodule(name).state_dict().items():
            tensors.setdefault(f"{name}.{key}", tensor)
    base = name_of(model.net) or getattr(model.net, "name_or_path", None)  # or the folder
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=list(ranks),
        modules_to_save=list(heads.names) or None,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for g in model.groups for m in g.modules),
        base_model_name_or_path=base or None,
        task_type=_task_type(model),
        inference_mode=True,
    )
    return config, {f"{_PREFIX}{name}": tensor.detach() for name, tensor in tensors.items()}


def _check_layers(model: BayesianLoRAModel) -> None:
    """Raises ConfigurationError if PEFT has no LoRA for a class of layers, or for their names."""
    from peft import LoraConfig, inject_adapter_in_model

    kinds = {
        (type(module).__name__, name.rpartition(".")[-1]): module
        for group in model.groups
        for name, module in zip(group.module_names, group.modules, strict=True)
    }
    for (kind, name), module in kinds.items():
        config = LoraConfig(r=1, target_modules=[name], fan_in_fan_out=kind == "Conv1D")
        alone: Any = nn.ModuleDict({name: module})
        alone.config = getattr(model.net, "config", {})  # some names PEFT refuses by the network
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT repeats them when the LoRA is loaded
                inject_adapter_in_model(config, alone)
        except ValueError as error:
            raise ConfigurationError(
                f"PEFT has no LoRA for the {kind} {name}, so the adapter can be neither exported "
                "nor merged; leave these layers out with exclude_modules, or use save_pretrained."
            ) from error


def _saved_whole(net: nn.Module, names: Sequence[str]) -> list[str]:
    """The modules that PEFT saves for ``modules_to_save``, of which it matches only the ends."""
    return [name for name, _ in net.named_modules() if name and name.endswith(tuple(names))]


def _task_type(model: BayesianLoRAModel) -> str | None:
    if model.likelihood.new_head:
        # PEFT then makes the head one of modules_to_save, and does not adapt its layers
        trained, every = set(model.trained_heads.names), set(head_names(model.net))
        has_config = hasattr(model.net, "config")  # which PEFT's class for such a task reads
        return model.likelihood.task_type if has_config and trained and trained >= every else None
    generates = getattr(model.net, "can_generate", None)
    return "CAUSAL_LM" if generates is not None and generates() else None
