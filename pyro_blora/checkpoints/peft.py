"""PEFT's adapters: read to be the start of a Bayesian one, and written from a posterior."""

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.checkpoints.card import page_of_use
from pyro_blora.checkpoints.checkpoint import (
    fetched,
    names_in,
    read_tensors,
    write_page,
    write_tensors,
)
from pyro_blora.errors import CheckpointError, ConfigurationError, readable
from pyro_blora.files import check_free, claim, own_files, remove_own, write_file
from pyro_blora.likelihoods import (
    LabelTokens,
    MultipleChoice,
    SequenceClassification,
)
from pyro_blora.network.pretrained import load_network, name_of, name_of_folder
from pyro_blora.network.targets import (
    PEFT_PREFIX,
    head_names,
    head_of,
    is_classifier,
    matches,
    name_in_base,
)
from pyro_blora.options import check_count
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.guide import start_guide
from pyro_blora.posterior.predictive import draws_in_pairs, mean_updates, sample_updates
from pyro_blora.updates.low_rank_update import LowRankUpdate

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NUMBERS, _GENERATION = "one_pass.json", "generation_config.json"
# What makes of a LoRA something else than ``W0 + s B A``
_VARIANTS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
# Initializations that take a part of the base's weights into the adapter
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftAdapter:
    """A plain LoRA, as PEFT keeps it; all names are the full ones of the base.

    ``factors`` are ``(B, A)`` by layer, the scaling within ``B``: ``dW = B A``. ``others`` are the
    tensors of ``modules_to_save``; ``base`` is what PEFT would load the base by.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    others: Mapping[str, Tensor]
    modules_to_save: Sequence[str]
    base: str | None
    task: str | None
    where: str

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(A) for _, A in self.factors.values())

    def load_base(self) -> nn.Module:
        """The base network by the name that the adapter has for it."""
        classes = None
        if self.task == "SEQ_CLS":  # of a head's matrices, the last one's rows
            classes = min((len(t) for t in self.others.values() if t.dim() == 2), default=None)
        if not self.base or (self.task != "CAUSAL_LM" and classes is None):
            raise ConfigurationError(
                f"{self.where} must name its base, and the task CAUSAL_LM or SEQ_CLS with a head, "
                f"got {self.base!r} and {self.task!r}; load the network and give it to from_peft."
            )
        return load_network(self.base, num_labels=classes)

    def heads(self, net: nn.Module) -> list[str]:
        """The trained heads, after a check that ``net`` is the base that they are for."""
        if hasattr(net, "peft_config"):
            raise ConfigurationError(
                f"{type(net).__name__} has a PEFT adapter in it; give its base, as "
                "PeftModel.unload() returns it, or the PeftModel alone, from_peft(model)."
            )
        shapes = {name: [len(B), A.shape[1]] for name, (B, A) in self.factors.items()}
        names_in(net, shapes, f"{self.where} is an adapter for {self.base or 'another network'!r}")
        modules = [n for n, _ in net.named_modules() if n and matches(n, self.modules_to_save)]
        heads = [n for n in modules if any(name.startswith(f"{n}.") for name in self.others)]
        own, within = net.state_dict(), tuple(f"{head}." for head in heads)
        for name, tensor in self.others.items():
            there = own.get(name.replace(".base_layer.", "."), torch.empty(0))
            fits = there.shape == tensor.shape
            if not name.startswith(within):
                # PEFT writes embeddings along where a target is one of them; they are the base's
                fits = fits and (there.is_meta or torch.equal(there.cpu().to(tensor), tensor.cpu()))
            if not fits:
                raise CheckpointError(
                    f"{self.where} has {name} of {tuple(tensor.shape)}, and {type(net).__name__} "
                    f"has it as {tuple(there.shape)}, or of other values: a resized vocabulary, or "
                    "other classes. Give the base it was trained on."
                )
        return heads

    @torch.no_grad()
    def load_into(self, model: BayesianLoRAModel, guide: nn.Module) -> None:
        """Puts the trained heads in, and checks that the posterior mean is the adapter."""
        for name, tensor in model.trained_heads.tensors().items():
            tensor.copy_(self.others[name])
        start_guide(guide)
        # an amortized mean, too, is there for any input at the start
        for group, update in mean_updates(model, guide).items():
            names = next(g.module_names for g in model.groups if g.name == group)
            for name, layer in zip(names, update.layers(), strict=True):
                B, A = (f.to(layer.A) for f in self.factors[name])
                probe = torch.randn(A.shape[1], 4, generator=torch.Generator().manual_seed(0)).to(A)
                core = layer.A @ probe if layer.core is None else layer.core @ (layer.A @ probe)
                found, expected = layer.B @ core, B @ (A @ probe)
                if (found - expected).norm() > 1e-4 * expected.norm() + 1e-6:
                    raise ConfigurationError(
                        f"{model.prior!r} with this guide has not its mean at the adapter in "
                        f"{name}; take a guide whose mean is a parameter: MatrixNormal, MeanField, "
                        "FullRank, LowRank, LayerCoupled, Delta, Laplace or Isotropic."
                    )


def read_peft(source: str | os.PathLike[str] | nn.Module) -> PeftAdapter:
    """Reads a plain LoRA of a ``peft.PeftModel``, of a folder that PEFT wrote, or of a hub id.

    Its factors have all scalings in them: ``alpha / r``, ``alpha / sqrt(r)`` of rslora, and those
    of ``rank_pattern`` and ``alpha_pattern``; of a ``PeftModel`` the ones in force.

    Example::

        read_peft("my_lora").factors["model.layers.0.self_attn.q_proj"]  # B: d_out x r, A: r x d_in
    """
    read = _of_model if isinstance(source, nn.Module) else _of_folder
    config, tensors, scales, where = read(source)
    with readable(where):
        pairs: dict[str, dict[str, Tensor]] = {}
        others = {}
        for key, tensor in tensors.items():
            found = re.fullmatch(re.escape(PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
            if found and tensor.dim() == 2:
                pairs.setdefault(found[1], {})[found[2]] = tensor.detach()
            elif "lora_" in key or not key.startswith(PEFT_PREFIX):
                raise ConfigurationError(
                    f"{where} has {key} of {tuple(tensor.shape)}, which a plain LoRA of linear "
                    "layers has not; only such adapters can be a start."
                )
            else:
                others[key.removeprefix(PEFT_PREFIX)] = tensor.detach()
        factors = {}
        for name, pair in pairs.items():
            scale = scales.get(name, _scaling(config, name, len(pair["A"])))
            factors[name] = pair["B"].float() * scale, pair["A"]
        if not factors:
            raise CheckpointError(f"{where} has no lora_A and lora_B; is it a PEFT adapter?")
        task = config.get("task_type")
        return PeftAdapter(
            factors=factors,
            others=others,
            modules_to_save=config.get("modules_to_save") or (),
            base=name_of_folder(config.get("base_model_name_or_path") or "") or None,
            task=None if task is None else str(getattr(task, "value", task)),
            where=where,
        )


# Configuration, tensors, the scalings in force where it is in memory, and its name in a message
_Source = tuple[dict[str, Any], dict[str, Tensor], dict[str, float], str]


def _of_folder(source: Any) -> _Source:
    folder = fetched(source, PEFT_CONFIG, PEFT_WEIGHTS)
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}; give a folder that PEFT wrote, or the hub id of one. A "
                "pickle is not read: load adapter_model.bin by PEFT, and save it again."
            )
    with readable(folder / PEFT_CONFIG):
        config = dict(json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8")))
    _check_plain(config, str(folder))
    return config, read_tensors(folder / PEFT_WEIGHTS)[1], {}, str(folder)


def _of_model(model: Any) -> _Source:
    name = type(model).__name__
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        raise ConfigurationError(
            f"from_peft takes a peft.PeftModel, a folder or a hub id, and {name} is no PeftModel; "
            "give the adapter's folder, too, from_peft(net, folder)."
        )
    from peft import get_peft_model_state_dict

    active, merged = list(model.active_adapters), model.get_model_status().merged_adapters
    if len(active) != 1 or merged:
        raise ConfigurationError(
            f"{name} must have one active adapter and none merged, got {active} and {merged}; call "
            "model.set_adapter(name) or model.unmerge_adapter() first."
        )
    config = model.peft_config[active[0]].to_dict()
    _check_plain(config, name)
    tensors = get_peft_model_state_dict(model, adapter_name=active[0], save_embedding_layers=False)
    layers = model.get_base_model().named_modules()
    scales = {n: m.scaling[active[0]] for n, m in layers if active[0] in getattr(m, "lora_A", ())}
    return config, tensors, scales, name


def _check_plain(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    kind, start = str(getattr(kind, "value", kind)), str(config.get("init_lora_weights"))
    found = [f"{key}={config[key]!r}" for key in _VARIANTS if config.get(key)]
    if kind != "LORA":
        found = [f"peft_type={kind!r}"]
    if (config.get("bias") or "none") != "none":
        found.append(f"bias={config['bias']!r}")
    if start.lower().startswith(_FROM_BASE):
        found.append(f"init_lora_weights={start!r}, which changes the base")
    if found:
        raise ConfigurationError(
            f"{where} is no plain LoRA but has {', '.join(found)}; only dW = s B A can be a "
            "start. Train it without, or merge it into the base and adapt that."
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
    *,
    prior: Any,
    guide: Any,
    likelihood: Any,
    **options: Any,
) -> Any:
    """What ``make`` makes, a ``BayesianLoRA``, with its mean at a trained LoRA."""
    adapter = read_peft(net if folder is None else folder)  # type: ignore[arg-type]
    place: AbstractContextManager[nn.Module]
    if folder is None and isinstance(net, nn.Module):
        place = _unloaded(net)
    else:
        place = nullcontext(net if isinstance(net, nn.Module) else adapter.load_base())
    if likelihood is None and adapter.task == "SEQ_CLS":
        likelihood = SequenceClassification()
    with place as found:
        blora = make(
            found,
            target_modules="|".join(map(re.escape, adapter.factors)),
            modules_to_save=adapter.heads(found),
            start=adapter.factors,
            rank=adapter.rank if prior is None else None,
            prior=prior,
            guide=guide,
            likelihood=likelihood,
            **options,
        )
        try:
            adapter.load_into(blora.model, blora.guide)
        except ConfigurationError:
            blora.unwrap()
            raise
    return blora


@contextmanager
def _unloaded(model: Any) -> Iterator[nn.Module]:
    """A ``PeftModel``'s network, its heads untrained; put back where what is within fails."""
    wrapped: Any = model.get_base_model()
    config, modules = wrapped.peft_config, dict(wrapped.named_modules())
    theirs = ("base_layer", "original_module")
    layers = {n: m for n, m in modules.items() if any(hasattr(m, part) for part in theirs)}
    net: Any = model.unload()
    for name, module in layers.items():
        if hasattr(module, "original_module"):  # PEFT leaves the trained one
            net.set_submodule(name, module.original_module)
    try:
        yield net
    except BaseException:
        for name, module in layers.items():
            net.set_submodule(name, module)
        net.peft_config = config
        raise


