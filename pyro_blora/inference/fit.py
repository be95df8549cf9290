"""A ready-made training loop over Pyro's ELBO, for people who do not want to write one."""

import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.data.batches import batches_of, collator, endless_batches, size_of
from pyro_blora.errors import BatchError, ConfigurationError, DataError, check_count, check_positive
from pyro_blora.inference.learning_rates import (
    parameter_groups,
    point_steps,
    sizes_of,
    steps_of_an_epoch,
)
from pyro_blora.inference.loop import Callback, FitResult, running, training_loop
from pyro_blora.inference.post_hoc import finish
from pyro_blora.inference.preparation import (
    Preparation,
    Snapshot,
    begin_training,
    draws_of_evaluation,
    post_hoc_families,
    prepare,
)
from pyro_blora.likelihoods import Collate
from pyro_blora.posterior.bayesian_lora_model import one_at_a_time
from pyro_blora.posterior.guide import draws_apart, start_guide

# Arguments that the model card does not list
_UNLISTED = ("blora", "train", "num_epochs", "collate", "validation", "callback", "progress")


@one_at_a_time
def fit(
    blora: BayesianLoRA,
    train: Any,
    *,
    num_steps: int | None = None,
    num_epochs: float | None = None,
    batch_size: int = 8,
    collate: Collate | None = None,
    learning_rates: float | Mapping[str, float] | None = None,
    num_particles: int | None = None,
    kl_weight: float = 1.0,
    held_out: float | None = None,
    precision: str = "auto",
    validation: Any = None,
    validate_every: int = 50,
    eval_samples: int | None = None,
    keep_best: bool = False,
    patience: int | None = None,
    seed: int | None = 0,
    callback: Callback | None = None,
    progress: bool | None = None,
) -> FitResult:
    r"""Maximizes the ELBO with AdamW, by default with one particle per example.

    The loss of a batch of :math:`B` of the :math:`N` examples is, per example,

    .. math::

        -\frac{1}{B} \sum_b \log p(y_b \mid x_b, U_b)
        + \frac{w}{N} \mathrm{KL}\left[q(U) \,\|\, p(U)\right], \qquad U_b \sim q.

    The rates rise over the first 6 % of the steps and then fall to zero along a line; the
    gradient's norm is clipped at 1.

    Args:
        blora: the adapter to train.
        train: examples: a list, a ``datasets.Dataset``, a data frame, or a CSV, JSON-lines, JSON
            or Parquet file; or a ``DataLoader`` of batches. Their number becomes the likelihood's
            ``num_data`` if it has none.
        num_steps: number of optimizer steps.
        num_epochs: passes over the training data, in place of ``num_steps``.
        batch_size: examples per step; a ``DataLoader`` has its own.
        collate: makes a batch from a list of examples. Default: the adapter's tokenizer, in the
            form that the likelihood's docstring names: rows have ``text`` and ``label`` for
            classes and numbers, ``question``, ``choices`` and ``label`` for options, ``text``, or
            ``prompt`` and ``completion``, for ``CausalLM``. Without a tokenizer, torch's default.
        learning_rates: rates by role: ``"mean"``, ``"scale"``, ``"direction"``,
            ``"likelihood"`` and ``"head"``, the last in units of a logit; a single number is the
            rate of the means. :func:`~pyro_blora.inference.parameter_groups` says where others come
            from, and what the first batch changes in them.
        num_particles: posterior draws per batch, each of which sees its share of the examples; if
            it does not divide a batch, the largest divisor below it. Default: one per example.
        kl_weight: weight of the KL, :math:`w`; 1 is the ELBO.
        held_out: share of the examples to hold out from training; at its end the temperatures of
            predictions are fitted to them (:meth:`BayesianLoRA.calibrate
            <pyro_blora.BayesianLoRA.calibrate>`). :math:`N` is then the number of the others.
            Nothing can be held out of a ``DataLoader``: a share is refused there, and without one
            a likelihood that needs it warns. The default is the likelihood's: an eighth for
            options, preferences and numbers, because the scale of their scores is unknown, and 0
            for other likelihoods, for a published method and after ``from_peft``. Examples are
            chosen by their texts, so that a training that goes on with the same data holds out the
            same ones; pass 0.0 if an earlier one held out none of them.
        precision: ``"float32"``, ``"bfloat16"`` to run the frozen network under autocast, or
            ``"auto"``, which takes the faster one on the network's device. The variational part
            stays in single precision.
        validation: examples as in ``train``. Their loss is the mean of
            ``-blora.log_predictive(batch, eval_samples)``, without the temperature.
        validate_every: steps between validations.
        eval_samples: posterior draws in a validation, 0 for the mean. Default: as in ``predict``;
            0 while a post-hoc guide is a point.
        keep_best: whether to return to the parameters of the best validation at the end.
        patience: training stops, before the rates have fallen to zero, after this many validations
            in a row that do not lower the best loss; ``None`` never stops early.
        seed: seed of the order of the data and of torch's global generator; ``None`` seeds neither.
            It does not cover what the prior drew when the adapter was made.
        callback: called with a :class:`~pyro_blora.inference.Step` after each step and its
            validation. With a callback every step waits for the device to read its figures, where
            otherwise every tenth does.
        progress: whether to show a progress bar; by default on a terminal.

    Returns:
        The history, with the loss per example, its KL and NLL, and the accuracy and confidence on
        the last training examples. If the adapter is far less sure of these than it is right, a
        warning says that it has not learned.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; the message names the sites. It is
            raised within ten steps, and before anything is saved.
        BatchError: a data set is empty, or a batch is larger than ``num_data``.
        ConfigurationError: an option is out of range or has no effect, or the number of examples
            is unknown.
        DataError: a row or a column cannot be used. After an error before the last step the
            adapter is put back to where it was. An interrupt leaves what was learned, and so does
            an error after the last step, unless a row of the data is to blame.

    Example::

        fit(blora, train, collate=collate, num_steps=300, validation=others, keep_best=True)
    """
    settings = {name: value for name, value in locals().items() if name not in _UNLISTED}
    blora.model.check_attached()
    _check(settings, validation)
    before = Snapshot(blora)
    with before.put_back_after(Exception):
        run = prepare(
            blora,
            train,
            collate,
            () if validation is None else (validation,),
            learning_rates=learning_rates,
            held_out=held_out,
            num_particles=num_particles,
            kl_weight=kl_weight,
        )
        num_steps = _steps(run.train, num_steps, num_epochs, batch_size)
        settings |= {"num_steps": num_steps, "held_out": run.share}
        begin_training(blora)
        stream = endless_batches(run.train, run.collate, batch_size=batch_size, seed=seed)
        if seed is not None:
            torch.manual_seed(seed)  # seeds the draws; the batches have their own generator
        first = next(stream)
        batch = blora.model.prepared(first)
        start_guide(blora.guide)  # so that an AutoGuide has parameters to optimize
        size = run.train.batch_size if isinstance(run.train, DataLoader) else None
        if size and batch.examples > size:
            raise ConfigurationError(
                f"Each item of this DataLoader's data set is a batch already, of {batch.examples} "
                "examples; make the loader with batch_size=None, and the likelihood with num_data=."
            )
        with blora.model.autocast(precision):
            sizes = sizes_of(blora, batch)
        groups = parameter_groups(blora, sizes, run.rates)
        validate = _validation(blora, run, batch_size, eval_samples)
        with running(blora, precision, training=True), torch.enable_grad():
            result = training_loop(
                blora,
                run.objective,
                groups,
                chain([first], stream),
                settings,
                # directions and heads stop early, because no KL keeps them from memorizing
                point_steps=point_steps(blora, steps_of_an_epoch(run.train, batch_size), sizes),
                validate=validate,
                callback=callback,
                progress=progress,
            )
    result.num_held_out = len(run.held_out)
    if not result.has_learned:
        head = ", or raise the rate of the head, learning_rates={'head': ...}"
        warnings.warn(
            "The adapter has not learned its training examples: it is right on "
            f"{result.accuracy:.0%} of them with a confidence of {result.confidence:.0%}. "
            f"Train for more steps{head if blora.model.trained_heads.names else ''}.",
            stacklevel=3,  # past the wrapper of one_at_a_time
        )
    if keep_best and result.best_state is not None:
        blora.load_state_dict(result.best_state)
    options: dict[str, Any] = dict(batch_size=batch_size, precision=precision, progress=progress)
    with before.put_back_after(DataError, BatchError):  # others leave what has been learned
        if post_hoc_families(blora):
            finish(blora, run.train, collate=run.collate, num_held_out=len(run.held_out), **options)
        if len(run.held_out):
            blora.calibrate(run.held_out, run.collate, **options)
    return result


