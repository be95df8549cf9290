"""Methods side by side on one task: the same data, budget, scoring and metrics for each."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.data import Item, Task, load_task
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.metrics import evaluate
from pyro_blora.evaluation.results import Row
from pyro_blora.evaluation.temperature import fit_temperature
from pyro_blora.inference import FitResult, fit
from pyro_blora.likelihoods import Batch, LabelTokens, Likelihood, MultipleChoice
from pyro_blora.methods import BEST, check_method, get_method, trained_for
from pyro_blora.network.precision import choose_precision
from pyro_blora.posterior.prediction import Prediction, predict_dataset

__all__ = ["Settings", "compare", "item_length", "likelihood_for"]

Phase = Callable[[str], AbstractContextManager[Any]]
Predict = Callable[[Batch], Prediction]


@dataclass(frozen=True)
class Settings:
    """What a comparison is made with: the options of ``pyro-blora compare``, which explains them.

    A seed sets the training subset, the order of the batches and all draws. The precision
    ``"auto"`` becomes, at once, what is faster here: a record of the settings tells what was used.
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
    rank: int | None = None  # a method's own
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    num_samples: int = 10
    lora_lr: float | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        for method in self.methods:
            check_method(method)
        object.__setattr__(self, "precision", choose_precision(self.precision))


def item_length(item: Item) -> int:
    """Characters of an item, by which batches of like lengths are made."""
    return len(item.question) + sum(map(len, item.choices))


def likelihood_for(
    task: Task, collate: Any, scale: Literal["learned", "fixed"] = "learned"
) -> Likelihood:
    """The likelihood that a task's template asks for.

    Args:
        task: the task.
        collate: its collator.
        scale: that of an option's score, as of ``MultipleChoice``. Default: learned.
    """
    count = len(task.train) or None
    if task.template.scoring == "labels":
        return LabelTokens(token_ids=collate.token_ids, num_data=count)
    return MultipleChoice(num_data=count, scale=scale)


class _Run:
    """All methods under one seed."""

    def __init__(
        self, settings: Settings, net: nn.Module, tokenizer: Any, seed: int, phase: Phase
    ) -> None:
        self.settings, self.net, self.seed, self.phase = settings, net, seed, phase
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

    def rows(self, done: Collection[tuple[str, int]]) -> Iterator[Row]:
        shown: dict[str, list[str]] = {}  # the trained method, and as what it is shown
        for method in dict.fromkeys(self.settings.methods):
            if (method, self.seed) not in done:
                shown.setdefault(trained_for(method), []).append(method)
        for base, names in shown.items():
            yield from self._trained(base, names)

    def _predict(self, predict: Predict, data: Sequence[Item], name: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(self.seed)
        with self.phase(f"predict {name}, seed {self.seed}"):
            prediction, labels = predict_dataset(
                predict,
                data,
                self.collate,
                length=item_length,
                device=next(self.net.parameters()).device,
                precision=self.settings.precision,
                description=f"{name}, seed {self.seed}",
            )
        return prediction.probs, labels

    def _rows(
        self, shown: Sequence[str], predict: Predict, fitted: FitResult, count: int
    ) -> Iterator[Row]:
        """The rows of one trained method: as it is, or with its temperature, as they are asked."""
        plain, labels = self._predict(predict, self.task.test, shown[0])
        for name in shown:
            probs, numbers = plain, count
            if name.startswith("temperature"):
                held, held_labels = self._predict(predict, self.task.validation, name)
                scale = fit_temperature(held.log(), held_labels)
                probs, numbers = (plain.log() / scale).softmax(-1), count + 1
            s = evaluate(probs, labels)
            scores = (s.acc, s.ece, s.nll, s.brier, s.n)
            yield Row(name, self.seed, *scores, fitted.seconds, numbers, probs, labels)

    def _trained(self, base: str, shown: Sequence[str]) -> Iterator[Row]:
        """A prior beside a guide at its last step; then, if asked, at its best validation step."""
        settings, made = self.settings, get_method(base)
        best = [name for name in shown if name.endswith(BEST)]
        torch.manual_seed(self.seed)
        blora = BayesianLoRA(
            self.net,
            method=made,
            rank=settings.rank,
            target_modules=settings.target_modules,
            likelihood=likelihood_for(self.task, self.collate, made.scale),
        )
        try:
            with self.phase(f"train {base}, seed {self.seed}"):
                fitted = fit(
                    blora,
                    self.task.train,
                    collate=self.collate,
                    length=item_length,
                    validation=self.task.validation if best else None,
                    validate_every=max(1, settings.max_steps // 3),
                    num_steps=settings.max_steps,
                    batch_size=settings.batch_size,
                    learning_rates=settings.lora_lr if base == "lora" else None,
                    precision=settings.precision,
                    seed=self.seed,
                )
            draws = settings.num_samples if made.num_samples is None else made.num_samples
            predict = partial(blora.predict, num_samples=draws)
            for names in ([name for name in shown if name not in best], best):
                if names is best and fitted.best_state is not None:
                    blora.load_state_dict(fitted.best_state)
                if names:
                    yield from self._rows(names, predict, fitted, blora.trainable_parameters)
        finally:
            blora.unwrap()


def compare(
    settings: Settings,
    net: nn.Module,
    tokenizer: Any,
    *,
    done: Collection[tuple[str, int]] = (),
    phase: Phase = nullcontext,
) -> Iterator[Row]:
    """Trains and evaluates every method under every seed.

    Args:
        settings: what to compare and how.
        net: the network; as it was when the iteration ends.
        tokenizer: its tokenizer.
        done: methods with a seed, whose rows are there already.
        phase: makes a context of the name of what runs in it, such as ``"train lora, seed 0"``.

    Yields:
        A row as soon as it is there.

    Raises:
        ConfigurationError: the task has no training items.
        DataError: the data cannot be read.
    """
    for seed in settings.seeds:
        yield from _Run(settings, net, tokenizer, seed, phase).rows(done)
