"""A ready-made training loop over Pyro's ELBO, for people who do not want to write one."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.inference.fisher import inform, wants_informing
from pyro_blora.inference.learning_rates import (
    given_rates,
    parameter_groups,
    point_steps,
    steps_of_an_epoch,
)
from pyro_blora.inference.loop import FitResult, running, training_loop
from pyro_blora.inference.objective import Objective, check_num_data, size_of
from pyro_blora.inference.post_hoc import (
    begin_training,
    draws_of_evaluation,
    finish,
    post_hoc_families,
)
from pyro_blora.inference.resume import TrainingState, settings_of
from pyro_blora.likelihoods import Batch
from pyro_blora.options import check_count, check_kind, check_positive
from pyro_blora.posterior.batches import Batches, Collate, batches_of, collator, to_device
from pyro_blora.posterior.bayesian_lora_model import one_at_a_time
from pyro_blora.posterior.guide import draws_apart, start_guide

DECAYS = ("linear", "cosine", "constant")


@one_at_a_time
def fit(
    blora: BayesianLoRA,
    train: Sequence[Any] | DataLoader[Any],
    *,
    num_steps: int | None = None,
    num_epochs: float | None = None,
    batch_size: int = 8,
    collate: Collate | None = None,
    length: Callable[[Any], int] | None = None,
    learning_rates: float | Mapping[str, float] | None = None,
    warmup: float = 0.06,
    decay: Literal["linear", "cosine", "constant"] = "linear",
    max_grad_norm: float | None = 1.0,
    num_particles: int | None = None,
    elbo: type[Trace_ELBO] | None = None,
    kl_weight: float = 1.0,
    precision: str = "auto",
    validation: Sequence[Any] | DataLoader[Any] | None = None,
    validate_every: int = 50,
    eval_samples: int | None = None,
    keep_best: bool = False,
    seed: int | None = 0,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    save_every: int = 50,
    resume: bool = False,
    callback: Callable[[int], None] | None = None,
    progress: bool | None = None,
) -> FitResult:
    r"""Maximizes the ELBO by AdamW, a particle for each example.

    The loss of a batch of :math:`B` of the :math:`N` examples is, per example,

    .. math::

        -\frac{1}{B} \sum_b \log p(y_b \mid x_b, U_b)
        + \frac{w}{N} \mathrm{KL}\left[q(U) \,\|\, p(U)\right], \qquad U_b \sim q.

    Args:
        blora: what to train.
        train: examples, or a ``DataLoader`` of batches.
        num_steps: optimizer steps.
        num_epochs: passes over the training data, instead of ``num_steps``.
        batch_size: examples in a step; a ``DataLoader`` has its own.
        collate: makes a batch of a list of examples, torch's by default.
        length: the length of an example; batches of like lengths waste no padding.
        learning_rates: rates by role, of ``"mean"``, ``"scale"``, ``"direction"``,
            ``"likelihood"`` and ``"head"``; a number is that of the means. Other roles have the
            method's, ``blora.method.learning_rates``.
        warmup: share of the steps in which the rates rise from zero.
        decay: how they fall to zero afterwards, or ``"constant"``.
        max_grad_norm: the gradient's norm, per example, is clipped here; ``None`` does not clip.
        num_particles: draws of the posterior for a batch; each sees its share of the examples. 1
            is one draw for all; if it does not divide a (last) batch, the largest divisor below
            it is taken. Default: one for each example.
        elbo: the class of the ELBO, an average over particles, each of which sees its own
            examples. Default: ``TraceMeanField_ELBO``, whose KL is analytic where it can be, for a
            family of this library; ``Trace_ELBO`` for an AutoGuide and any other guide.
        kl_weight: weight of the KL, :math:`w`; 1 is the ELBO.
        precision: ``"float32"``, ``"bfloat16"`` to run the frozen network under autocast, or
            ``"auto"``, what is faster on the network's device. The variational part stays in
            single precision.
        validation: examples, or a ``DataLoader`` of batches, whose predictive NLL is watched, the
            mean of ``-blora.log_predictive(batch, eval_samples)``, as by the Trainer.
        validate_every: steps between validations.
        eval_samples: posterior draws of a validation; 0 is the posterior mean, which takes less
            time. Default: those of ``predict``; 0 while a post-hoc guide is a point.
        keep_best: whether to go back to the best validation at the end.
        seed: of the order of the data and of torch's global generator; ``None`` seeds neither. What
            the prior drew when the adapter was made came before: seed that yourself.
        checkpoint_dir: a folder of the run's own, where its state is saved, so that a run that was
            stopped or killed can go on. Ctrl-C then ends the step, and saves.
        save_every: steps between two savings.
        resume: whether to go on from the state in ``checkpoint_dir``, on a CPU with the same bits
            as without a stop. If there is none, the run begins. With more ``num_steps`` a finished
            run goes on, too.
        callback: called after each step with the number of steps done.
        progress: whether to show a progress bar; ``None`` shows it on a terminal.

    Returns:
        The history, with the loss per example, its KL and NLL.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; the message names the sites. It comes
            within ten steps, and before anything is saved.
        BatchError: a data set is empty, or a batch is larger than ``num_data``.
        ConfigurationError: an option is out of range, or nothing comes of it, or the likelihood
            lacks ``num_data``.
        CheckpointError: the state in ``checkpoint_dir`` is corrupt, or of another run, and the
            message says what differs. Or one is there and ``resume`` is false.

    Example::

        fit(blora, train, collate=collate, num_steps=300, validation=held_out, keep_best=True)
    """
    check_kind("blora", blora, BayesianLoRA)
    blora.model.check_on_network()
    rates = given_rates(blora, learning_rates)
    num_steps = _steps(train, num_steps, num_epochs, batch_size)
    counts = {"num_steps": num_steps, "batch_size": batch_size}
    counts |= {"validate_every": validate_every, "save_every": save_every}
    for name, count in counts.items():
        check_count(name, count)
    if max_grad_norm is not None:
        check_positive("max_grad_norm", max_grad_norm)
    for wrong, told in (
        (decay not in DECAYS, f"decay must be one of {DECAYS}, got {decay!r}."),
        (not 0 <= warmup < 1, f"warmup must be a share in [0, 1), got {warmup}."),
        (resume and checkpoint_dir is None, "resume=True needs checkpoint_dir=, the run's folder."),
        (keep_best and validation is None, "keep_best=True needs validation=, to tell the best."),
    ):
        if wrong:
            raise ConfigurationError(told)
    if validation is not None:  # an error now, not after fifty steps
        if not len(validation):
            raise BatchError("The validation set is empty; leave validation= out to train without.")
        collator(validation, collate)
    if seed is not None:
        torch.manual_seed(seed)
    device = blora.model.groups[0].device
    stream = Batches(train, collate, length, batch_size=batch_size, seed=seed)
    first = to_device(stream.peek(), device)
    objective = Objective(blora, elbo, num_particles, kl_weight)
    start_guide(blora.guide, first)  # its parameters must exist before the optimizer does
    begin_training(blora)
    groups = parameter_groups(blora, rates)
    if not groups:
        raise ConfigurationError("There is nothing to train: no parameter requires a gradient.")
    schedule: dict[str, Any] = {"warmup": warmup, "decay": decay, "max_grad_norm": max_grad_norm}
    schedule["validate_every"] = validate_every
    state = None
    if checkpoint_dir is not None:
        settings = {**schedule, "batch_size": batch_size, "precision": precision, "seed": seed}
        settings |= {"num_particles": num_particles, "elbo": elbo}
        settings |= {"kl_weight": kl_weight, "keep_best": keep_best, "eval_samples": eval_samples}
        sizes = {"training data": size_of(train), "validation": size_of(validation)}
        settings = settings_of(blora, settings, **sizes)
        settings["learning_rates"] |= rates  # of the method's
        state = TrainingState(
            checkpoint_dir, blora, stream, settings, num_steps=num_steps, resume=resume
        )
        precision = state.settings["precision"]
    reading: dict[str, Any] = {"collate": collate, "length": length, "batch_size": batch_size}
    reading |= {"precision": precision, "progress": progress}
    if wants_informing(blora) and not (state and state.found):
        inform(blora, train, **reading)
    if keep_best and num_steps <= validate_every:
        warnings.warn(
            f"keep_best=True must compare validations, got one, after the last of {num_steps} "
            f"steps (validate_every={validate_every}); choose a smaller validate_every=.",
            stacklevel=3,
        )
    validate = None
    if validation is not None:
        samples = draws_of_evaluation(blora, eval_samples)

        def validate() -> float:
            """The mean negative log predictive of the validation set."""
            batches = batches_of(validation, collate, length, 2 * batch_size)
            with draws_apart(blora.guide, device), torch.no_grad():
                moved = (to_device(batch, device) for batch in batches)
                parts = [blora.log_predictive(batch, samples) for batch in moved]
            return -float(torch.cat(parts).mean())

    check_num_data(blora.likelihood, train)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return objective(to_device(batch, device))

    with running(blora, precision, training=True):
        result = training_loop(
            loss_of,
            groups,
            stream,
            num_steps=num_steps,
            check=objective.check,
            point_steps=point_steps(blora, steps_of_an_epoch(train, batch_size)),
            **schedule,
            validate=validate,
            state=blora.state_dict,
            keeper=state,
            save_every=save_every,
            callback=callback,
            progress=progress,
        )
    if keep_best and result.best_state is not None:
        blora.load_state_dict(result.best_state)
    if post_hoc_families(blora):
        finish(blora, train, **reading)
    return result


def _steps(train: Any, num_steps: int | None, num_epochs: float | None, batch_size: int) -> int:
    """How many steps there are, of which one of the two arguments tells."""
    if (num_steps is None) == (num_epochs is None):
        raise ConfigurationError(
            f"One of num_steps= and num_epochs= must be given, got {num_steps} and {num_epochs}."
        )
    if num_epochs is None:
        return cast(int, num_steps)
    check_positive("num_epochs", num_epochs)
    check_count("batch_size", batch_size)
    of_an_epoch = steps_of_an_epoch(train, batch_size)
    if of_an_epoch is None:
        raise ConfigurationError(
            f"num_epochs={num_epochs} must be of data that have a length; give num_steps= instead."
        )
    return round(num_epochs * of_an_epoch)
