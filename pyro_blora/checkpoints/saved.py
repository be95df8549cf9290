"""What a folder says of an adapter: written, read, and checked against its base."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_blora._version import __version__
from pyro_blora.checkpoints.atomic import write_together, written
from pyro_blora.checkpoints.base import base_of, load_base, names_in
from pyro_blora.checkpoints.card import CARD, MARK, Result, model_card
from pyro_blora.checkpoints.files import (
    CONFIG,
    FORMAT,
    OF_BASE,
    WEIGHTS,
    as_files,
    read_config,
    read_weights,
)
from pyro_blora.checkpoints.hub import fetched
from pyro_blora.checkpoints.parts import describe, describe_guide, rebuild
from pyro_blora.errors import CheckpointError
from pyro_blora.methods import Method
from pyro_blora.network.fingerprint import altered, fingerprint
from pyro_blora.network.targets import name_in_base
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.guide import start_guide_alone

__all__ = ["Saved", "read_pretrained", "save_pretrained"]


def save_pretrained(
    adapter: Any,
    model: BayesianLoRAModel,
    family: Any,
    folder: str | os.PathLike[str],
    *,
    result: Result | None = None,
    notes: Mapping[str, object] | None = None,
    place: str = "path/to/this/folder",
) -> None:
    """Writes the trained tensors, how to rebuild the adapter, and a model card.

    The base network is not saved, but its name, where that is one on the hub, and a few numbers by
    which its weights are known again. All files appear together: a kill at any moment leaves the
    old ones or the new. A ``README.md`` that is not the adapter's own card stays as it is.

    Args:
        adapter: holds the trained tensors and the guide, as ``BayesianLoRA`` does.
        model: its model.
        family: its guide family, or what made its guide.
        folder: where to write; made if it is missing.
        result: what ``fit`` returned, for the card.
        notes: more lines of the card, by their names, such as ``{"accuracy": 0.93}``; the JSON
            file has them, too.
        place: what the card says to load.

    Raises:
        CheckpointError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; save_pretrained writes a folder: name another.")
    layers = {name_in_base(n): [g.d_out, g.d_in] for g in model.groups for n in g.module_names}
    heads = [name_in_base(name) for name in model.trained_heads.names]
    config = {
        "format": FORMAT,
        "pyro_blora": __version__,
        **base_of(model.net),
        "layers": layers,
        "modules_to_save": heads,
        "method": asdict(adapter.method),
        "prior": describe(model.prior),
        "guide": describe_guide(family, adapter.guide),
        "likelihood": describe(model.likelihood),
        "notes": {name: str(value) for name, value in (notes or {}).items()},
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in adapter.state_dict().items()}
    prints = fingerprint(model.net, heads)
    files = as_files(config, tensors | {OF_BASE + name: t for name, t in prints.items()})
    card = written(folder, CARD)
    if not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace"):
        about: dict[str, Any] = {"result": result, "notes": notes, "place": place}
        files[CARD] = model_card(config, model, family, **about).encode()
    write_together(folder, files)


@dataclass(frozen=True)
class Saved:
    """What a folder says of an adapter.

    Attributes:
        net: the base network.
        options: the arguments of ``BayesianLoRA`` that make it again on its base.
        tensors: the trained tensors by name.
        folder: where it was read.
    """

    net: nn.Module
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    def load_into(self, adapter: Any) -> None:
        """Puts the tensors into ``adapter``, a ``BayesianLoRA``.

        Raises:
            CheckpointError: their names or shapes are not those of ``adapter``.
        """
        start_guide_alone(adapter.guide)
        own, tensors = adapter.state_dict(), dict(self.tensors)
        if not any(".likelihood." in name for name in tensors):  # another one's are left out
            tensors |= {n: t for n, t in own.items() if ".likelihood." in n}
        # What AutoLaplaceApproximation leaves are the values themselves, by their bare names
        for name in [n for n in tensors if f"{n}_unconstrained" in own]:
            parent, _, last = name.rpartition(".")
            constraint, _ = adapter.get_submodule(parent)._pyro_params[last]
            tensors[f"{name}_unconstrained"] = transform_to(constraint).inv(tensors.pop(name))
        expected, given = ({n: tuple(t.shape) for n, t in each.items()} for each in (own, tensors))
        if expected != given:
            differ = sorted(k for k in expected | given if expected.get(k) != given.get(k))
            if all(".likelihood." in name for name in differ):
                names = [n.rpartition(".")[2].removesuffix("_unconstrained") for n in differ]
                raise CheckpointError(
                    f"{self.folder} was saved with another likelihood than "
                    f"{self.options['likelihood']!r}: they differ in {', '.join(names)}; pass "
                    "likelihood= with the saved options (of MultipleChoice scale=) or leave it out."
                )
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: the tensors do not fit {CONFIG}; they differ in "
                f"{differ[:4]}. Both files must come from one save_pretrained, for a network of "
                "as many classes."
            )
        adapter.load_state_dict(tensors)


def read_pretrained(
    net: nn.Module | None,
    folder: str | os.PathLike[str],
    *,
    prior: Any = None,
    guide: Any = None,
    likelihood: Any = None,
    trust_remote_code: bool = False,
) -> Saved:
    """Reads what :func:`save_pretrained` wrote and checks it against its base.

    Args:
        net: the base network the adapter was made for. ``None`` loads it by its saved name.
        folder: the adapter's folder, or its id on the hub.
        prior: for one that is not of this library, its class, or an object, whose options give way
            to the saved ones with a warning; where several were saved by group, a mapping with some
            of their keys. Default: rebuilt.
        guide: the same for the guide; or the function that makes it.
        likelihood: the same for the likelihood, but an object's options win over the saved ones.
        trust_remote_code: whether a class that is not of this library may be imported by its name.

    Raises:
        CheckpointError: a file is missing, corrupt or of another format; ``net`` is another base,
            or cannot be loaded by its name; or a part cannot be rebuilt. See :func:`rebuild`.

    A base with other weights of the same shapes is answered with a warning.
    """
    folder = fetched(folder)
    config = read_config(folder)
    tensors = read_weights(folder, config)
    if net is None:
        net = load_base(config, folder)
    told = f"{folder} is an adapter for {config.get('base_model') or 'another network'!r}"
    layers = names_in(net, config["layers"], told)
    heads = names_in(net, dict.fromkeys(config.get("modules_to_save", ())), told)
    prints = {n.removeprefix(OF_BASE): t for n, t in tensors.items() if n.startswith(OF_BASE)}
    others = altered(net, prints)
    if others:
        warnings.warn(
            f"{folder}: {len(others)} of the {len(prints)} weights that were looked at are not "
            f"those the adapter was trained on, among them {others[0]}; its predictions will be "
            f"others. Load {config.get('base_model') or 'the base it was made for'}, unaltered.",
            stacklevel=4,
        )
    given = {"prior": prior, "guide": guide, "likelihood": likelihood}
    parts = {
        noun: rebuild(noun, config[noun], own, trust_remote_code=trust_remote_code)
        for noun, own in given.items()
    }
    options = {
        "target_modules": "|".join(map(re.escape, layers)),
        "method": Method(**config["method"]),
        **parts,
        "modules_to_save": heads,
    }
    tensors = {n: t for n, t in tensors.items() if not n.startswith(OF_BASE)}
    if type(parts["likelihood"]).__name__ != config["likelihood"].get("name"):
        tensors = {n: t for n, t in tensors.items() if ".likelihood." not in n}  # another's
    return Saved(net, options, tensors, folder)