def export_peft(blora: Any, folder: str | os.PathLike[str], num_samples: int = 0) -> None:
    """Writes the posterior mean as a LoRA, or draws as one each, and the heads trained as points.

    The heads are PEFT's ``modules_to_save``. Of a ``PeftModel`` that was adapted, its own adapter
    is not written: merge it into the base first. The temperature of :meth:`BayesianLoRA.distill`
    is in the trained head's weights; else in ``one_pass.json``, with a program that applies it in
    ``README.md``; for text in ``generation_config.json``. What an export before has left and this
    one has not is removed; of files of your own, as in ``save_pretrained``, none is touched.

    Args:
        blora: the adapter.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        num_samples: 0 for the mean; ``K`` for as many draws, as ``predict`` takes them, in
            ``folder/0`` to ``folder/K-1``. The mean of the ``K`` probabilities that they give is
            the posterior predictive.
    """
    check_count("num_samples", num_samples, 0)
    model, folder = blora.model, Path(folder)
    temperature = float(model.temperature)
    if num_samples:
        blora.check_draws()
        temperature = 1.0  # that of one pass
        loras = {folder / str(k): u for k, u in enumerate(_draws(blora, num_samples))}
    else:
        loras = {folder: sample_updates(model, blora.guide, 0)}
    told = 1.0 if _last_linear(model) is not None else temperature  # else the head has it
    draws = {place.name for place in loras} if num_samples else set()
    check_free(folder, *draws)
    made = {}
    for place, updates in loras.items():
        config, tensors = _lora(model, updates, temperature)
        texts, page = _use_of(model, told, config.base_model_name_or_path)
        texts[PEFT_CONFIG] = _saved_text(config, PEFT_CONFIG)
        made[place] = tensors, texts, page
        check_free(place, PEFT_WEIGHTS, *texts)
    own = own_files(folder)
    if draws:  # at once, because what is in them has manifests of its own
        claim(folder, own | draws)
    for place, (tensors, texts, page) in made.items():
        write_tensors(place / PEFT_WEIGHTS, tensors, {})
        for name, text in texts.items():
            write_file(place / name, text)
        write_page(place, page, "export_peft")
        remove_own(place, {_NUMBERS, _GENERATION} - texts.keys())
    # what an export before left would be averaged, too
    left = {name for name in own - draws if (folder / name).is_dir()}
    if draws:
        write_page(folder, "", "export_peft")
        left |= {PEFT_WEIGHTS, PEFT_CONFIG, _NUMBERS, _GENERATION}
    remove_own(folder, left)


