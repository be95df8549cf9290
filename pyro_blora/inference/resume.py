"""The state of a training run, from which it continues after a stop: one file in its own folder.

The safetensors file holds the tensors of the adapter, of the optimizer and of the best step, and
the random numbers; its header holds everything else as JSON. The file is replaced as a whole, so a
kill at any moment leaves a complete one, and nothing is unpickled.
"""

import json
import os
import random
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints.checkpoint import altered, fingerprint, read_tensors, write_tensors
from pyro_blora.errors import CheckpointError, ConfigurationError, readable
from pyro_blora.files import check_free, claim, own_files
from pyro_blora.inference.learning_rates import RATES, point_epochs
from pyro_blora.inference.loop import FitResult, Settings
from pyro_blora.inference.objective import size_of
from pyro_blora.options import Options, choose_precision
from pyro_blora.posterior.batches import Batches

STATE = "training_state.safetensors"


class TrainingState:
    """The state of a run in its folder, which refuses to continue with another run's settings."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        blora: BayesianLoRA,
        stream: Batches,
        settings: Settings,
        rates: Mapping[str, float],
        data: Mapping[str, Any],
        *,
        resume: bool,
    ) -> None:
        self.folder, self.path = Path(folder), Path(folder) / STATE
        self.blora, self.stream = blora, stream
        self._found: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self._run = _description(blora, settings, rates, data)
        self._prints = fingerprint(blora.net, blora.model.trained_heads.names)
        if not self.path.exists():  # "auto" may mean another precision on another machine
            self._run["precision"] = choose_precision(settings.precision, blora.device)
            check_free(self.folder, STATE)  # now, not after the first steps
            return
        if not resume:
            raise CheckpointError(
                f"{self.path} exists already; pass resume=True to go on from it, or delete it."
            )
        header, tensors = read_tensors(self.path)
        with readable(self.path):
            notes = json.loads(header["training"])
            saved, steps = dict(notes["settings"]), len(notes["history"])
        if settings.precision == "auto":
            self._run["precision"] = saved["precision"]
        both = {n: (saved.get(n, "absent"), self._run.get(n, "absent")) for n in saved | self._run}
        differ = [f"{n} was {then}, is {now}" for n, (then, now) in both.items() if then != now]
        if others := altered(blora.net, _part(tensors, "base")):
            differ.append(f"the base has other weights, among them {others[0]}")
        if differ:
            raise CheckpointError(
                f"{self.path} is of another run: {'; '.join(differ[:5])}. Train with the saved "
                "settings, or name another folder."
            )
        if steps > settings.num_steps:
            raise ConfigurationError(
                f"num_steps must be at least the {steps} of the run in {folder}, got "
                f"{settings.num_steps}."
            )
        self._found = notes, tensors
        claim(self.folder, own_files(self.folder) | {STATE})  # a copied folder has no manifest

    @property
    def precision(self) -> str:
        """The precision of the run, never ``"auto"``."""
        return str(self._run["precision"])

    def load(self, optimizer: torch.optim.Optimizer, result: FitResult) -> None:
        """Restores the saved state, if there was one, in the adapter, data and optimizer."""
        if self._found is None:
            return
        (notes, tensors), self._found = self._found, None
        with readable(self.path):
            self.blora.load_state_dict(_part(tensors, "adapter"))
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _part(tensors, "optimizer").items():
                index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
            groups = optimizer.state_dict()["param_groups"]  # with the rates of this call
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
            result.history, result.seconds = notes["history"], notes["seconds"]
            result.validation = [(step, loss) for step, loss in notes["validation"]]
            result.best_step = notes["best_step"]
            result.best_state = _part(tensors, "best") or None
            self.stream.go_to(notes["stream"] | _part(tensors, "stream"))
            version, numbers, spare = notes["python"]
            random.setstate((version, tuple(numbers), spare))
            np.random.set_state(tuple(notes["numpy"]))  # noqa: NPY002
            torch.set_rng_state(tensors["random.torch"])
            for i in range(torch.cuda.device_count()):
                if f"random.{i}" in tensors:
                    torch.cuda.set_rng_state(tensors[f"random.{i}"], i)

    def save(self, optimizer: torch.optim.Optimizer, result: FitResult) -> None:
        """Writes the state after a step."""
        place, moments = self.stream.place(), optimizer.state_dict()["state"]
        numbers = {"torch": torch.get_rng_state()}
        if self.blora.device.type == "cuda":
            numbers |= {str(i): state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        parts: dict[str, Mapping[str, Tensor]] = {
            "adapter": self.blora.state_dict(),
            "best": result.best_state or {},
            "optimizer": {f"{i}.{key}": t for i, own in moments.items() for key, t in own.items()},
            "stream": {n: v for n, v in place.items() if isinstance(v, Tensor)},
            "random": numbers,
            "base": self._prints,
        }
        notes = {
            "settings": self._run,
            "history": result.history,
            "validation": result.validation,
            "best_step": result.best_step,
            "seconds": result.seconds,
            "stream": {n: v for n, v in place.items() if not isinstance(v, Tensor)},
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002
        }
        tensors = {f"{part}.{n}": t for part, own in parts.items() for n, t in own.items()}
        told = json.dumps(notes, default=np.ndarray.tolist)
        write_tensors(self.path, tensors, {"training": told})


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _description(
    blora: BayesianLoRA, settings: Settings, rates: Mapping[str, float], data: Mapping[str, Any]
) -> dict[str, Any]:
    """A flat JSON dictionary that identifies a run: settings, data, Pyro parts and layers."""
    found: dict[str, Any] = asdict(settings) | {name: size_of(own) for name, own in data.items()}
    for name in ("num_steps", "patience", "save_every"):  # which a resumed run may change
        del found[name]
    parts = {"prior": blora.prior, "guide": blora.guide_family, "likelihood": blora.likelihood}
    for part, given in parts.items():
        for group, made in given.items() if isinstance(given, Mapping) else [("", given)]:
            name = f"{part}[{group}]" if group else part
            found[name] = type(made).__name__ if isinstance(made, Options) else _named(made)
            own = made.options() if isinstance(made, Options) else {}
            found |= {f"{name}.{option}": value for option, value in own.items()}
    for group in blora.model.groups:
        found |= {f"layer {name}": [group.d_out, group.d_in] for name in group.module_names}
    found["modules_to_save"] = list(blora.model.trained_heads.names)
    found["learning_rates"] = {**RATES, **blora.method.learning_rates, **rates}
    found["point_epochs"] = str(point_epochs(blora))
    return dict(json.loads(json.dumps(found, default=_named)))


def _named(value: Any) -> str:
    """A name that is the same in another process."""
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x\w+", "", repr(value))
