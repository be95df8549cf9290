"""What a training run was made with, by which another one is told from it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import CheckpointError
from pyro_blora.network.fingerprint import altered
from pyro_blora.options import Options

__all__ = ["check_base", "check_same", "settings_of"]

# may be others when a run goes on
_FREE = ("num_steps", "progress", "callback", "checkpoint_dir", "save_every", "resume")


def settings_of(
    blora: BayesianLoRA, options: Mapping[str, Any], **data: int | None
) -> dict[str, Any]:
    """The options, the sizes of the data, the three nouns and the layers, flat, as JSON has them.

    Args:
        blora: the adapter.
        options: those of ``fit``, by name.
        data: sizes, by name.
    """
    found: dict[str, Any] = {n: v for n, v in options.items() if n not in _FREE} | data
    parts = {"prior": blora.prior, "guide": blora.guide_family, "likelihood": blora.likelihood}
    for part, given in parts.items():
        each = given if isinstance(given, Mapping) else {"": given}
        for group, made in each.items():
            name = f"{part}[{group}]" if group else part
            found[name] = getattr(made, "__name__", type(made).__name__)
            own = made.options() if isinstance(made, Options) else {}
            found |= {f"{name}.{option}": value for option, value in own.items()}
    for group in blora.model.groups:
        found |= {f"layer {name}": [group.d_out, group.d_in] for name in group.module_names}
    found["modules_to_save"] = list(blora.model.trained_heads.names)
    return dict(json.loads(json.dumps(found, default=_named)))


def _named(value: Any) -> str:
    """A name that another process gives it, too."""
    return getattr(value, "__name__", None) or re.sub(r" at 0x\w+", "", repr(value))


def check_base(path: Path, prints: Mapping[str, Tensor], net: nn.Module) -> None:
    """Raises CheckpointError where the network has other weights than these fingerprints."""
    others = altered(net, prints)
    if others:
        raise CheckpointError(
            f"{path} is of another run: of its base, {len(others)} of the {len(prints)} weights "
            f"that were looked at have other values here, among them {others[0]}. Load the base "
            "that it began with, or name another folder."
        )


def check_same(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError, which names what differs, where these are not the same settings."""
    differ = [
        f"{name} was {saved.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in {**saved, **now}
        if name not in saved or name not in now or saved[name] != now[name]
    ]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise CheckpointError(
            f"{path} is of another run: {'; '.join(differ[:5])}{more}. Train with what was saved, "
            "or name another folder."
        )
