"""What PEFT says of an adapter, in a folder, on the hub or in memory, before it is understood."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyro_blora.checkpoints.files import read_tensors
from pyro_blora.checkpoints.hub import downloaded
from pyro_blora.checkpoints.saved import CONFIG
from pyro_blora.errors import CheckpointError, ConfigurationError

__all__ = ["PEFT_CONFIG", "PEFT_WEIGHTS", "read_source", "unloaded"]

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What makes of a LoRA something else than ``W0 + s B A``
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that take a part of the base's weights into the adapter
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_source(
    source: str | os.PathLike[str] | nn.Module,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float], str]:
    """The configuration and the tensors of a LoRA, and what to call it in a message.

    Before the last stand the scalings in force by the layers' names, where it is in memory.

    Arguments and errors are those of :func:`~pyro_blora.checkpoints.read_peft`.
    """
    if isinstance(source, nn.Module):
        return _of_model(source)
    folder = _folder(source)
    config = _read_config(folder)
    _check_plain(config, str(folder))
    return config, _read_weights(folder), {}, str(folder)


def _check_plain(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    kind = str(getattr(kind, "value", kind))
    variants = [f"{key}={config[key]!r}" for key in _VARIANTS if config.get(key)]
    variants += [f"bias={b!r}" for b in [config.get("bias") or "none"] if b != "none"]
    start = config.get("init_lora_weights")
    if kind != "LORA":
        variants = [f"peft_type={kind!r}"]
    elif isinstance(start, str) and start.lower().startswith(_FROM_BASE):
        raise ConfigurationError(
            f"{where} was started by init_lora_weights={start!r}, which changes the base, too; "
            "save it by PEFT with path_initial_model_for_weight_conversion=, which makes a plain "
            "LoRA of it."
        )
    if variants:
        raise ConfigurationError(
            f"{where} is no plain LoRA but has {', '.join(variants)}; only dW = s B A can be a "
            "start. Train it without, or merge it into the base and adapt that."
        )


def _of_model(model: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float], str]:
    name = type(model).__name__
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        raise ConfigurationError(
            f"from_peft takes a peft.PeftModel, a folder or a hub id, and {name} is no PeftModel; "
            "give the adapter's folder, too, from_peft(net, folder)."
        )
    from peft import get_peft_model_state_dict

    active = list(model.active_adapters)
    if len(active) != 1:
        raise ConfigurationError(
            f"{name} has the active adapters {active}; activate one, model.set_adapter(name)."
        )
    config = model.peft_config[active[0]].to_dict()
    _check_plain(config, name)
    merged = model.get_model_status().merged_adapters
    if merged:
        raise ConfigurationError(
            f"{name} has {merged} merged into its base; call model.unmerge_adapter() first."
        )
    tensors = get_peft_model_state_dict(model, adapter_name=active[0], save_embedding_layers=False)
    layers = model.get_base_model().named_modules()
    scales = {n: m.scaling[active[0]] for n, m in layers if active[0] in getattr(m, "lora_A", ())}
    return config, tensors, scales, name


@contextmanager
def unloaded(model: Any) -> Iterator[nn.Module]:
    """The network that a ``PeftModel`` has wrapped, by PEFT's ``unload``, and its heads untrained.

    Where what is done within fails, the ``PeftModel`` is as it was; else it is done with.
    """
    wrapped: Any = model.get_base_model()
    config, layers = wrapped.peft_config, {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            layers[name] = module
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


def _folder(source: str | os.PathLike[str]) -> Path:
    folder = Path(source)
    if folder.exists() or isinstance(source, os.PathLike) or source.count("/") != 1:
        return folder
    wanted = "a folder that PEFT wrote, or a hub id"
    return downloaded(source, [PEFT_CONFIG, PEFT_WEIGHTS], wanted)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / PEFT_CONFIG
    if not path.is_file():
        hint = "give a folder that PEFT wrote, or the hub id of one."
        if (folder / CONFIG).is_file():
            hint = "it is a Bayesian adapter; read it by BayesianLoRA.from_pretrained."
        raise CheckpointError(f"{folder} has no {PEFT_CONFIG}; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); save it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not what PEFT writes, a JSON object.")
    kinds: dict[str, Any] = {
        "lora_alpha": (int, float),
        "alpha_pattern": dict,
        "modules_to_save": list,
    }
    for key, kind in kinds.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise CheckpointError(f"{path}: {key}={config[key]!r} is not what PEFT writes.")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / PEFT_WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} has a pickle, adapter_model.bin, which is not read here; load it by PEFT "
            "and save it again, which writes safetensors."
        )
    return read_tensors(folder / PEFT_WEIGHTS)
