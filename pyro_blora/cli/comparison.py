"""Methods side by side on one task: the same data, budget, scoring and metrics for each."""

import json
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints.checkpoint import read_tensors
from pyro_blora.data import Item, load_task
from pyro_blora.data.items import item_length
from pyro_blora.errors import ConfigurationError, readable
from pyro_blora.evaluation.metrics import evaluate, fit_temperature
from pyro_blora.evaluation.plots import reliability_diagram, save_figure
from pyro_blora.files import write_file
from pyro_blora.inference import FitResult, fit
from pyro_blora.likelihoods import Batch
from pyro_blora.methods import BEST, get_method, trained_for
from pyro_blora.posterior.prediction import Prediction, predict_dataset

RESULTS = "results.json"
PREDICTIONS = "predictions.safetensors"
DIAGRAM = "reliability.png"
_PREDICTED = ("probs", "labels")  # the columns of this file
_LIMITS = ("data_dir", "max_train", "max_validation", "max_test")

Settings = Mapping[str, Any]  # the options of ``pyro-blora compare``, as results.json has them
Phase = Callable[[str], AbstractContextManager[Any]]
Predict = Callable[[Batch], Prediction]


@dataclass
class Row:
    """One method under one seed: the columns of ``results.json``, and the predictions."""

    method: str
    seed: int
    acc: float
    ece: float
    nll: float
    brier: float
    n_test: int
    train_seconds: float
    trainable_parameters: int
    probs: Tensor
    labels: Tensor


def compare(
    settings: Settings,
    net: nn.Module,
    tokenizer: Any,
    *,
    done: Collection[tuple[str, int]],
    phase: Phase,
) -> Iterator[Row]:
    """Trains and evaluates every method under every seed but ``done``, a row at a time.

    A seed sets the training subset, the order of the batches and all draws.
    """
    for seed in settings["seeds"]:
        run = _Run(settings, net, tokenizer, seed, phase)
        shown: dict[str, list[str]] = {}  # the trained method, and as what it is shown
        for method in dict.fromkeys(settings["methods"]):
            if (method, seed) not in done:
                shown.setdefault(trained_for(method), []).append(method)
        for base, names in shown.items():
            yield from run.trained(base, names)