def _saved_text(config: Any, name: str) -> str:
    """The file that a configuration of another library writes."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / name).read_text("utf-8")


def _use_of(
    model: BayesianLoRAModel, temperature: float, base: str | None
) -> tuple[dict[str, str], str]:
    """What a server has to know beside an exported adapter: files of JSON, and a page; or none."""
    if temperature == 1 and not isinstance(model.likelihood, LabelTokens | MultipleChoice):
        return {}, ""
    numbers, page = page_of_use(model.likelihood, temperature, base, is_classifier(model.net))
    texts = {_NUMBERS: json.dumps(numbers, indent=2) + "\n"}
    if "in" in numbers:
        from transformers import GenerationConfig  # whose import sets filters of warnings

        config = GenerationConfig(do_sample=True, temperature=temperature, top_k=0)
        texts[_GENERATION] = _saved_text(config, _GENERATION)
    return texts, page


def _last_linear(model: BayesianLoRAModel) -> str | None:
    """The layer of a classifier's trained head that puts out the logits; ``None`` without one."""
    found = None
    if isinstance(model.likelihood, SequenceClassification):
        for head in model.trained_heads.names:
            for name, module in model.net.get_submodule(head).named_modules(prefix=head):
                classes = getattr(getattr(model.net, "config", None), "num_labels", None)
                if isinstance(module, nn.Linear) and module.out_features == classes:
                    found = name_in_base(name)
    return found


