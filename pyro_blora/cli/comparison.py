"""Methods side by side on one task: the same data, budget, scoring and metrics for each."""

import json
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints.checkpoint import read_tensors
from pyro_blora.data import Item, Task, load_task
from pyro_blora.data.items import item_length
from pyro_blora.errors import ConfigurationError, readable
from pyro_blora.evaluation.metrics import Metrics, evaluate, fit_temperature
from pyro_blora.evaluation.plots import reliability_diagram, save_figure
from pyro_blora.files import write_file
from pyro_blora.inference import FitResult, fit
from pyro_blora.likelihoods import MultipleChoice
from pyro_blora.methods import BEST, get_method, trained_for
from pyro_blora.posterior.batches import Collate
from pyro_blora.posterior.prediction import Prediction

RESULTS = "results.json"
PREDICTIONS = "predictions.safetensors"
DIAGRAM = "reliability.png"
_PREDICTED = ("probs", "labels")  # the columns of this file

Settings = Mapping[str, Any]  # the options of ``pyro-blora compare``, as results.json has them
Phase = Callable[[str], AbstractContextManager[Any]]
Data = Mapping[str, tuple[Sequence[Item], Collate]]  # items by the name of their data set
State = Literal["last", "distilled", "best"]


@dataclass(frozen=True)
class View:
    """How a trained adapter predicts: after its last step, distilled there, or at its best step."""

    state: State = "last"
    num_samples: int | None = None
    linearized: bool | None = None


@dataclass
class Result:
    """The predictions of one view with their labels, and the metrics, by data set."""

    view: str
    predictions: dict[str, tuple[Prediction, Tensor]]
    metrics: dict[str, Metrics]
    passes: int
    fitted: FitResult
    parameters: int


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
    labels_beside_training: int
    passes: int
    train_seconds: float
    trainable_parameters: int
    probs: Tensor
    labels: Tensor


def train_and_score(
    blora: BayesianLoRA,
    task: Task,
    *,
    collate: Collate,
    views: Mapping[str, View],
    data: Data,
    num_steps: int,
    seed: int = 0,
    precision: str = "auto",
    phase: Phase = nullcontext,
    **training: Any,
) -> Iterator[Result]:
    """Trains an adapter under one seed on a task, then predicts and scores by each view.

    Args:
        blora: a new adapter; its network is given back at the end.
        task: its training items train, and its validation items choose the best step.
        collate: makes a batch of a list of these items.
        views: the views by name; equal views share their predictions.
        data: the data sets to predict by each view, with the collators of their tasks.
        num_steps: optimizer steps; 0 leaves the adapter as it is.
        seed: of the training, and of the draws for each data set.
        precision: of the training and the predictions, as in ``fit``.
        phase: makes a context, around each training or prediction, from a line that describes it.
        training: further options of ``fit``.
    """
    how: dict[str, Any] = {"length": item_length, "precision": precision}
    by_state = sorted(views, key=lambda name: get_args(State).index(views[name].state))
    fitted, found = FitResult(), {}
    try:
        if num_steps:
            if any(view.state == "best" for view in views.values()):
                training["validation"] = task.validation
            training |= {"collate": collate, "num_steps": num_steps, "seed": seed, **how}
            with phase(f"train {blora.method.name}, seed {seed}"):
                fitted = fit(blora, task.train, **training)
        for name in by_state:
            view, told = views[name], f"{name}, seed {seed}"
            if view not in found:
                if view.state == "distilled":
                    blora.distill(task.train, collate, **how)
                elif view.state == "best" and fitted.best_state is not None:
                    blora.load_state_dict(fitted.best_state)
                options = {"linearized": view.linearized, "description": told, **how}
                predictions = {}
                for key, (items, own) in data.items():
                    torch.manual_seed(seed)
                    with phase(f"predict {told}"):
                        predictions[key] = blora.predict_dataset(
                            items, own, view.num_samples, **options
                        )
                metrics = {
                    key: evaluate(p.probs, labels) for key, (p, labels) in predictions.items()
                }
                linear = blora.method.linearized if view.linearized is None else view.linearized
                first, _ = next(iter(predictions.values()))
                passes = first.num_samples
                if linear and view.num_samples:  # a forward, and a backward for each other class
                    passes = first.probs.shape[-1]
                found[view] = predictions, metrics, passes
            yield Result(name, *found[view], fitted, blora.trainable_parameters)
    finally:
        blora.unwrap()


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
    limits = ("data_dir", "max_train", "max_validation", "max_test")
    for seed in settings["seeds"]:
        task = load_task(settings["task"], seed=seed, **{name: settings[name] for name in limits})
        collate = task.collator(tokenizer)
        # rows by the method that is trained for them, and whether an eighth is held out
        shown: dict[tuple[str, bool], list[str]] = {}
        for name in dict.fromkeys(settings["methods"]):
            if (name, seed) not in done:
                training = trained_for(name), name.startswith("split:")
                shown.setdefault(training, []).append(name)
        for (base, split), names in shown.items():
            made, data = get_method(base), {"test": (task.test, collate)}
            if any(name.startswith("temperature") for name in names):
                data["validation"] = (task.validation, collate)
            draws = settings["num_samples"] if made.num_samples is None else made.num_samples
            made = replace(made, num_samples=draws)  # by which ``fit`` calibrates, too
            torch.manual_seed(seed)
            blora = BayesianLoRA(
                net,
                method=made,
                rank=settings["rank"],
                target_modules=settings["target_modules"],
                likelihood=task.likelihood(collate),
            )
            for result in train_and_score(
                blora,
                task,
                collate=collate,
                views={name: _view(name, draws) for name in names},
                data=data,
                num_steps=settings["max_steps"],
                seed=seed,
                precision=settings["precision"],
                phase=phase,
                validate_every=max(1, settings["max_steps"] // 3),
                batch_size=settings["batch_size"],
                learning_rates=settings["lora_lr"] if base == "lora" else None,
                held_out=MultipleChoice.held_out if split else None,
            ):
                yield _row(result, seed, len(task.validation))


def _view(name: str, draws: int) -> View:
    if name.startswith("distilled:"):
        return View("distilled", 0)
    return View("best" if name.endswith(BEST) else "last", draws)


def _row(result: Result, seed: int, num_validation: int) -> Row:
    """The row of a view, whose test predictions have a temperature if its name says so."""
    beside = result.view.startswith("temperature") or result.view.endswith(BEST)
    (prediction, labels), scores = result.predictions["test"], result.metrics["test"]
    probs, numbers = prediction.probs, result.parameters
    if result.view.startswith("temperature"):
        held, held_labels = result.predictions["validation"]
        temperature = fit_temperature(held.probs.log(), held_labels)
        probs, numbers = (probs.log() / temperature).softmax(-1), numbers + 1
        scores = evaluate(probs, labels)
    s = (scores.acc, scores.ece, scores.nll, scores.brier, scores.n)
    used = num_validation if beside else 0
    return Row(
        result.view, seed, *s, used, result.passes, result.fitted.seconds, numbers, probs, labels
    )


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
    for name in (*columns, "labels beside training", "passes", "parameters"):
        view.add_column(name, justify="right")
    for method, own in _by_method(rows).items():
        cells = []
        for key, factor, digits in columns.values():
            values = [factor * getattr(row, key) for row in own]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        first = own[0]
        counts = (first.labels_beside_training, first.passes, first.trainable_parameters)
        view.add_row(method, *cells, *(f"{count:,}" for count in counts))
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
    # The predictions come first, so that every row in results.json has its predictions
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
