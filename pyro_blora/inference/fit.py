"""A ready-made training loop over Pyro's ELBO, for people who do not want to write one."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError, near_miss
from pyro_blora.inference.batches import Batches
from pyro_blora.inference.finish import finish, post_hoc_families, running
from pyro_blora.inference.inform import inform, wants_informing
from pyro_blora.inference.learning_rates import parameter_groups, rates_by_group
from pyro_blora.inference.loop import Collate, FitOptions, FitResult, batches_of, training_loop
from pyro_blora.inference.objective import Objective
from pyro_blora.inference.resume import TrainingState, settings_of, size_of
from pyro_blora.likelihoods import Batch
from pyro_blora.methods import METHODS
from pyro_blora.options import check_kind
from pyro_blora.posterior.bayesian_lora_model import to_device
from pyro_blora.posterior.guide import draws_apart, start_guide
from pyro_blora.posterior.predictive import log_predictive

__all__ = ["fit"]


def fit(
    blora: BayesianLoRA,
    train: Sequence[Any] | DataLoader[Any],
    *,
    num_steps: int | None = None,
    num_epochs: float | None = None,
    collate: Collate | None = None,
    length: Callable[[Any], int] | None = None,
    validation: Sequence[Any] | DataLoader[Any] | None = None,
    **options: Any,
) -> FitResult:
    r"""Maximises the ELBO by AdamW, a particle for each example.

    The loss of a batch of :math:`B` of the :math:`N` examples is, per example,

    .. math::

        -\frac{1}{B} \sum_b \log p(y_b \mid x_b, U_b)
        + \frac{w}{N} \mathrm{KL}\left[q(U) \,\|\, p(U)\right], \qquad U_b \sim q.

    Args:
        blora: what to train.
        train: examples, or a ``DataLoader`` of batches.
        num_steps: optimizer steps.
        num_epochs: passes over the training data, instead of ``num_steps``.
        collate: makes a batch of a list of examples, torch's by default; a ``DataLoader`` has
            its own.
        length: the length of an example; batches of like lengths waste no padding. Default: none
            is known; a ``DataLoader`` makes its own batches.
        validation: examples whose predictive NLL is watched, or a ``DataLoader`` of batches.
            Default: none.
        options: how to train, by the names of :class:`~pyro_blora.inference.FitOptions`:
            ``batch_size``, ``lr_mean``, ``keep_best``, ....

    Returns:
        The history, with the loss per example, its KL and NLL.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; the message names the sites.
        BatchError: a data set is empty, or a batch is larger than ``num_data``.
        ConfigurationError: an option is out of range, or nothing comes of it, or the likelihood
            lacks ``num_data``.
        CheckpointError: the state in ``checkpoint_dir`` is of another run, which the message tells
            from this one, or is corrupt; or one is there and ``resume`` is false.
        TypeError: there is no such option; the message lists near misses.

    Example::

        fit(blora, train, collate=collate, num_steps=300, validation=held_out, keep_best=True)
    """
    known = [option.name for option in fields(FitOptions)]
    for name in options:
        if name not in known:
            raise TypeError(f"fit has no option {name!r}; {near_miss(name, known)}.")
    check_kind("blora", blora, BayesianLoRA)
    blora.model.check_on_network()
    _check_data(train, collate)
    how = FitOptions(_steps(train, num_steps, num_epochs, options), **options)
    if how.seed is not None:
        torch.manual_seed(how.seed)
    device = blora.model.groups[0].device
    stream = Batches(train, collate, how, length)
    first = to_device(stream.peek(), device)
    objective = Objective(blora, how.elbo, how.num_particles, how.kl_weight)
    groups = _parameters(blora, first, how)
    state = _state(blora, stream, how, train, validation)
    how = replace(how, precision=state.settings["precision"]) if state else how
    reading: dict[str, Any] = {"collate": collate, "length": length, "batch_size": how.batch_size}
    reading |= {"precision": how.precision, "progress": how.progress}
    if wants_informing(blora) and not (state and state.found):
        inform(blora, train, **reading)
    validate = None
    if how.keep_best and validation is None:
        raise ConfigurationError("keep_best=True needs validation=, which tells the best step.")
    if how.keep_best and how.num_steps <= how.validate_every:
        warnings.warn(
            "keep_best=True must compare validations, got one, after the last of "
            f"{how.num_steps} steps (validate_every={how.validate_every}); choose a smaller "
            "validate_every=.",
            stacklevel=2,
        )
    if validation is not None:
        validate = _validation(blora, validation, collate, length, how)
    _reopen(blora)
    _warn_of_size(blora, train)

    def loss_of(batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        return objective(to_device(batch, device), step)

    with running(blora, how.precision, training=True):
        result = training_loop(
            loss_of,
            groups,
            stream,
            how,
            validate=validate,
            state=blora.state_dict,
            keeper=state,
        )
    if how.keep_best and result.best_state is not None:
        blora.load_state_dict(result.best_state)
    if post_hoc_families(blora.guide):
        finish(blora, train, **reading)
    return result


def _check_data(train: Sequence[Any] | DataLoader[Any], collate: Collate | None) -> None:
    if isinstance(train, DataLoader):
        return
    if not hasattr(train, "__getitem__") or not isinstance(train, Sized):
        raise BatchError(
            f"train is a {type(train).__name__}; give examples, such as task.train, or a "
            "DataLoader."
        )
    if collate is None and len(train) and not isinstance(train[0], Mapping):
        raise ConfigurationError(
            f"An example is a {type(train[0]).__name__}: pass collate=, which makes a batch of a "
            "list of them, such as task.collator(tokenizer)."
        )


def _steps(
    train: Sequence[Any] | DataLoader[Any],
    num_steps: int | None,
    num_epochs: float | None,
    options: Mapping[str, Any],
) -> int:
    """How many steps there are, of which one of the two arguments tells."""
    if (num_steps is None) == (num_epochs is None):
        raise ConfigurationError(
            f"One of num_steps= and num_epochs= must be given, got {num_steps} and {num_epochs}."
        )
    if num_epochs is None:
        return cast(int, num_steps)
    size = 1 if isinstance(train, DataLoader) else options.get("batch_size", FitOptions.batch_size)
    return max(1, round(num_epochs * math.ceil(len(train) / size)))


def _warn_of_size(blora: BayesianLoRA, train: Sequence[Any] | DataLoader[Any]) -> None:
    """Of a size of the data that is not the likelihood's: the KL would have another weight."""
    told = blora.likelihood.num_data
    if told and not isinstance(train, DataLoader) and len(train) not in (0, told):
        warnings.warn(
            f"The likelihood was told num_data={told}, and train has {len(train)} examples: the KL "
            f"weighs {len(train) / told:.3g} times what it does in the ELBO; pass num_data="
            "len(train).",
            stacklevel=3,
        )


