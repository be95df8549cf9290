"""The posterior mean, or draws, as plain PEFT LoRA adapters, for servers that speak PEFT."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from pyro_blora.checkpoints.atomic import write_atomically
from pyro_blora.checkpoints.peft_source import PEFT_CONFIG, PEFT_WEIGHTS
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import SequenceClassification
from pyro_blora.network.pretrained import name_of
from pyro_blora.network.targets import PEFT_PREFIX, head_names, head_of, name_in_base
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.predictive import draws_in_pairs, mean_updates
from pyro_blora.updates.low_rank_update import LowRankUpdate

__all__ = ["export_peft", "lora", "merged"]


def export_peft(
    model: BayesianLoRAModel,
    guide: nn.Module,
    folder: str | os.PathLike[str],
    num_samples: int = 0,
) -> None:
    """Writes the posterior mean as a LoRA, or draws as one each, and the heads trained as points.

    ``B = Q_r^T E[sigma V]`` and ``A = Q_c`` with ``lora_alpha = r``: ``B A = E[dW]``. The heads are
    PEFT's ``modules_to_save``. Of a ``PeftModel`` that was adapted, its own adapter is not written:
    merge it into the base that PEFT shall load this one on.

    Args:
        model: the model.
        guide: its guide.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        num_samples: 0 for the mean, ``K`` for as many draws, in antithetic pairs as ``predict``
            takes them, in ``folder/0`` to ``folder/K-1``. The mean of the ``K`` probabilities that
            they give is the posterior predictive. Default: 0.

    Raises:
        ConfigurationError: peft is not installed, or there are no such draws: the conditional has
            noise that is not of low rank, or the posterior depends on the input.
    """
    if num_samples < 0:
        raise ConfigurationError(
            f"num_samples={num_samples} must be 0 (the posterior mean) or a number of draws."
        )
    if not num_samples:
        loras = {Path(folder): lora(model, mean_updates(model, guide))}
    else:
        loras = {
            Path(folder) / str(k): lora(model, updates)
            for k, updates in enumerate(_draws(model, guide, num_samples))
        }
    for place, (config, tensors) in loras.items():
        _write(place, config, tensors)
    for old in Path(folder).glob("[0-9]*"):  # draws of an earlier export would be averaged, too
        if num_samples and old not in loras and (old / PEFT_CONFIG).exists():
            shutil.rmtree(old)


def _write(folder: Path, config: Any, tensors: dict[str, Tensor]) -> None:
    write_atomically(
        folder / PEFT_WEIGHTS,
        lambda path: safetensors.torch.save_file(tensors, path, metadata={"format": "pt"}),
    )
    config.save_pretrained(str(folder))


def _draws(
    model: BayesianLoRAModel, guide: nn.Module, count: int
) -> list[dict[str, LowRankUpdate]]:
    if getattr(guide, "reads_context", False):
        raise ConfigurationError(
            "The posterior depends on the input, so no adapter is a draw for all inputs; export "
            "the mean, or take another guide than Amortized."
        )
    drawn = draws_in_pairs(model, guide, {})(count)
    if any(update.noise is not None for update in drawn.values()):
        raise ConfigurationError(
            f"{model.prior!r} adds noise to the layers' output, which no LoRA holds; export the "
            "mean, or take conditional='deterministic'."
        )

    def nth(factor: Tensor | None, k: int) -> Tensor | None:
        several = factor is not None and factor.dim() > 3
        return factor.flatten(0, -4)[k] if several else factor  # type: ignore[union-attr]

    return [
        {
            name: LowRankUpdate(nth(u.A, k), nth(u.B, k), nth(u.core, k))  # type: ignore[arg-type]
            for name, u in drawn.items()
        }
        for k in range(count)
    ]


def lora(
    model: BayesianLoRAModel, updates: Mapping[str, LowRankUpdate]
) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's configuration and tensors of updates ``(n, ...)`` by group, and of trained heads.

    Raises:
        ConfigurationError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigurationError("This needs PEFT: pip install 'pyro-blora[peft]'.") from error
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
    smaller = {re.escape(name): r for name, r in ranks.items() if r < rank}
    tensors |= {name_in_base(name): tensor for name, tensor in heads.tensors().items()}
    tensors = {f"{PEFT_PREFIX}{n}": t.detach().cpu().contiguous() for n, t in tensors.items()}
    base = name_of(model.net) or getattr(model.net, "name_or_path", None)  # or its folder
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_modules=list(ranks),
        modules_to_save=[name_in_base(name) for name in heads.names] or None,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for g in model.groups for m in g.modules),
        base_model_name_or_path=base or None,
        task_type=_task_type(model),
        inference_mode=True,
    )
    return config, tensors


def merged(net: nn.Module, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """``net`` with an adapter of :func:`lora` in its weights, by PEFT.

    A tied head that is adapted is untied first: its embeddings stay.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    head, embeddings = head_of(net), getattr(net, "get_input_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if weight is not None and weight is getattr(embeddings, "weight", None):
        targets = {id(net.get_submodule(name)) for name in config.target_modules}
        if id(head) in targets:
            head.weight = nn.Parameter(weight.detach().clone())  # type: ignore[union-attr]
            net.config.tie_word_embeddings = False  # type: ignore[union-attr]
    model = get_peft_model(net, config)
    set_peft_model_state_dict(model, tensors)
    whole: nn.Module = model.merge_and_unload()
    return whole


def _task_type(model: BayesianLoRAModel) -> str | None:
    if isinstance(model.likelihood, SequenceClassification):
        # Under SEQ_CLS PEFT leaves a target alone that is the head: it would not be loaded
        heads = tuple(f"{name}." for name in head_names(model.net))
        layers = [f"{name}." for group in model.groups for name in group.module_names]
        return None if any(name.startswith(heads) for name in layers) else "SEQ_CLS"
    generates = getattr(model.net, "can_generate", None)
    if generates is None or not generates():
        return None
    encoder_decoder = getattr(getattr(model.net, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