def _check(settings: Mapping[str, Any], validation: Any) -> None:
    """Checks the options of the loop; ``prepare`` checks the others."""
    for name in ("batch_size", "validate_every"):
        check_count(name, settings[name])
    for name, least in (("patience", 1), ("eval_samples", 0)):
        if settings[name] is not None:
            check_count(name, settings[name], least)
    if validation is None and settings["keep_best"]:
        raise ConfigurationError("keep_best=True needs validation=, by which the best is chosen.")
    if validation is None and settings["patience"] is not None:
        raise ConfigurationError(
            f"patience={settings['patience']} needs validation=, to which it applies."
        )


def _validation(
    blora: BayesianLoRA, run: Preparation, batch_size: int, eval_samples: int | None
) -> Callable[[], float] | None:
    """The mean negative log predictive of the validation set, or ``None`` without one."""
    if not run.validations:
        return None
    ((data, collate),) = run.validations
    if size_of(data) == 0:  # checked now, not at the first validation
        raise BatchError("The validation set is empty; leave validation= out to train without.")
    collator(data, collate)  # raises if the rows cannot be collated
    samples = draws_of_evaluation(blora, eval_samples)

    def validate() -> float:
        # without gradients there is room for twice the batch
        batches = batches_of(data, collate, 2 * batch_size)
        # the same draws each time, apart from those of the training; dropout is off
        with draws_apart(blora.guide, blora.device), torch.no_grad():
            parts = [blora.log_predictive(batch, samples) for batch in batches]
        return -float(torch.cat(parts).mean())

    return validate


def _steps(train: Any, num_steps: int | None, num_epochs: float | None, batch_size: int) -> int:
    """The number of steps, which one of the two arguments gives."""
    if num_steps is not None and num_epochs is None:
        check_count("num_steps", num_steps)
        return num_steps
    if num_steps is not None or num_epochs is None:
        raise ConfigurationError(
            "Exactly one of num_steps= and num_epochs= must be given, got "
            f"{num_steps} and {num_epochs}."
        )
    check_positive("num_epochs", num_epochs)
    of_an_epoch = steps_of_an_epoch(train, batch_size)
    if of_an_epoch is None:
        raise ConfigurationError(
            f"num_epochs={num_epochs} needs data with a length; pass num_steps= instead."
        )
    return max(1, round(num_epochs * of_an_epoch))
