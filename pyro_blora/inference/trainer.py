"""The Hugging Face ``Trainer`` on the ELBO, with checkpoints of the adapter alone."""

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints import read_config, read_pretrained
from pyro_blora.debts import use_one_gpu
from pyro_blora.errors import (
    BatchError,
    CheckpointError,
    ConfigurationError,
    DataError,
    check_count,
)
from pyro_blora.inference.learning_rates import (
    RATES,
    Sizes,
    parameter_groups,
    point_steps,
    sizes_of,
    steps_of_an_epoch,
)
from pyro_blora.inference.loop import schedule_length
from pyro_blora.inference.objective import Objective
from pyro_blora.inference.preparation import (
    Snapshot,
    begin_training,
    draws_of_evaluation,
    post_hoc_families,
    prepare,
)
from pyro_blora.labels import check_places
from pyro_blora.likelihoods import Batch
from pyro_blora.network.adapter import in_mode
from pyro_blora.posterior.bayesian_lora_model import one_at_a_time
from pyro_blora.posterior.guide import draws_apart, start_guide


class BayesianLoRATrainer(Trainer):
    r"""A ``transformers.Trainer`` that maximizes the ELBO of an adapter.

    Training minimizes :math:`-\frac{1}{B} \sum_b \log p(y_b \mid x_b, U_b) + \frac{1}{N}
    \mathrm{KL}[q \| p]` as :func:`~pyro_blora.inference.fit` does, and logs the two parts as
    ``nll`` and ``kl``. ``evaluate`` reports the negative log posterior predictive as ``eval_loss``;
    ``predict`` and ``compute_metrics`` receive the log probability of each class, ``(n, ..., K)``,
    and beside it the labels: of tags a row for each word, of several labels at once the log-odds of
    each, ``(n, L)``, and of numbers their means. Of text there is the loss alone.

    A checkpoint holds the adapter as ``save_pretrained`` writes it, and the state of the
    ``Trainer``, but nothing of the base. It has no temperature, which is fitted after the last
    step; ``save_model`` writes it from then on. A post-hoc guide (``Laplace``) needs
    :func:`~pyro_blora.inference.finish` afterwards; nothing is held out for it.

    Args:
        model: the adapter.
        args: as for a ``Trainer``; but a ``learning_rate`` is refused, because each role has a rate
            of its own (``learning_rates``).
        num_particles, learning_rates, eval_samples, held_out: as in ``fit``.
        options: the other arguments of a ``Trainer``: ``train_dataset``, ``processing_class``, ....
            The data sets are as in ``fit``, and ``processing_class`` is the adapter's tokenizer
            if it has none.

    Example::

        trainer = BayesianLoRATrainer(blora, TrainingArguments("out", num_train_epochs=3),
                                      train_dataset=train, data_collator=collate)
        trainer.train()
        trainer.train(resume_from_checkpoint=True)  # in another process, another day
    """

    def __init__(
        self,
        model: BayesianLoRA,
        args: TrainingArguments | None = None,
        *,
        num_particles: int | None = None,
        eval_samples: int | None = None,
        learning_rates: float | Mapping[str, float] | None = None,
        held_out: float | None = None,
        **options: Any,
    ) -> None:
        args = TrainingArguments("out") if args is None else copy.copy(args)
        if args.learning_rate != TrainingArguments.learning_rate:
            raise ConfigurationError(
                f"learning_rate={args.learning_rate} is one rate for all, but means, scales and "
                f"directions have their own; pass learning_rates= with some of {RATES}."
            )
        if eval_samples is not None:
            check_count("eval_samples", eval_samples, 0)
        self.blora, self._given = model, options.get("data_collator")
        args.remove_unused_columns = False  # the collator reads them, not forward's signature
        args.label_names = args.label_names or ["labels"]
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        use_one_gpu(args)
        with Snapshot(model).put_back_after(Exception):
            if model.tokenizer is None:
                model.tokenizer = options.get("processing_class")
            evaluated: Any = options.get("eval_dataset")
            by_name = isinstance(evaluated, Mapping)
            sets = [*evaluated.values()] if by_name else [evaluated]
            if held_out is None and post_hoc_families(model):
                held_out = 0.0  # the width is found after training, and the temperature after that
            run = prepare(
                model,
                options.get("train_dataset"),
                self._given,
                [data for data in sets if data is not None],
                learning_rates=learning_rates,
                held_out=held_out,
                num_particles=num_particles,
            )
            self._run, collate = run, run.collate
            if run.validations and not by_name:
                ((options["eval_dataset"], other),) = run.validations
                collate = collate or other
            options["train_dataset"], options["data_collator"] = run.train, collate or self._given
            super().__init__(model=_Loss(model, run.objective, eval_samples), args=args, **options)
        self.add_callback(_Begins(model))

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    data_collator: Any
    eval_dataset: Any

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer that ``args`` names, with a rate for each role."""
        if self.optimizer is None:
            start_guide(self.blora.guide)
            groups = parameter_groups(self.blora, self._sizes, self._run.rates)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            decay = self.args.weight_decay
            self.optimizer = kind([{**g, "weight_decay": decay} for g in groups], **options)
        return self.optimizer

    @cached_property
    def _sizes(self) -> Sizes:
        """What the first rows show, for the optimizer and its scheduler; it draws no number."""
        rows = [*islice(self.train_dataset or (), self.args.per_device_train_batch_size)]
        return sizes_of(self.blora, self.data_collator(rows)) if rows else Sizes({})

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Makes the scheduler of ``args``; point estimates stop after their ``point_epochs``."""
        given = self.lr_scheduler is not None
        whole = super().create_scheduler(num_training_steps, optimizer)
        epoch = steps_of_an_epoch(self.get_train_dataloader(), 1)
        if given or not isinstance(whole, LambdaLR) or epoch is None:
            return whole
        of_an_epoch = math.ceil(epoch / self.args.gradient_accumulation_steps)
        last = point_steps(self.blora, of_an_epoch, self._sizes)
        for k, group in enumerate(whole.optimizer.param_groups):
            length = schedule_length(group, num_training_steps, last)
            if length < num_training_steps:
                whole.lr_lambdas[k] = partial(
                    _ended, whole.lr_lambdas[k], num_training_steps, length
                )
        return whole

    @one_at_a_time
    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trains as ``Trainer.train`` does, and restores the network's mode afterwards."""
        before, made = Snapshot(self.blora), (self.optimizer, self.lr_scheduler)
        states = [copy.deepcopy(each.state_dict()) for each in made if each is not None]
        try:
            with before.put_back_after(Exception), self._in_mode(training=True):
                result = super().train(*arguments, **options)
        except Exception:
            # not those of parameters that are undone, nor a scheduler that has run to its end
            self.optimizer, self.lr_scheduler = made[0], self.lr_scheduler and made[1]
            for each, state in zip(filter(None, made), states, strict=True):
                each.load_state_dict(state)
            self.model.figures = []
            raise
        if len(self._run.held_out):
            size = self.args.per_device_eval_batch_size
            with before.put_back_after(DataError, BatchError):
                self.blora.calibrate(self._run.held_out, self.data_collator, batch_size=size)
        return result

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The loader of a data set as in ``fit``."""
        return self._read(super().get_test_dataloader, test_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The loader of a data set as in ``fit``, or of one by its name."""
        whole: Any = self.eval_dataset
        if not (isinstance(eval_dataset, str) and isinstance(whole, Mapping)):
            data = whole if eval_dataset is None else eval_dataset
            return self._read(super().get_eval_dataloader, data)

        def by_name(data: Any) -> Any:  # under which transformers keeps a loader
            self.eval_dataset = {**whole, eval_dataset: data}
            return super(BayesianLoRATrainer, self).get_eval_dataloader(eval_dataset)

        try:
            return self._read(by_name, whole[eval_dataset])
        finally:
            self.eval_dataset = whole

    def _read(self, loader_of: Callable[[Any], Any], data: Any) -> Any:
        """The loader of rows, whose collator knows by which numbers they call their classes."""
        data, collate = self.blora.reading(data, self._given, labeled=False, training=False)
        before: Any = self.data_collator
        self.data_collator = collate or before
        try:
            return loader_of(data)
        finally:
            self.data_collator = before

    def prediction_step(
        self, model: Any, inputs: Any, *arguments: Any, **options: Any
    ) -> tuple[Any, Any, Any]:
        """The loss, the scores and the labels of a batch, such as those of words in their order."""
        loss, scores, labels = super().prediction_step(model, inputs, *arguments, **options)
        if labels is not None:
            labels = self.blora.likelihood.labels(self.blora.model.prepared(inputs))
        return loss, scores, labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, beside the loss, the means of ``nll`` and ``kl`` since the last call."""
        if "loss" in logs and self.model.figures:
            parts = torch.tensor(self.model.figures, device=self.args.device).mean(0, keepdim=True)
            self.model.figures = []
            nll, kl = self.accelerator.gather(parts).mean(0).tolist()
            logs = {**logs, "nll": nll, "kl": kl}
        super().log(logs, start_time)

    @one_at_a_time
    def evaluation_loop(self, *arguments: Any, **options: Any) -> EvalLoopOutput:
        """Evaluates with random numbers of its own, so that evaluations do not change training."""
        device = self.blora.model.groups[0].device
        with self._in_mode(training=False), draws_apart(self.blora.guide, device):
            return super().evaluation_loop(*arguments, **options)

    @contextmanager
    def _in_mode(self, *, training: bool) -> Iterator[None]:
        """Puts the network and the ``Trainer``'s model into this mode within the context."""
        with in_mode(self.blora.net, training=training), in_mode(self.model, training=training):
            yield

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if getattr(self.blora.net, "hf_device_map", None) is None:
            self.blora.to(device)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        self.blora.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str | os.PathLike[str], model: nn.Module | None = None
    ) -> None:
        blora, likelihood = self.blora, self.blora.likelihood
        parts: dict[str, Any] = {"prior": blora.prior, "guide": blora.method.guide}
        parts["likelihood"] = likelihood
        said = read_config(resume_from_checkpoint)["likelihood"].get("options") or {}
        trained, now = said.get("classes"), getattr(likelihood, "classes", None) or ()
        if trained is not None and bool(trained) != bool(now):
            raise CheckpointError(
                f"{resume_from_checkpoint} was trained on {trained or 'numbers'} as classes, got "
                f"data with {list(now) or 'numbers'}; resume with the same data."
            )
        check_places(likelihood.data_names, said.get("data_names") or ())
        for name in likelihood.unit_options:  # of the saved tensors; these rows may have another
            setattr(likelihood, name, said.get(name, getattr(likelihood, name)))
        read_pretrained(blora.net, resume_from_checkpoint, **parts).load_into(blora.posterior)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Loss(nn.Module):
    """The model that the ``Trainer`` calls: the ELBO in training, otherwise the predictive."""

    accepts_loss_kwargs = False  # the loss is a mean over examples; the Trainer averages batches

    def __init__(self, blora: BayesianLoRA, objective: Objective, num_samples: int | None) -> None:
        super().__init__()
        self.blora, self.objective, self.num_samples = blora, objective, num_samples
        self.figures: list[tuple[float, float]] = []
        # which the Trainer calls if its arguments ask for it
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if hasattr(blora.net, name):
                setattr(self, name, getattr(blora.net, name))
        if hasattr(blora.net, "hf_device_map"):
            self.hf_device_map = blora.net.hf_device_map

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        if not self.training:
            return self._predictive(self.blora.model.prepared(batch))
        with pyro.validation_enabled(False):
            loss, figures = self.objective(batch)
            values = torch.stack(list(figures.values())).tolist()
            read = dict(zip(figures, values, strict=True))
            self.objective.check(batch, 0, read)  # the Trainer reads each loss at once, too
        self.figures.append((read["nll"], read["kl"]))
        return {"loss": loss}

    @torch.no_grad()
    def _predictive(self, batch: Batch) -> dict[str, Tensor]:
        likelihood, posterior = self.blora.likelihood, self.blora.posterior
        samples = draws_of_evaluation(self.blora, self.num_samples)
        if not likelihood.predicts:  # and the logits of text take much memory
            return {"loss": -posterior.log_predictive(batch, samples).mean()}
        passes, labels = [*posterior.logits(batch, samples)], likelihood.labels(batch)
        found = {} if labels is None else {"loss": -posterior.log_prob(labels, passes).mean()}
        return {**found, "logits": likelihood.scores(torch.cat(passes))}


def _ended(share: Callable[..., float], num_steps: int, last: int, step: int) -> float:
    """The share of a schedule that is compressed to ``last`` steps, and zero after them."""
    return 0.0 if step >= last else share(step * num_steps / last)


class _Begins(TrainerCallback):
    """Resets the adapter once nothing can be refused any more, and seeds each process apart."""

    def __init__(self, blora: BayesianLoRA) -> None:
        self.blora = blora

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        begin_training(self.blora)
        if args.world_size > 1:
            torch.manual_seed(args.seed + 1 + args.process_index)
