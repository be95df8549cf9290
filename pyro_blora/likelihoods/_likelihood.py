"""The base class of likelihoods."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from transformers import DataCollatorWithPadding
from typing_extensions import Self

from pyro_blora.errors import BatchError, ConfigurationError, check_count
from pyro_blora.labels import (
    FINITE,
    Kind,
    check_choices,
    check_numbers,
    check_places,
    checked_labels,
    classes_of,
    has_places,
)
from pyro_blora.likelihoods._prompts import NumberCollator, PromptCollator, is_from
from pyro_blora.likelihoods.reading import in_single_precision
from pyro_blora.network.targets import kind_of_head
from pyro_blora.options import Options
from pyro_blora.prediction import Prediction
from pyro_blora.scores import Metrics, evaluate, evaluate_numbers

Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Mapping[str, Any]]


class Prepared(dict[str, Any]):
    """A checked batch on the model's device, with what its likelihood computes of it once."""

    examples: int


class Likelihood(Options, PyroModule):
    """p(labels | network, batch).

    A subclass defines :meth:`logits` and, if the labels are not one class per example,
    :meth:`distribution` and :meth:`check_labels`. ``pyro.plate("data", num_data, ...)`` scales the
    log-likelihood of a batch to the data set. If it reads rows of text, it defines
    :meth:`collator`, and :meth:`read` to refuse a row before the first step; ``new_head`` says
    that the network's head is trained, too. A file in ``pyro_blora.likelihoods`` is named in
    ``__init__.py``, by which saved adapters find its class.

    A subclass may create parameters, each a :class:`pyro.nn.PyroParam`, in its constructor; its
    ``roles`` give their learning rates, as in a prior. They are trained and saved with the adapter.
    :meth:`distribution` must not read them, because predictions outlive a training: they enter
    through the logits.

    Like a prior and a guide, a likelihood is a template: :class:`~pyro_blora.BayesianLoRA` copies
    it, and ``blora.likelihood`` is the copy that is trained.

    Args:
        num_data: number of examples in the training set, ``N``. Without it each batch counts as
            the whole data set, with a warning, because the KL weighs ``N / B`` times too much.
    """

    keys: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")  # which a batch must have
    row_dims: ClassVar[int] = 2  # dimensions of input_ids: B x T, or 3 for several rows an example
    # what the network's head may give, of pyro_blora.network.targets, the usual first; or anything
    heads: ClassVar[tuple[str, ...]] = ()
    new_head: ClassVar[bool] = False  # whether the network's heads are trained, too, by default
    roles: ClassVar[dict[str, str]] = {}
    learning_rates: ClassVar[dict[str, float]] = {}  # by role, those that differ from the prior's
    held_out: ClassVar[float] = 0.0  # the share of the examples that ``fit`` calibrates with
    padding: ClassVar[type] = DataCollatorWithPadding  # of rows of token ids
    usual_collator: ClassVar[type[Any] | None] = None  # of rows of text
    unit_options: ClassVar[tuple[str, ...]] = ()  # those that give the unit of the labels
    task_type: ClassVar[str | None] = None  # the one for which PEFT trains a new head, too
    labels_count: ClassVar[bool] = False  # whether labels are quantities, and no names of places
    predicts: ClassVar[bool] = True  # whether each example has a prediction; text has none
    data_names: Sequence[str] = ()  # of the numbers that are labels, in the training's data set
    by_numbers: bool = False  # whether a loop of the user's, or a loaded state, made the outputs
    trained_head: Tensor  # whether the head is that of a LoRA, trained before; saved with the rest

    def __init__(self, *, num_data: int | None = None) -> None:
        super().__init__()
        self.fast = True
        self.register_buffer("trained_head", torch.tensor(False))
        if num_data is not None:
            check_count("num_data", num_data)

    def bind(self, device: torch.device, *, fast: bool = True) -> Self:
        """A copy on ``device`` with the same parameter values; ``fast`` is as in the adapter."""
        bound = type(self)(**copy.deepcopy(self.options()))
        bound.fast = fast
        bound.load_state_dict(self.state_dict())
        bound.trained_head.fill_(False)  # which is of a network; a template may serve another
        return bound.to(device)

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError if ``net`` is of an unsuitable kind, such as in its head."""
        if self.heads and (kind := kind_of_head(net)) not in self.heads:
            config = getattr(net, "config", None)
            problem, count = (getattr(config, n, None) for n in ("problem_type", "num_labels"))
            raise ConfigurationError(
                f"{type(net).__name__} must have a head for {' or '.join(self.heads)}, got one for "
                f"{kind}, problem_type={problem!r} and num_labels={count}; load it with another "
                "class of transformers or other num_labels=, or pass another likelihood=."
            )

    @property
    def label_kind(self) -> Kind:
        """What the label of a row of text must be; finite numbers by default."""
        return FINITE

    @property
    def has_classes(self) -> bool:
        """Whether each example has one class as its label."""
        return type(self).distribution is Likelihood.distribution

    @property
    def is_categorical(self) -> bool:
        """Whether the logits' softmax gives probabilities of classes, one or more an example."""
        return self.has_classes

    def output_names(self, rows: Any) -> Sequence[str]:
        """The names of the outputs that a new head must have for these rows; one by default."""
        return ("LABEL_0",)

    def collator(self, tokenizer: Any, row: Any) -> Collate:
        """The default collator of rows of text such as ``row``, which a subclass may define."""
        if self.usual_collator is not None:
            collate: Collate = self.usual_collator(tokenizer)
            return collate
        columns = ", ".join(map(str, row if isinstance(row, Mapping) else vars(row)))
        raise ConfigurationError(
            f"{type(self).__name__} must be given collate= for rows of {columns}, such as "
            "LabelTokensCollator(tokenizer, template) from pyro_blora.likelihoods."
        )

    def read(
        self, rows: Any, collate: Collate | None, net: nn.Module, *, labeled: bool, training: bool
    ) -> Collate | None:
        """Checks all rows before any is used, and returns the collator, perhaps another one.

        If they are ``labeled``, rows must have labels; otherwise all or none have. A ``training``
        may name the classes. A subclass checks the rows of its own collator, which are a sequence
        of dictionaries or items, and raises DataError with the number of the row.
        """
        if is_from(collate, "pyro_blora."):  # a user's subclass may read other columns
            if isinstance(collate, PromptCollator):
                collate.check(rows, labeled)
                check_choices(rows)
            elif isinstance(collate, NumberCollator):
                checked_labels(rows, labeled, self.label_kind, "text")
        self._examine(rows, collate, training)
        return collate

    def check_loader(
        self, rows: Any, collate: Collate | None, net: nn.Module, *, training: bool
    ) -> None:
        """Checks the data set and the collator of a loader, whose rows are not read beforehand."""
        if isinstance(collate, PromptCollator) and has_places(rows):
            check_choices(rows)
        self._examine(rows, collate, training)

    def _examine(self, rows: Any, collate: Collate | None, training: bool) -> None:
        """Refuses numbers whose names are other numbers or in another order, also of a loader."""
        ours = is_from(collate, "pyro_blora.", "transformers.", "torch.")  # others read labels
        # the choices of a prompt say what the labels number, whatever names these have
        if not ours or isinstance(collate, PromptCollator):
            return
        names = classes_of(rows)
        if self.labels_count:
            check_numbers(names)
        if "data_names" in self.options():
            self.check_names(names or getattr(collate, "classes", ()), training)

    def check_names(self, names: Sequence[str], training: bool) -> None:
        """Refuses names of numbers in another order than in training, which keeps them."""
        check_places(names, self.data_names)
        if training:
            self.data_names = self.data_names or tuple(names)

    def keep_head(self, net: nn.Module) -> None:
        """Says that the network's head was trained before and stays as it is."""
        self.trained_head.fill_(True)

    def settle_classes(self, net: nn.Module) -> None:
        """Fixes the classes when a training begins; by default does nothing."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The network's keyword arguments for a batch."""
        return {key: batch[key] for key in (*self.keys, "position_ids") if key in batch}

    def prepare(self, batch: Batch) -> Prepared:
        """The batch, checked; a subclass may add what logits and labels need, computed once."""
        prepared = Prepared(batch)
        prepared.examples = self.examples(batch)
        return prepared

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """Unnormalized log-probabilities of the classes, ``(B, ..., C)``.

        ``net(**self.inputs(batch))`` runs the network; of rows that are padded on the left it
        needs :func:`~pyro_blora.likelihoods.reading.positions_of`, too.
        """
        raise NotImplementedError(f"{type(self).__name__} must define logits(net, batch).")

    def labels(self, batch: Batch) -> Tensor | None:
        """The observed labels, ``(B, ...)``, or ``None`` if the batch has none."""
        return batch.get("labels")

    def distribution(self, logits: Tensor, labels: Tensor | None) -> TorchDistribution:
        """The distribution of the labels given the logits."""
        return pyro.distributions.Categorical(logits=logits)

    def predictive(self, logits: Tensor) -> Prediction:
        """The prediction from the logits under each draw, ``(S, B, ...)``."""
        if self.is_categorical:
            return Prediction(logits.softmax(-1))
        now = copy.copy(self)  # with the unit of the labels, which a training may change
        return Prediction(logits, partial(now.distribution, labels=None))

    def scores(self, logits: Tensor) -> Tensor:
        """What transformers' ``compute_metrics`` is given, from the logits ``(S, B, ...)``."""
        if not self.is_categorical:
            return self.predictive(logits).mean
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))

    def tempered(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """The logits at a temperature, which :meth:`BayesianLoRA.calibrate` fits to labels.

        A likelihood without classes has none unless it defines this.
        """
        return logits / temperature

    @property
    def has_temperature(self) -> bool:
        """Whether there are predictions, and it is known what a temperature does to them."""
        known = self.is_categorical or type(self).tempered is not Likelihood.tempered
        return self.predicts and known

    def unit(self, temperature: float) -> tuple[float, float]:
        """The scale and the shift that an exported head applies to the network's output.

        Where a subclass defines :meth:`tempered`, the head stays as it is by default, and whoever
        reads the export applies the temperature in ``one_pass.json``.
        """
        divides = type(self).tempered is Likelihood.tempered
        return 1 / temperature if divides else 1.0, 0.0

    def numbers(self, *, folded: bool) -> dict[str, Any]:
        """What an export says of its outputs beside the temperature, such as the classes.

        ``folded`` says that the exported head applies :meth:`unit`.
        """
        skipped = {"num_data", "pack"}
        numbers = {n: v for n, v in self.options().items() if n not in skipped and v}
        learned = {n.removesuffix("_unconstrained") for n, _ in self.named_parameters()}
        return numbers | {name: getattr(self, name).tolist() for name in sorted(learned)}

    def metrics(self, prediction: Prediction, labels: Tensor) -> Metrics:
        """The scores of a prediction."""
        if prediction.family is not None:
            return evaluate_numbers(prediction, labels)
        return evaluate(prediction.probs, labels)

    def num_scored(self, labels: Tensor) -> Tensor:
        """The number of labels that each example has, ``(B,)``; one unless they are tokens."""
        return labels.new_ones(len(labels), dtype=torch.long)

    def observe(self, net: nn.Module, batch: Batch, particles: torch.Size, num_data: int) -> None:
        """Observes the labels at the site ``"labels"`` under the data plate.

        ``batch`` has the rows of all particles in order; ``num_data`` is used if ``N`` is missing.
        """
        labels = self.labels(batch)  # before the network runs, because it may synchronize a device
        logits = in_single_precision(self.logits(net, batch))
        share = logits.shape[0] // max(particles.numel(), 1)
        if labels is not None:
            self.check_labels(labels, logits)
            labels = labels.reshape(*particles, share, *labels.shape[1:])
        logits = logits.reshape(*particles, share, *logits.shape[1:])
        if self.num_data is None:
            warnings.warn(
                f"{type(self).__name__} has no num_data and takes this batch of {num_data} "
                "as the whole data set; pass num_data=len(train).",
                stacklevel=2,
            )
        size = self.num_data or num_data
        if share > size and labels is not None:  # a prediction may have any size
            raise BatchError(
                f"A batch of {share} examples is larger than the data set, num_data={size}; "
                "pass num_data=len(train) to the likelihood."
            )
        q = self.distribution(logits, labels)
        with pyro.plate("data", size, subsample=torch.arange(share, device=logits.device), dim=-1):
            pyro.sample("labels", q, obs=labels)

    def check_labels(self, labels: Tensor, logits: Tensor) -> None:
        """Raises BatchError for invalid labels; their range is checked only on a CPU."""
        if labels.shape != logits.shape[:-1]:
            raise BatchError(
                f"labels must have the shape {tuple(logits.shape[:-1])} for {type(self).__name__}, "
                f"got {tuple(labels.shape)}; use SequenceClassification for one class per example, "
                "MultiLabel for several labels, TokenClassification for tags of tokens."
            )
        if labels.is_floating_point():
            raise BatchError(f"labels must be integers, got {labels.dtype}; pass labels.long().")
        low, high = map(int, labels.aminmax()) if labels.is_cpu else (0, 0)
        if low < 0 or high >= logits.shape[-1]:
            raise BatchError(
                f"labels must be classes of {type(self).__name__}, 0 to {logits.shape[-1] - 1}, "
                f"got {low} to {high}; check the label mapping of the data set."
            )

    def examples(self, batch: Batch) -> int:
        """Number of examples ``B`` in a batch; raises BatchError for an invalid batch."""
        if not set(self.keys) <= set(batch):
            raise BatchError(
                f"A batch must have {', '.join(self.keys)} for {type(self).__name__}, got "
                f"{', '.join(map(str, batch)) or 'nothing'}; check the collator."
            )
        ids = batch["input_ids"] if "input_ids" in self.keys else None
        if ids is not None and getattr(ids, "ndim", 0) != self.row_dims:
            kinds = {2: "B x T", 3: "B x K x T, several rows an example"}
            got = tuple(ids.shape) if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
            raise BatchError(
                f"input_ids must be a tensor of {kinds[self.row_dims]}, for {type(self).__name__}, "
                f"got {got}. Pad the rows in collate=, and use the likelihood of your batches: "
                "MultipleChoice for options, Preference for pairs, others for one row an example."
            )
        count = len(batch[self.keys[0]])
        if not count:
            raise BatchError("A batch must have an example, got an empty one; check the data set.")
        # of options, one may be absent
        mask = None if "option_mask" in self.keys else batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.is_cpu and (~mask.any(-1)).any():
            raise BatchError(
                "Each row of attention_mask must have a real token, got a row of padding alone; "
                "leave that example out."
            )
        return count
