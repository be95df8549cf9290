"""The posterior mean as a plain PEFT LoRA adapter, for servers that speak PEFT."""

import os
import re
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from pyro_blora.checkpoints.atomic import write_atomically
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import SequenceClassification
from pyro_blora.network.targets import head_names
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.sample_updates import mean_updates

__all__ = ["export_peft"]


def export_peft(model: BayesianLoRAModel, guide: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes the posterior mean as a LoRA, and the heads trained as points.

    ``B = Q_r^T E[sigma V]`` and ``A = Q_c`` with ``lora_alpha = r``: ``B A = E[dW]``. The heads are
    PEFT's ``modules_to_save``. Of a ``PeftModel`` that was adapted, its own adapter is not written:
    merge it into the base that PEFT shall load this one on.

    Args:
        model: the model.
        guide: its guide.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.

    Raises:
        ConfigurationError: peft is not installed, or the groups have different ranks.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigurationError(
            "export_peft needs PEFT: pip install 'pyro-blora[peft]'."
        ) from error
    tensors: dict[str, Tensor] = {}
    ranks = set()
    for name, update in mean_updates(model, guide).items():
        group = next(g for g in model.groups if g.name == name)
        for layer, module_name in zip(update.layers(), group.module_names, strict=True):
            B = layer.B if layer.core is None else layer.B @ layer.core
            tensors[f"{_in_base(module_name)}.lora_A.weight"] = layer.A
            tensors[f"{_in_base(module_name)}.lora_B.weight"] = B
            ranks.add(layer.A.shape[0])
    if len(ranks) > 1:
        raise ConfigurationError(
            f"The groups have different ranks, {sorted(ranks)}; export one each."
        )
    rank, heads = ranks.pop(), model.trained_heads
    tensors |= {_in_base(name): tensor for name, tensor in heads.tensors().items()}
    tensors = {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in tensors.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[_in_base(n) for g in model.groups for n in g.module_names],
        modules_to_save=[_in_base(name) for name in heads.names] or None,
        base_model_name_or_path=getattr(getattr(model.net, "config", None), "_name_or_path", None),
        task_type=_task_type(model),
        inference_mode=True,
    )
    folder = Path(folder)
    write_atomically(
        folder / "adapter_model.safetensors",
        lambda path: safetensors.torch.save_file(tensors, path, metadata={"format": "pt"}),
    )
    config.save_pretrained(str(folder))


def _in_base(name: str) -> str:
    """The name without what PEFT puts around a network and its heads."""
    return re.sub(r"\.modules_to_save\.[^.]+", "", name.removeprefix("base_model.model."))


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
