"""What a folder says of an adapter: written, read, and checked against its base."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

import pyro_blora.guides as guides
import pyro_blora.likelihoods as likelihoods
import pyro_blora.models as models
from pyro_blora._version import __version__
from pyro_blora.checkpoints.atomic import write_atomically
from pyro_blora.checkpoints.tensors import read_tensors
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Likelihood
from pyro_blora.models import UpdateModel
from pyro_blora.network.targets import layer_shape
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.param_store import leave_store

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Saved",
    "read_config",
    "read_pretrained",
    "save_pretrained",
]

CONFIG = "bayesian_lora_config.json"
WEIGHTS = "bayesian_lora.safetensors"
FORMAT = 1
_BY_HAND = (
    "so the adapter cannot be rebuilt from a file; save blora.state_dict() yourself with "
    "safetensors."
)


def save_pretrained(
    adapter: nn.Module,
    model: BayesianLoRAModel,
    family: object,
    folder: str | os.PathLike[str],
) -> None:
    """Writes the trained tensors and how to rebuild the adapter; the base network is not saved.

    Args:
        adapter: holds the trained tensors, as ``BayesianLoRA`` does.
        model: its model.
        family: its guide family.
        folder: where to write; made if it is missing. Each file appears whole or not at all.

    Raises:
        ConfigurationError: the guide is no guide family (an AutoGuide), or a prior has an option
            that JSON cannot hold.
    """
    if not isinstance(family, SiteGuide):
        raise ConfigurationError(f"{family!r} is not a guide family, {_BY_HAND}")
    config = {
        "format": FORMAT,
        "pyro_blora": __version__,
        "base_model": getattr(getattr(model.net, "config", None), "_name_or_path", "") or "",
        "layers": {name: [g.d_out, g.d_in] for g in model.groups for name in g.module_names},
        "modules_to_save": list(model.trained_heads.names),
    }
    parts = {"prior": model.prior, "guide": family, "likelihood": model.likelihood}
    for part, made in parts.items():
        config[part] = {"name": type(made).__name__, "options": made.options()}
    try:
        text = json.dumps(config, indent=2)
    except TypeError as error:
        raise ConfigurationError(f"JSON cannot hold an option ({error}), {_BY_HAND}") from error
    tensors = {name: t.detach().cpu().contiguous() for name, t in adapter.state_dict().items()}
    folder = Path(folder)
    write_atomically(folder / WEIGHTS, lambda path: safetensors.torch.save_file(tensors, path))
    write_atomically(folder / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))


@dataclass(frozen=True)
class Saved:
    """What a folder says of an adapter.

    Attributes:
        options: the arguments of ``BayesianLoRA`` that make it again on its base.
        tensors: the trained tensors by name.
        folder: where it was read.
    """

    options: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    def load_into(self, adapter: nn.Module) -> None:
        """Puts the tensors into ``adapter``, a ``BayesianLoRA``.

        Raises:
            CheckpointError: their names or shapes are not those of ``adapter``.
        """
        own = adapter.state_dict()
        # At first an Ensemble's turn was not saved, and no likelihood had parameters.
        scaled = any(".likelihood." in name for name in self.tensors)
        later = [n for n in own if n.endswith(".turn") or (".likelihood." in n and not scaled)]
        kept = {name: own[name] for name in later}
        tensors = {**kept, **self.tensors}
        expected, found = ({n: tuple(t.shape) for n, t in each.items()} for each in (own, tensors))
        if expected != found:
            differ = sorted(k for k in expected | found if expected.get(k) != found.get(k))
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: the tensors do not fit {CONFIG}; they differ in "
                f"{differ[:4]}. Both files must come from one save_pretrained, for a network of "
                "as many classes."
            )
        adapter.load_state_dict(tensors)
        leave_store(dict(adapter.named_children()))


def read_pretrained(
    net: nn.Module,
    folder: str | os.PathLike[str],
    *,
    prior: UpdateModel | None = None,
    guide: SiteGuide | None = None,
    likelihood: Likelihood | None = None,
) -> Saved:
    """Reads what :func:`save_pretrained` wrote and checks it against ``net``.

    Args:
        net: the base network the adapter was made for.
        folder: the adapter's folder.
        prior: an object like the saved one, where that is not of this library. Default: rebuilt.
        guide: the same for the guide.
        likelihood: the same for the likelihood, whose options may be others.

    Raises:
        CheckpointError: a file is missing, corrupt or of another format; ``net`` is another base;
            or the prior or guide is not of this library and was not passed, or passed with other
            options than the saved ones.
    """
    folder = Path(folder)
    config = read_config(folder)
    _check_base(net, config, folder)
    options = {
        "target_modules": "|".join(re.escape(name) for name in config["layers"]),
        "prior": _part(prior, config, "prior", models),
        "guide": _part(guide, config, "guide", guides),
        "likelihood": likelihood or _part(None, config, "likelihood", likelihoods),
        "modules_to_save": config.get("modules_to_save", []),
    }
    tensors = read_tensors(folder / WEIGHTS)
    if likelihood is not None and type(likelihood).__name__ != config["likelihood"].get("name"):
        tensors = {n: t for n, t in tensors.items() if ".likelihood." not in n}  # another's
    return Saved(options, tensors, folder)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter's folder says of it, without reading its tensors.

    Raises:
        CheckpointError: the file is missing, corrupt or of another format.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"{path} does not exist; give"
        if (path.parent / "adapter_config.json").exists():
            what = (
                f"{path.parent} is a PEFT adapter, a point without a posterior; load it by "
                "peft.PeftModel.from_pretrained, or give"
            )
        raise CheckpointError(f"{what} a folder that save_pretrained wrote.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); save it again.") from error
    parts = {"format": int, "layers": dict, "prior": dict, "guide": dict, "likelihood": dict}
    for key, kind in parts.items():
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise CheckpointError(f"{path} lacks {key!r}; it is not what save_pretrained writes.")
    if config["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {config['format']}, this version reads {FORMAT}; install the "
            f"version that wrote it ({config.get('pyro_blora')})."
        )
    return config


def _check_base(net: nn.Module, config: dict[str, Any], folder: Path) -> None:
    modules = dict(net.named_modules())
    wanted = dict.fromkeys(config.get("modules_to_save", ())) | config["layers"]
    for name, shape in wanted.items():
        found = layer_shape(modules[name]) if name in modules else None
        if name not in modules or (shape is not None and list(found or ()) != shape):
            what = "has no such layer" if found is None else f"has it as {found[0]} x {found[1]}"
            raise CheckpointError(
                f"{folder} is an adapter for {config.get('base_model') or 'another network'!r} "
                f"with {name} of {shape or 'its own'}; {type(net).__name__} {what}. Load the base "
                "it was made for."
            )


def _part(given: Any, config: dict[str, Any], part: str, package: Any) -> Any:
    """``given``, whose options must be the saved ones; or an object made by the saved name.

    Of the package's public names alone: a file cannot run code.
    """
    name, options = config[part].get("name"), config[part].get("options", {})
    if given is not None:
        own = json.loads(json.dumps(given.options(), default=repr))
        for option in own if type(given).__name__ == name else ():
            if own[option] != options.get(option, own[option]):
                raise CheckpointError(
                    f"{part}={given!r} has {option}={own[option]!r}, but the adapter was saved "
                    f"with {option}={options[option]!r}; pass {part}= with the saved options."
                )
        return given
    if name not in package.__all__:
        raise CheckpointError(
            f"The {part} {name!r} is not in {package.__name__}; pass {part}= with an object like "
            "the one that was saved."
        )
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return getattr(package, name)(**options)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The {part} {name} cannot be made from its saved options ({error})."
        ) from error
