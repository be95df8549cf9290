"""One cell of the calibration benchmark: one method trained on one task, and all it predicts."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import pyro_blora.guides as guides
import pyro_blora.models as models
from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import Item, Task, load_task
from pyro_blora.evaluation.comparison import item_length, likelihood_for
from pyro_blora.evaluation.plain_lora import PlainLoRA
from pyro_blora.inference import FitOptions, LoopOptions
from pyro_blora.inference.training_state import settings_of
from pyro_blora.likelihoods import Batch
from pyro_blora.network.frozen_prefix import FrozenPrefix, kept
from pyro_blora.posterior.predict_dataset import predict_dataset
from pyro_blora.posterior.prediction import Prediction

__all__ = ["Cell", "Outcome", "outcomes"]

Settings = dict[str, Any]


@dataclass(frozen=True, order=True)
class Cell:
    """What one line of the results is of."""

    task: str
    method: str
    steps: int
    seed: int
    max_train: int | None

    def __str__(self) -> str:
        data = "all" if self.max_train is None else self.max_train
        return f"{self.task}-{data}-{self.steps}-{self.method}-{self.seed}"


@dataclass
class Outcome:
    """What a cell predicts, by data set: ``N x K`` probabilities, labels, epistemic scores."""

    cell: Cell
    parameters: int
    seconds: float
    made: dict[str, Any] = field(default_factory=dict)  # all options of what was trained
    probs: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    epistemic: dict[str, Tensor] = field(default_factory=dict)  # mutual information, nats


@dataclass
class _Data:
    """The items of a cell: the same for every method."""

    task: Task
    likelihood: Any
    collate: Any
    sets: dict[str, tuple[Sequence[Item], Any]]  # with the collator of the task they are of
    prefixes: dict[str, FrozenPrefix]  # what the frozen blocks put out for them

    @classmethod
    def load(cls, cell: Cell, settings: Settings, net: nn.Module, tokenizer: Any) -> "_Data":
        def task_of(name: str) -> Task:
            return load_task(
                name,
                data_dir=settings["data_dir"],
                max_train=cell.max_train,
                max_validation=settings["max_validation"],
                seed=cell.seed,
            )

        def chosen(task: Task) -> Sequence[Item]:
            """The same items in every cell, by no seed of the training."""
            items = list(task.test)
            random.Random(0).shuffle(items)
            return items[: settings["max_test"]]

        task = task_of(cell.task)
        collate = task.collator(tokenizer)
        sets: dict[str, tuple[Sequence[Item], Any]] = {"validation": (task.validation, collate)}
        if not settings["tune"]:
            sets["test"] = (chosen(task), collate)
            for name in settings["out_of_distribution"].get(cell.task, []):
                other = task_of(name)
                items = chosen(other)[: settings["max_out_of_distribution"]]
                sets[name] = (items, other.collator(tokenizer))
        method = settings["methods"][cell.method]
        base = settings["methods"][method.get("of", cell.method)]
        likelihood = likelihood_for(task, collate, base.get("scale", "fixed"))
        return cls(task, likelihood, collate, sets, _prefixes_of(net, cell.task, cell.seed))


@lru_cache(maxsize=1)
def _prefixes_of(net: nn.Module, task: str, seed: int) -> dict[str, FrozenPrefix]:
    """Kept from one method to the next: they are most of the time of a prediction."""
    return {}


def outcomes(
    cells: Sequence[Cell], settings: Settings, net: nn.Module, tokenizer: Any
) -> Iterator[Outcome]:
    """The outcomes of cells that share one training: a method, and what is ``of`` it.

    Args:
        cells: of one task, seed and number of steps.
        settings: those of the file, with ``data_dir`` and ``tune``.
        net: the network, as it was when the iteration ends.
        tokenizer: its tokenizer.
    """
    methods = settings["methods"]
    name = methods[cells[0].method].get("of", cells[0].method)
    method, data = methods[name], _Data.load(cells[0], settings, net, tokenizer)
    torch.manual_seed(cells[0].seed)
    train = _dropout if "dropout" in method else _pair
    for state, found in train(cells[0], method, settings, data, net):
        for cell in cells:
            if methods[cell.method].get("state", "last") == state:
                yield found(cell)


def _predicted(
    cell: Cell,
    data: _Data,
    net: nn.Module,
    predict: Callable[[Batch], Prediction],
    blocks: Sequence[nn.Module] = (),
    **figures: Any,
) -> Outcome:
    outcome = Outcome(cell, **figures)
    for name, (items, collate) in data.sets.items():
        prefix = data.prefixes.setdefault(name, FrozenPrefix(net, blocks)) if blocks else None

        def skipping(batch: Batch, prefix: FrozenPrefix | None = prefix) -> Prediction:
            """Batches are the same for every method, so that their rows are known by the tokens."""
            with kept(prefix, [ids.numpy().tobytes() for ids in batch["input_ids"].cpu()], batch):
                return predict(batch)

        torch.manual_seed(cell.seed)
        prediction, labels = predict_dataset(
            skipping,
            items,
            collate,
            length=item_length,
            device=next(net.parameters()).device,
            description=f"{cell}: {name}",
        )
        outcome.probs[name], outcome.labels[name] = prediction.probs, labels
        outcome.epistemic[name] = prediction.mutual_information
    return outcome


States = Iterator[tuple[str, Callable[[Cell], Outcome]]]


def _blocks(settings: Settings, net: nn.Module) -> list[int] | None:
    depth = int(net.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    return list(range(depth - settings["blocks"], depth)) if settings["blocks"] else None


def _pair(cell: Cell, method: Settings, settings: Settings, data: _Data, net: nn.Module) -> States:
    """A prior beside a guide, ``fit`` to the last step."""
    made = {
        kind: getattr(package, next(iter(spec)))(**{**rank, **next(iter(spec.values()))})
        for kind, package, rank in (
            ("prior", models, {"rank": settings["rank"]}),
            ("guide", guides, {}),
        )
        for spec in [method.get(kind, _NOTHING[kind])]
    }
    blora = BayesianLoRA(
        net,
        target_modules=settings["target_modules"],
        layers_to_transform=_blocks(settings, net),
        likelihood=data.likelihood,
        **made,
    )
    draws = method.get("num_samples", settings["num_samples"])
    steps, seconds = cell.steps * method.get("passes", 1), 0.0
    average = _Average(blora, steps)
    options: Settings = {
        "batch_size": settings["batch_size"],
        "validate_every": settings["best_every"],
        "cache_frozen_prefix": bool(settings["blocks"]),
        "seed": cell.seed,
        **method.get("fit", {}),
    }
    made = settings_of(blora, vars(FitOptions(steps, **options)))
    made = {name: value for name, value in made.items() if not name.startswith("layer ")}

    def found(cell: Cell) -> Outcome:
        own = settings["methods"][cell.method].get("num_samples", draws)
        return _predicted(
            cell,
            data,
            net,
            lambda batch: blora.predict(batch, own, linearised=method.get("linearised", False)),
            blora.model.skippable_blocks(),
            parameters=blora.trainable_parameters,
            seconds=seconds,
            made=made,
        )

    try:
        if "prior" in method:
            started = time.perf_counter()
            result = fit(
                blora,
                data.task.train,
                collate=data.collate,
                length=item_length,
                num_steps=steps,
                validation=data.task.validation if draws == 0 else None,
                callback=average,
                **options,
            )
            seconds = time.perf_counter() - started
        yield "last", found
        if "prior" in method and draws == 0:
            assert result.best_state is not None
            blora.load_state_dict(result.best_state)
            yield "best", found
            blora.load_state_dict(average.state)
            yield "average", found
    finally:
        blora.unwrap()


_NOTHING: dict[str, Settings] = {  # the network itself: an update of zero
    "prior": {"GaussianFactors": {"random": "both"}},
    "guide": {"Delta": {}},
}


class _Average:
    """The mean of the parameters over the last quarter of the steps (SWA)."""

    def __init__(self, blora: BayesianLoRA, steps: int) -> None:
        self.blora, self.first, self.count = blora, steps - steps // 4, 0
        self.state: dict[str, Tensor] = {}

    def __call__(self, done: int) -> None:
        if done <= self.first:
            return
        self.count += 1
        for name, value in self.blora.state_dict().items():
            if not value.is_floating_point() or name not in self.state:
                self.state[name] = value.detach().clone()
            else:
                self.state[name] += (value.detach() - self.state[name]) / self.count


def _dropout(
    cell: Cell, method: Settings, settings: Settings, data: _Data, net: nn.Module
) -> States:
    """PEFT's LoRA, its dropout left on in prediction."""
    rank = settings["rank"]
    lora = PlainLoRA(
        net,
        settings["target_modules"],
        data.likelihood,
        rank=rank,
        dropout=method["dropout"],
        layers_to_transform=_blocks(settings, net),
    )
    try:
        options = LoopOptions(
            num_steps=cell.steps, batch_size=settings["batch_size"], seed=cell.seed
        )
        result = lora.fit(
            data.task.train,
            data.collate,
            options,
            lr=method.get("lr", 1e-3),
            length=item_length,
        )

        def found(cell: Cell) -> Outcome:
            return _predicted(
                cell,
                data,
                net,
                lambda batch: lora.predict(batch, settings["num_samples"]),
                parameters=lora.trainable_parameters,
                seconds=result.seconds,
            )

        yield "last", found
    finally:
        lora.unload()
