"""Methods side by side on one task: the same data, budget, scoring and metrics for each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_blora.baselines import PlainLoRA
from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.data import Item, Task, load_task
from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.inference import FitResult, LoopOptions, fit, predict_dataset
from pyro_blora.likelihoods import Batch, LabelTokens, Likelihood, MultipleChoice
from pyro_blora.metrics import evaluate
from pyro_blora.prediction import Prediction
from pyro_blora.recipes import RECIPES, recipe
from pyro_blora.results import Row
from pyro_blora.temperature import fit_temperature

__all__ = ["METHODS", "Settings", "compare", "item_length", "likelihood_for"]

METHODS = ("lora", "lora-best", "temperature", *RECIPES)
# Plain LoRA's usual learning rates: options are scored by their log-likelihood, labels by a token.
LORA_RATES = {"options": 1e-3, "labels": 5e-4}


@dataclass(frozen=True)
class Settings:
    """What a comparison is made with; ``results.json`` has it as it is.

    Attributes:
        model: the network's name.
        task: the data set's name.
        data_dir: folder of data sets, or ``None``.
        methods: names in ``METHODS``.
        seeds: one run of every method for each; a seed sets the training subset, the order of the
            batches and all draws.
        max_steps: optimizer steps.
        batch_size: examples in a step.
        max_train: training examples.
        max_validation: validation examples, held out of the training file.
        max_test: test examples; ``None`` takes the whole file.
        rank: of the update.
        target_modules: suffixes of the adapted layers.
        num_samples: posterior draws for a prediction.
        lora_lr: plain LoRA's learning rate; ``None`` takes its usual one for the way of scoring.
        precision: ``"float32"`` or ``"bfloat16"``, for every method.
    """

    model: str = "smollm2"
    task: str = "facts"
    data_dir: str | None = None
    methods: tuple[str, ...] = ("lora", "lora-best", "temperature", "bayesian-lora")
    seeds: tuple[int, ...] = (0,)
    max_steps: int = 300
    batch_size: int = 8
    max_train: int | None = 400
    max_validation: int = 200
    max_test: int | None = None
    rank: int = 8
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    num_samples: int = 10
    lora_lr: float | None = None
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ConfigurationError(
                    f"method {method!r} is unknown; {near_miss(method, METHODS)}"
                )
        if not self.methods or not self.seeds:
            raise ConfigurationError("give at least one method and one seed.")


def item_length(item: Item) -> int:
    """Characters of an item, by which batches of like lengths are made."""
    return len(item.question) + sum(map(len, item.choices))


def likelihood_for(task: Task, collate: Any) -> Likelihood:
    """The likelihood that a task's template asks for."""
    count = len(task.train) or None
    if task.template.scoring == "labels":
        return LabelTokens(token_ids=collate.token_ids, num_data=count)
    return MultipleChoice(num_data=count)