def merge_and_unload(blora: Any) -> nn.Module:
    """A ``BayesianLoRA``'s network with E[dW] and the trained heads in its weights, by PEFT."""
    blora.model.check_on_network()
    if hasattr(blora.net, "peft_config"):
        raise ConfigurationError(
            f"{type(blora.net).__name__} is PEFT's, with an adapter of its own; merge that one "
            "first, and adapt the base."
        )
    model, temperature = blora.model, float(blora.model.temperature)
    config, tensors = _lora(model, sample_updates(model, blora.guide, 0), temperature)
    from peft import get_peft_model, set_peft_model_state_dict

    if temperature != 1 and _last_linear(model) is None:
        warnings.warn(
            f"The merged network has no head to hold the temperature {temperature:.4g}; divide its "
            "scores by that.",
            stacklevel=4,
        )
    net = blora.unwrap()
    head, embeddings = head_of(net), getattr(net, "get_input_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if weight is not None and weight is getattr(embeddings, "weight", None):
        targets = {id(net.get_submodule(name)) for name in config.target_modules}
        if id(head) in targets:  # untied, so that the embeddings stay
            head.weight = nn.Parameter(weight.detach().clone())  # type: ignore[union-attr]
            net.config.tie_word_embeddings = False
    model = get_peft_model(net, config)
    set_peft_model_state_dict(model, tensors)
    whole: nn.Module = model.merge_and_unload()
    return whole


def _draws(blora: Any, count: int) -> list[dict[str, LowRankUpdate]]:
    model, guide = blora.model, blora.guide
    amortized = getattr(guide, "reads_context", False)
    drawn = {} if amortized else draws_in_pairs(model, guide)(count)
    if not drawn or any(update.noise is not None for update in drawn.values()):
        raise ConfigurationError(
            "A draw is no LoRA where it depends on the input, as that of Amortized does, or has "
            f"noise, as {model.prior!r} may; export the mean, or take conditional='deterministic'."
        )

    def nth(factor: Tensor | None, k: int) -> Any:
        shared = factor is None or factor.dim() == 3
        return factor if shared else factor.flatten(0, -4)[k]  # type: ignore[union-attr]

    return [
        {n: LowRankUpdate(nth(u.A, k), nth(u.B, k), nth(u.core, k)) for n, u in drawn.items()}
        for k in range(count)
    ]


def _lora(
    model: BayesianLoRAModel, updates: Mapping[str, LowRankUpdate], temperature: float
) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's configuration and tensors of updates ``(n, ...)`` by group, and of trained heads.

    The layer of a head that puts out the logits is over the temperature.
    """
    from peft import LoraConfig

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for group in model.groups:
        layers = updates[group.name].layers()
        for layer, module_name in zip(layers, group.module_names, strict=True):
            name, B = name_in_base(module_name), layer.B
            ranks[name] = len(layer.A)
            tensors[f"{name}.lora_A.weight"] = layer.A
            tensors[f"{name}.lora_B.weight"] = B if layer.core is None else B @ layer.core
    rank, heads = max(ranks.values()), model.trained_heads
    patterns = {re.escape(name): r for name, r in ranks.items() if r < rank}
    last = f"{_last_linear(model)}."
    for full, tensor in heads.tensors().items():
        name = name_in_base(full)
        tensors[name] = tensor / temperature if name.startswith(last) else tensor
    base = name_of(model.net) or getattr(model.net, "name_or_path", None)  # or its folder
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=list(ranks),
        modules_to_save=[name_in_base(name) for name in heads.names] or None,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for g in model.groups for m in g.modules),
        base_model_name_or_path=base or None,
        task_type=_task_type(model),
        inference_mode=True,
    )
    return config, {f"{PEFT_PREFIX}{name}": tensor.detach() for name, tensor in tensors.items()}


def _task_type(model: BayesianLoRAModel) -> str | None:
    if isinstance(model.likelihood, SequenceClassification):
        # Under SEQ_CLS PEFT wants a head of its own, and leaves a target alone that is the head
        heads = tuple(f"{name}." for name in head_names(model.net))
        layers = [f"{name}." for group in model.groups for name in group.module_names]
        adapted = any(name.startswith(heads) for name in layers)
        return "SEQ_CLS" if model.trained_heads.names and not adapted else None
    generates = getattr(model.net, "can_generate", None)
    return "CAUSAL_LM" if generates is not None and generates() else None
