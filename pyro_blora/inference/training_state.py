"""What a training run needs to go on after a stop, in a folder of its own.

``training_state.safetensors`` has the tensors: the adapter's, the optimizer's, the best ones, the
history, the state of torch's random numbers and a few numbers of each of the base's; and in its
header, as JSON, all the rest. It appears whole or not at all. Nothing is unpickled.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints import write_atomically
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.inference.loop import Batches, Collate, FitResult
from pyro_blora.network.fingerprint import altered, fingerprint
from pyro_blora.network.precision import choose_precision
from pyro_blora.network.targets import name_in_base
from pyro_blora.options import Options

STATE = "training_state.safetensors"
FORMAT = 1
# what reading something else than what was written may raise
_WRONG = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def is_there(folder: Path) -> bool:
    """Whether a run left its state in the folder."""
    return (folder / STATE).exists()


def forget(folder: Path) -> None:
    """Deletes what a run left in the folder."""
    (folder / STATE).unlink(missing_ok=True)


class TrainingState:
    """The state of a run in its folder.

    Args:
        folder: where it is kept; made if it is missing.
        blora: what is trained.
        stream: its batches.
        settings: what ``settings_of`` says.
        num_steps: how many steps the run shall have.
        resume: whether to go on from a state that is there already.

    Raises:
        ConfigurationError: the folder cannot be written to, or the run in it is longer already.
        CheckpointError: a state is there and ``resume`` is false, or it is of another run, corrupt
            or incomplete.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        blora: BayesianLoRA,
        stream: Batches,
        settings: dict[str, Any],
        *,
        num_steps: int,
        resume: bool,
    ) -> None:
        self.folder, self.settings = Path(folder), settings
        self.blora, self.stream = blora, stream
        self._device = blora.model.groups[0].device
        heads = [name_in_base(name) for name in blora.model.trained_heads.names]
        self._prints = fingerprint(blora.net, heads)
        self._found: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(f".{STATE}.*"):  # of a process killed while it wrote
                path.unlink()
        except OSError as error:
            raise ConfigurationError(
                f"checkpoint_dir={str(folder)!r} cannot be written to: {error.strerror}. Name "
                "another one."
            ) from error
        if not is_there(self.folder):
            # said now, for another time "auto" may find the other one faster
            settings["precision"] = choose_precision(settings["precision"], self._device)
        else:
            if not resume:
                raise CheckpointError(
                    f"{self.folder / STATE} is there already, of a run before; pass resume=True to "
                    "go on from it, delete it, or name another checkpoint_dir."
                )
            self._found = self._read()
            done = self._found[0]["steps"]
            if done > num_steps:
                raise ConfigurationError(
                    f"num_steps={num_steps}, but the run in {self.folder} has {done} already; ask "
                    "for as many or more, or name another folder."
                )

    @property
    def precision(self) -> str:
        """The network's: what was asked for; and of ``"auto"`` what it was when the run began."""
        return str(self.settings["precision"])

    @property
    def is_found(self) -> bool:
        """Whether there is a state to go on from."""
        return self._found is not None

    def load(self, optimizer: torch.optim.Optimizer, result: FitResult) -> None:
        """Puts the state that was found, if one was, into the adapter and into all of these.

        Raises:
            CheckpointError: it does not fit, or is corrupt; nothing is loaded then.
        """
        if self._found is None:
            return
        (notes, tensors), self._found = self._found, None
        try:
            adapter, best = _part(tensors, "adapter"), _part(tensors, "best")
            own = self.blora.state_dict()
            for name, held in (("adapter", adapter), ("best", best)):
                if held or name == "adapter":
                    _check_shapes(held, {n: tuple(t.shape) for n, t in own.items()})
            moments = self._moments(optimizer, _part(tensors, "optimizer"))
            columns = {n: column.tolist() for n, column in _part(tensors, "history").items()}
            rows = zip(*columns.values(), strict=True)
            history = [dict(zip(columns, row, strict=True)) for row in rows]
            validation = [(int(step), float(loss)) for step, loss in notes["validation"]]
            best_step, seconds = notes["best_step"], float(notes["seconds"])
            if len(history) != notes["steps"]:
                raise ValueError(f"a history of {len(history)} of {notes['steps']} steps")
            self.stream.go_to(notes["stream"] | _part(tensors, "stream"))
            set_random_states(notes["random"], _part(tensors, "random"))
        except CheckpointError:
            raise
        except _WRONG as error:
            raise self._corrupt(error) from error
        self.blora.load_state_dict(adapter)
        optimizer.load_state_dict(moments)
        result.history, result.validation, result.seconds = history, validation, seconds
        result.best_step = best_step
        result.best_state = {n: t.to(own[n].device) for n, t in best.items()} or None

    def save(self, optimizer: torch.optim.Optimizer, result: FitResult) -> None:
        """Writes the state after a step; a kill at any moment leaves this one or the last one."""
        names = self._names(optimizer)
        moments = optimizer.state_dict()["state"]
        place = self.stream.place()
        generators, states = random_states(self._device)
        parts: dict[str, Mapping[str, Any]] = {
            "adapter": self.blora.state_dict(),
            "best": result.best_state or {},
            "optimizer": {
                f"{names[i]}.{key}": v for i, own in moments.items() for key, v in own.items()
            },
            "history": {
                key: torch.tensor([step[key] for step in result.history], dtype=torch.float64)
                for key in result.history[0]
            },
            "stream": {n: v for n, v in place.items() if isinstance(v, Tensor)},
            "random": states,
            "base": self._prints,
        }
        notes = {
            "format": FORMAT,
            "settings": self.settings,
            "steps": len(result.history),
            "validation": result.validation,
            "best_step": result.best_step,
            "seconds": result.seconds,
            "stream": {n: v for n, v in place.items() if not isinstance(v, Tensor)},
            "random": generators,
        }
        tensors = {f"{part}.{n}": t for part, own in parts.items() for n, t in own.items()}
        self._write(STATE, tensors, {"training": json.dumps(notes)})

    def _write(self, name: str, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
        tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        write_atomically(self.folder / name, lambda path: save_file(tensors, path, metadata=notes))

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(self.folder / STATE, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise self._corrupt(error) from error
        try:
            notes = json.loads(metadata["training"])
            form, saved = notes["format"], dict(notes["settings"])
            notes["steps"], saved["precision"] = int(notes["steps"]), str(saved["precision"])
        except _WRONG as error:
            raise self._corrupt(error) from error
        if form != FORMAT:
            raise CheckpointError(
                f"{self.folder / STATE} has format {form}, this version reads {FORMAT}; go on with "
                "the version that wrote it."
            )
        if self.settings["precision"] == "auto":
            self.settings["precision"] = saved["precision"]
        check_same(self.folder / STATE, saved, self.settings)
        check_base(self.folder / STATE, _part(tensors, "base"), self.blora.net)
        return notes, tensors

    def _corrupt(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / STATE} is corrupt or incomplete ({type(error).__name__}: {error}); "
            "delete it to start anew."
        )

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """The names of the optimizer's parameters, in its order."""
        named = {id(p): name for name, p in self.blora.named_parameters()}
        return [named[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def _moments(
        self, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The saved state as ``load_state_dict`` takes it; the rates are those of now."""
        index = {name: i for i, name in enumerate(self._names(optimizer))}
        shapes = {name: tuple(p.shape) for name, p in self.blora.named_parameters()}
        state: dict[int, dict[str, Tensor]] = {}
        for path, tensor in saved.items():
            name, _, key = path.rpartition(".")
            state.setdefault(index[name], {})[key] = tensor
            if tensor.dim():
                _check_shapes({path: tensor}, {path: shapes[name]})
        if len({frozenset(own) for own in state.values()}) > 1:
            raise ValueError("the optimizer lacks a moment")
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _check_shapes(found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    differ = sorted(n for n in shapes | expected if shapes.get(n) != expected.get(n))
    if differ:
        raise ValueError(f"{differ[0]} is {shapes.get(differ[0])}, not {expected.get(differ[0])}")
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")


# may be others when a run goes on
_FREE = ("num_steps", "progress", "callback", "checkpoint_dir", "save_every", "resume")


def settings_of(blora: BayesianLoRA, options: Mapping[str, Any], **data: str) -> dict[str, Any]:
    """The options, what is told of the data, the three nouns and the layers, flat, for JSON."""
    found: dict[str, Any] = {n: v for n, v in options.items() if n not in _FREE} | data
    parts = {"prior": blora.prior, "guide": blora.guide_family, "likelihood": blora.likelihood}
    for part, given in parts.items():
        each = given if isinstance(given, Mapping) else {"": given}
        for group, made in each.items():
            name = f"{part}[{group}]" if group else part
            found[name] = type(made).__name__ if isinstance(made, Options) else _named(made)
            own = made.options() if isinstance(made, Options) else {}
            found |= {f"{name}.{option}": value for option, value in own.items()}
    for group in blora.model.groups:
        found |= {f"layer {name}": [group.d_out, group.d_in] for name in group.module_names}
    found["modules_to_save"] = list(blora.model.trained_heads.names)
    found["learning_rates"] = dict(blora.method.learning_rates)
    return dict(json.loads(json.dumps(found, default=_named)))


def _named(value: Any) -> str:
    """A name that another process gives it, too; of a function with a digest of what it does."""
    if not isinstance(value, FunctionType | partial):
        return getattr(value, "__name__", None) or re.sub(r" at 0x\w+", "", repr(value))
    return f"{getattr(value, '__qualname__', 'partial')} ({_digest(_does(value))})"


def _does(value: Any) -> Any:
    """What tells a function from another one."""
    if isinstance(value, partial):
        return [_does(value.func), value.args, value.keywords]
    if isinstance(value, FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != CellType()]
        return [_does(value.__code__), value.__defaults__, [_does(c.cell_contents) for c in cells]]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, *map(_does, value.co_consts)]
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


def _digest(value: Any) -> str:
    text = re.sub(r" at 0x\w+", "", repr(value))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def described_data(data: Any, collate: Collate | None, device: torch.device) -> str:
    """How many examples there are, and a digest of three of them, as they come in a batch.

    What draws random numbers to make one is given the same; the global ones are as before.
    """
    if isinstance(data, DataLoader):  # one without a batch_sampler has batches for its data
        single = data.batch_sampler is None
        data, collate = data.dataset, (lambda rows: rows[0]) if single else data.collate_fn
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        return str(data if data is None else type(data).__name__)
    before = random_states(device)
    try:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        chosen = sorted({0, len(data) // 2, len(data) - 1}) if len(data) else []
        made = [(collate or default_collate)([data[i]]) for i in chosen]
    finally:
        set_random_states(*before)
    rows = [{k: v.tolist() if isinstance(v, Tensor) else v for k, v in b.items()} for b in made]
    return f"{len(data)} examples ({_digest(rows)})"


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


def random_states(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Python's and numpy's state, which JSON holds; torch's, and that of CUDA devices, if used."""
    kind, numbers, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    numpy = [kind, np.asarray(numbers).tolist(), *rest]
    return {"python": random.getstate(), "numpy": numpy}, states


def set_random_states(generators: dict[str, Any], states: dict[str, Tensor]) -> None:
    """Sets what :func:`random_states` gave, of as many CUDA devices as there are."""
    version, numbers, spare = generators["python"]
    random.setstate((version, tuple(numbers), spare))
    np.random.set_state(tuple(generators["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{i}"], i)