class _Run:
    """All methods under one seed."""

    def __init__(
        self, settings: Settings, net: nn.Module, tokenizer: Any, seed: int, progress: bool | None
    ) -> None:
        self.settings, self.net, self.seed, self.progress = settings, net, seed, progress
        self.task = load_task(
            settings.task,
            data_dir=settings.data_dir,
            max_train=settings.max_train,
            max_validation=settings.max_validation,
            max_test=settings.max_test,
            seed=seed,
        )
        if not self.task.train or not self.task.validation:
            raise ConfigurationError(
                f"task {settings.task!r} has {len(self.task.train)} training and "
                f"{len(self.task.validation)} validation items; choose a task with a train split."
            )
        self.collate = self.task.collator(tokenizer)
        self.likelihood = likelihood_for(self.task, self.collate)
        self.options = LoopOptions(
            num_steps=settings.max_steps,
            batch_size=settings.batch_size,
            precision=settings.precision,
            validate_every=max(1, settings.max_steps // 3),
            seed=seed,
            progress=progress,
        )

    def rows(self) -> Iterator[Row]:
        wanted = set(self.settings.methods)
        if wanted & {"lora", "lora-best", "temperature"}:
            yield from self._plain(wanted)
        for method in self.settings.methods:
            if method in RECIPES:
                yield self._bayesian(method)

    def _predict(
        self, predict: Callable[[Batch], Prediction], data: Sequence[Item], name: str
    ) -> tuple[Tensor, Tensor]:
        torch.manual_seed(self.seed)
        prediction, labels = predict_dataset(
            predict,
            data,
            self.collate,
            length=item_length,
            device=next(self.net.parameters()).device,
            precision=self.settings.precision,
            progress=self.progress,
            description=f"{name}, seed {self.seed}",
        )
        return prediction.probs, labels

    def _row(self, method: str, probs: Tensor, labels: Tensor, fitted: FitResult, n: int) -> Row:
        scores = evaluate(probs, labels)
        return Row(
            method,
            self.seed,
            scores.acc,
            scores.ece,
            scores.nll,
            scores.brier,
            scores.n,
            fitted.seconds,
            n,
            probs,
            labels,
        )

    def _plain(self, wanted: set[str]) -> Iterator[Row]:
        settings, task = self.settings, self.task
        torch.manual_seed(self.seed)
        lora = PlainLoRA(self.net, settings.target_modules, self.likelihood, rank=settings.rank)
        try:
            fitted = lora.fit(
                task.train,
                self.collate,
                self.options,
                lr=settings.lora_lr or LORA_RATES[task.template.scoring],
                length=item_length,
                validation=task.validation,
            )
            count = lora.trainable_parameters
            if wanted & {"lora", "temperature"}:
                probs, labels = self._predict(lora.predict, task.test, "lora")
            if "lora" in wanted:
                yield self._row("lora", probs, labels, fitted, count)
            if "temperature" in wanted:
                held, held_labels = self._predict(lora.predict, task.validation, "temperature")
                scale = fit_temperature(held.log(), held_labels)
                scaled = (probs.log() / scale).softmax(-1)
                yield self._row("temperature", scaled, labels, fitted, count + 1)
            if "lora-best" in wanted:
                assert fitted.best_state is not None
                lora.load_state_dict(fitted.best_state)
                probs, labels = self._predict(lora.predict, task.test, "lora-best")
                yield self._row("lora-best", probs, labels, fitted, count)
        finally:
            lora.unload()

    def _bayesian(self, method: str) -> Row:
        settings, task = self.settings, self.task
        pyro.clear_param_store()  # the store would hand this run the tensors of the last
        torch.manual_seed(self.seed)
        prior, guide = recipe(method, rank=settings.rank)
        blora = BayesianLoRA(
            self.net,
            target_modules=settings.target_modules,
            prior=prior,
            guide=guide,
            likelihood=self.likelihood,
        )
        try:
            fitted = fit(
                blora,
                task.train,
                collate=self.collate,
                length=item_length,
                num_steps=settings.max_steps,
                batch_size=settings.batch_size,
                precision=settings.precision,
                seed=self.seed,
                progress=self.progress,
            )
            samples = settings.num_samples if method != "map" else 0
            probs, labels = self._predict(
                lambda batch: blora.predict(batch, samples), task.test, method
            )
            return self._row(method, probs, labels, fitted, blora.trainable_parameters)
        finally:
            blora.unwrap()


def compare(
    settings: Settings, net: nn.Module, tokenizer: Any, *, progress: bool | None = None
) -> Iterator[Row]:
    """Trains and evaluates every method under every seed.

    Args:
        settings: what to compare and how.
        net: the network; as it was when the iteration ends.
        tokenizer: its tokenizer.
        progress: whether to show progress bars; ``None`` shows them on a terminal.

    Yields:
        A row as soon as it is there.

    Raises:
        ConfigurationError: the task has no training items.
        DataError: the data cannot be read.
    """
    for seed in settings.seeds:
        yield from _Run(settings, net, tokenizer, seed, progress).rows()
