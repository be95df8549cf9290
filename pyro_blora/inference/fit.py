"""A ready-made training loop over Pyro's ELBO, for people who do not want to write one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError, near_miss
from pyro_blora.inference.finish import finish, post_hoc_families, running
from pyro_blora.inference.inform import inform, wants_informing
from pyro_blora.inference.learning_rates import LEARNING_RATES, parameter_groups, rates_by_group
from pyro_blora.inference.loop import (
    Collate,
    FitResult,
    LoopOptions,
    batches,
    by_length,
    training_loop,
)
from pyro_blora.inference.objective import Objective
from pyro_blora.likelihoods import Batch
from pyro_blora.network.frozen_prefix import FrozenPrefix, kept
from pyro_blora.posterior.bayesian_lora_model import to_device
from pyro_blora.posterior.draws import log_predictive
from pyro_blora.posterior.structured_guide import draws_apart, start_guide

__all__ = ["FitOptions", "fit"]


@dataclass(frozen=True)
class FitOptions(LoopOptions):
    """What :func:`fit` takes by name: these, and those of :class:`LoopOptions`.

    Attributes:
        num_particles: draws of the posterior for a batch; each sees its share of the examples. 1 is
            one draw for all; where it does not divide a (last) batch, the largest divisor below it
            is taken. Default: one for each example.
        elbo: the class of the ELBO, an average over particles, each of which sees its own examples.
            Bounds that combine particles otherwise (Renyi, tail-adaptive) need every particle to
            see every example. Default: ``TraceMeanField_ELBO``, whose KL is analytic where it can
            be, for a family of this library; ``Trace_ELBO`` for an AutoGuide and any other guide.
        lr_mean: learning rate of the guide's means. Default: the prior's own
            (``learning_rates``), in each group of layers, or else ``LEARNING_RATES``, 2e-2.
        lr_scale: that of scales, of the guide's and of the prior's. Default: likewise, 1e-2.
        lr_direction: that of the inducing directions. Default: likewise, 5e-3.
        lr_likelihood: that of a likelihood's own parameters. Default: likewise, 5e-2.
        lr_head: that of heads trained as points (``modules_to_save``). Default: likewise, 1e-3.
        kl_warmup: share of the steps in which the weight of the KL rises to ``kl_weight``.
        kl_weight: weight of the KL, :math:`w`, for any guide; 1 is the ELBO.
        validation_samples: posterior draws for a validation, the same random numbers every
            time and none of the training's; 0 takes the posterior mean.
        keep_best: whether to go back to the best validation at the end.
        cache_frozen_prefix: whether to keep, for each example, what the blocks below the lowest
            adapted layer put out, and to run them in the first epoch and the first validation
            alone. They, and the module that runs all blocks, are without dropout. Takes the memory
            of one hidden state for each token of the training set and of the validation set.
        callback: called after each step with the number of steps done.
    """

    num_particles: int | None = None
    elbo: type[Trace_ELBO] | None = None
    lr_mean: float | None = None
    lr_scale: float | None = None
    lr_direction: float | None = None
    lr_likelihood: float | None = None
    lr_head: float | None = None
    kl_warmup: float = 0.0
    kl_weight: float = 1.0
    validation_samples: int = 0
    keep_best: bool = False
    cache_frozen_prefix: bool = False
    callback: Callable[[int], None] | None = None


def fit(
    blora: BayesianLoRA,
    train: Sequence[Any] | DataLoader[Any],
    *,
    num_steps: int,
    collate: Collate | None = None,
    length: Callable[[Any], int] | None = None,
    validation: Sequence[Any] | None = None,
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
        collate: makes a batch of a list of examples.
        length: the length of an example; batches of like lengths waste no padding.
        validation: examples whose predictive NLL is watched.
        options: how to train, by the names of :class:`FitOptions` and :class:`LoopOptions`:
            ``batch_size``, ``lr_mean``, ``keep_best``, ....

    Returns:
        The history, with the loss per example, its KL and NLL.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; the message names the sites.
        BatchError: a data set is empty, or a batch is larger than ``num_data``.
        ConfigurationError: an option is out of range, or the likelihood lacks ``num_data``.
        TypeError: there is no such option; the message lists near misses.

    Example::

        fit(blora, train, collate=collate, num_steps=300, validation=held_out, keep_best=True)
    """
    known = [option.name for option in fields(FitOptions)]
    for name in options:
        if name not in known:
            raise TypeError(f"fit has no option {name!r}; {near_miss(name, known)}.")
    how = FitOptions(num_steps, **options)
    if how.seed is not None:
        torch.manual_seed(how.seed)
    device = blora.model.groups[0].device
    stream = ((keys, to_device(b, device)) for keys, b in batches(train, collate, how, length))
    first = next(stream)
    prefix = _prefix(blora, train) if how.cache_frozen_prefix else FrozenPrefix(blora.net, [])
    objective = Objective(
        blora, how.elbo, how.num_particles, num_steps, how.kl_warmup, how.kl_weight
    )
    groups = _parameters(blora, first[1], how)
    if wants_informing(blora):
        data: dict[str, Any] = {"collate": collate, "length": length, "batch_size": how.batch_size}
        inform(blora, train, **data, precision=how.precision, prefix=prefix, progress=how.progress)
    validate = None
    if validation is not None:
        validate = _validation(blora, validation, collate, length, how, prefix)
    _reopen(blora)

    def loss_of(keys: list[int], batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        with kept(prefix, keys, batch):
            return objective(batch, step)

    with running(blora, how.precision, training=True):
        result = training_loop(
            loss_of,
            groups,
            chain([first], stream),
            how,
            validate=validate,
            state=blora.state_dict,
            callback=how.callback,
        )
    if how.keep_best and result.best_state is not None:
        blora.load_state_dict(result.best_state)
    if post_hoc_families(blora.guide):
        finish(
            blora,
            train,
            collate=collate,
            length=length,
            batch_size=how.batch_size,
            precision=how.precision,
            progress=how.progress,
        )
    return result


def _parameters(blora: BayesianLoRA, batch: Batch, how: FitOptions) -> list[dict[str, Any]]:
    """The optimizer's groups; rates given win over the prior's, and these over the usual ones."""
    start_guide(blora.guide, batch)  # its parameters must exist before the optimizer does
    given = {role: getattr(how, f"lr_{role}") for role in LEARNING_RATES}
    given = {role: rate for role, rate in given.items() if rate is not None}
    both = nn.ModuleList([blora.model, blora.guide])
    groups = parameter_groups(both, *rates_by_group(blora.model, given))
    if not groups:
        raise ConfigurationError("There is nothing to train: no parameter requires a gradient.")
    return groups


def _prefix(blora: BayesianLoRA, train: Sequence[Any] | DataLoader[Any]) -> FrozenPrefix:
    if isinstance(train, DataLoader):
        raise ConfigurationError(
            "cache_frozen_prefix=True knows examples by their index, and a DataLoader does not "
            "tell it; pass the examples themselves, with collate=."
        )
    blocks = blora.model.skippable_blocks()
    if not blocks:
        raise ConfigurationError(
            f"cache_frozen_prefix=True: {type(blora.net).__name__} has no block below its lowest "
            "adapted layer that could be skipped (adapt the upper ones alone, as with "
            "BayesianLoRA(net, layers_to_transform=[22, 23, ...])), or must run them each time: "
            "it is compiled, sharded, looked into by hooks, or gives other logits without them. "
            "Train without the cache."
        )
    return FrozenPrefix(blora.net, blocks)


def _validation(
    blora: BayesianLoRA,
    data: Sequence[Any],
    collate: Collate | None,
    length: Callable[[Any], int] | None,
    how: FitOptions,
    prefix: FrozenPrefix,
) -> Callable[[], float]:
    """What gives the mean negative log predictive of the validation set; it draws apart."""
    if collate is None:
        raise ConfigurationError("validation= needs collate=, which makes batches of examples.")
    if not len(data):
        raise BatchError("The validation set is empty; leave validation= out to train without.")
    device = blora.model.groups[0].device
    cuts = by_length(data, length, 2 * how.batch_size)

    def validate() -> float:
        parts = []
        with draws_apart(blora.guide, device), torch.no_grad():
            for indices in cuts:
                batch = to_device(collate([data[i] for i in indices]), device)
                with kept(prefix, [("validation", i) for i in indices], batch):
                    found = log_predictive(blora.model, blora.guide, batch, how.validation_samples)
                parts.append(found)
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