class _Run:
    """A method under one seed."""

    def __init__(
        self, settings: Settings, net: nn.Module, tokenizer: Any, seed: int, phase: Phase
    ) -> None:
        self.settings, self.net, self.seed, self.phase = settings, net, seed, phase
        limits = {name: settings[name] for name in _LIMITS}
        self.task = load_task(settings["task"], seed=seed, **limits)
        self.collate = self.task.collator(tokenizer)

    def _predict(self, predict: Predict, data: Sequence[Item], name: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(self.seed)
        with self.phase(f"predict {name}, seed {self.seed}"):
            prediction, labels = predict_dataset(
                predict,
                data,
                self.collate,
                length=item_length,
                device=next(self.net.parameters()).device,
                precision=self.settings["precision"],
                description=f"{name}, seed {self.seed}",
            )
        return prediction.probs, labels

    def _rows(
        self, shown: Sequence[str], predict: Predict, fitted: FitResult, count: int
    ) -> Iterator[Row]:
        """The rows of one trained method: as it is, or with its temperature, as they are asked."""
        plain, labels = self._predict(predict, self.task.test, shown[0])
        scaled = [name for name in shown if name.startswith("temperature")]
        if scaled:  # of one method, so that one temperature serves all its names
            held, held_labels = self._predict(predict, self.task.validation, scaled[0])
            temperature = fit_temperature(held.log(), held_labels)
        for name in shown:
            probs, numbers = plain, count
            if name in scaled:
                probs, numbers = (plain.log() / temperature).softmax(-1), count + 1
            s = evaluate(probs, labels)
            scores = (s.acc, s.ece, s.nll, s.brier, s.n)
            yield Row(name, self.seed, *scores, fitted.seconds, numbers, probs, labels)

    def trained(self, base: str, shown: Sequence[str]) -> Iterator[Row]:
        """A prior beside a guide at its last step; then, if asked, at its best validation step."""
        settings, made = self.settings, get_method(base)
        best = [name for name in shown if name.endswith(BEST)]
        torch.manual_seed(self.seed)
        blora = BayesianLoRA(
            self.net,
            method=made,
            rank=settings["rank"],
            target_modules=settings["target_modules"],
            likelihood=self.task.likelihood(self.collate, made.scale),
        )
        try:
            with self.phase(f"train {base}, seed {self.seed}"):
                fitted = fit(
                    blora,
                    self.task.train,
                    collate=self.collate,
                    length=item_length,
                    validation=self.task.validation if best else None,
                    validate_every=max(1, settings["max_steps"] // 3),
                    num_steps=settings["max_steps"],
                    batch_size=settings["batch_size"],
                    learning_rates=settings["lora_lr"] if base == "lora" else None,
                    precision=settings["precision"],
                    seed=self.seed,
                )
            draws = settings["num_samples"] if made.num_samples is None else made.num_samples
            short = [name for name in shown if name.startswith("distilled:")]
            last = [name for name in shown if name not in (*best, *short)]
            for names in (last, short, best):
                predict = partial(blora.predict, num_samples=0 if names is short else draws)
                if names is short and names:
                    reading: Any = {"length": item_length, "precision": settings["precision"]}
                    blora.distill(self.task.train, self.collate, **reading)
                if names is best and fitted.best_state is not None:
                    blora.load_state_dict(fitted.best_state)
                if names:
                    yield from self._rows(names, predict, fitted, blora.trainable_parameters)
        finally:
            blora.unwrap()


def table(rows: Sequence[Row], title: str) -> Table:
    """Mean and standard deviation over seeds, a line for each method."""
    columns = {
        "ACC %": ("acc", 100, 1),
        "ECE %": ("ece", 100, 1),
        "NLL": ("nll", 1, 3),
        "Brier": ("brier", 1, 3),
        "train s": ("train_seconds", 1, 0),
    }
    view = Table(title=title)
    view.add_column("method", overflow="fold")
    for name in (*columns, "parameters"):
        view.add_column(name, justify="right")
    for method, own in _by_method(rows).items():
        cells = []
        for key, factor, digits in columns.values():
            values = [factor * getattr(row, key) for row in own]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        view.add_row(method, *cells, f"{own[0].trainable_parameters:,}")
    return view


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Draws the reliability diagram, which pools the predictions of all seeds."""
    pooled = {
        method: (torch.cat([row.probs for row in own]), torch.cat([row.labels for row in own]))
        for method, own in _by_method(rows).items()
    }
    save_figure(reliability_diagram(pooled), folder / DIAGRAM)


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return found


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("pyro-blora", "torch", "pyro-ppl", "gpytorch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write(rows: Sequence[Row], settings: Settings, folder: Path) -> None:
    """Writes ``results.json`` and the rows' predictions, each file whole or not at all.

    The methods and seeds of ``settings`` are written as those that have rows.
    """
    seeds = list(dict.fromkeys(row.seed for row in rows))
    made = {**settings, "methods": list(_by_method(rows)), "seeds": seeds}
    columns = [dict(vars(row)) for row in rows]
    tensors = {f"{k} {n}": row.pop(n).clone() for k, row in enumerate(columns) for n in _PREDICTED}
    document = {"rows": columns, "versions": versions(), "settings": made}
    text, data = json.dumps(document, indent=2) + "\n", save(tensors)
    # The predictions first, so that no row in results.json is without
    write_file(folder / PREDICTIONS, lambda path: path.write_bytes(data))
    write_file(folder / RESULTS, text)


def read(settings: Settings, folder: Path) -> list[Row]:
    """The rows that runs with the same settings, but for methods and seeds, left in ``folder``."""
    path = folder / RESULTS
    if not path.exists():
        return []
    with readable(path):
        document = json.loads(path.read_text(encoding="utf-8"))
        found = {**document["versions"], **document["settings"]}
    made = json.loads(json.dumps({**versions(), **settings}))
    keys = [key for key in made | found if key not in ("methods", "seeds")]
    differ = [key for key in keys if made.get(key) != found.get(key)]
    if differ:
        raise ConfigurationError(
            f"--out {folder} has a {RESULTS} made with another {', '.join(differ)}; name another "
            "folder, or add --overwrite."
        )
    tensors = read_tensors(folder / PREDICTIONS)[1]
    with readable(path):
        for k, row in enumerate(document["rows"]):
            row |= {name: tensors[f"{k} {name}"] for name in _PREDICTED}
        return [Row(**row) for row in document["rows"]]