def _parameters(blora: BayesianLoRA, batch: Batch, how: FitOptions) -> list[dict[str, Any]]:
    """The optimizer's groups; rates given win over the method's."""
    start_guide(blora.guide, batch)  # its parameters must exist before the optimizer does
    given = {role: getattr(how, f"lr_{role}") for role in METHODS["bayesian-lora"].learning_rates}
    given = {role: rate for role, rate in given.items() if rate is not None}
    both = nn.ModuleList([blora.model, blora.guide])
    groups = parameter_groups(both, *rates_by_group(blora, given))
    if not groups:
        raise ConfigurationError("There is nothing to train: no parameter requires a gradient.")
    return groups


def _state(
    blora: BayesianLoRA,
    stream: Batches,
    how: FitOptions,
    train: Sequence[Any] | DataLoader[Any],
    validation: Sequence[Any] | DataLoader[Any] | None,
) -> TrainingState | None:
    if how.checkpoint_dir is None:
        return None
    told = {"training data": size_of(train), "validation": size_of(validation)}
    return TrainingState(
        how.checkpoint_dir,
        blora,
        stream,
        settings_of(blora, vars(how), **told),
        num_steps=how.num_steps,
        resume=how.resume,
    )


def _validation(
    blora: BayesianLoRA,
    data: Sequence[Any] | DataLoader[Any],
    collate: Collate | None,
    length: Callable[[Any], int] | None,
    how: FitOptions,
) -> Callable[[], float]:
    """What gives the mean negative log predictive of the validation set; it draws apart."""
    if not isinstance(data, DataLoader) and collate is None:
        raise ConfigurationError("validation= needs collate=, which makes batches of examples.")
    if not len(data):
        raise BatchError("The validation set is empty; leave validation= out to train without.")
    device = blora.model.groups[0].device

    def validate() -> float:
        parts = []
        with draws_apart(blora.guide, device), torch.no_grad():
            for made in batches_of(data, collate, length, 2 * how.batch_size):
                parts.append(log_predictive(blora.model, blora.guide, to_device(made, device), 0))
        return -float(torch.cat(parts).mean())

    return validate


def _reopen(blora: BayesianLoRA) -> None:
    families = post_hoc_families(blora.guide)
    if families and not blora.likelihood.has_classes:
        raise ConfigurationError(
            f"{blora.guide_family!r} needs one choice among a few classes for each example, and "
            f"{type(blora.likelihood).__name__} has none; take a guide that is trained, such as "
            "MatrixNormal()."
        )
    for family in families.values():
        family.reopen()
