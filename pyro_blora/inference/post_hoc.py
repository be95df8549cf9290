"""The width of a posterior around a point, which Laplace finds after training or without it."""

import os
import random
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints.peft import put_back
from pyro_blora.data.batches import Collate, batches_of
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Laplace
from pyro_blora.inference.loop import running
from pyro_blora.inference.objective import warn_above_chance
from pyro_blora.inference.preparation import Snapshot, begin_training, post_hoc_families
from pyro_blora.likelihoods import Batch, Likelihood
from pyro_blora.methods import METHODS, Method, get_method
from pyro_blora.models import UpdateModel
from pyro_blora.posterior.bayesian_lora_model import one_at_a_time
from pyro_blora.posterior.guide import draws_apart
from pyro_blora.posterior.linearized import logit_jacobian

_CHECKED, _RISE = 8, 0.1  # batches, and nats per example


@one_at_a_time
def bayesianize(
    net: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    data: Any,
    collate: Collate | None = None,
    tokenizer: Any = None,
    method: str | Method | None = None,
    prior: UpdateModel | None = None,
    guide: Laplace | None = None,
    likelihood: Likelihood | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
) -> BayesianLoRA:
    """Gives a trained LoRA a posterior around it, in one pass over the data.

    The posterior mean is the LoRA. ``Laplace`` takes the width from the curvature of the loss at
    the mean, which needs one forward pass, and one backward pass for each class but the first. A
    warning says if the draws explain the training data much worse than the LoRA does, or the LoRA
    worse than a guess.

    Args:
        net: the base network, as in :meth:`~pyro_blora.BayesianLoRA.from_peft`.
        folder: as in ``from_peft``; it or a ``PeftModel`` can be the only positional argument.
        data: the training set, as in ``fit``.
        collate: as in ``fit``.
        tokenizer: as in :class:`~pyro_blora.BayesianLoRA`.
        method: a method with this guide, such as ``"laplace-lora"``. Default: ``Laplace()`` with
            the prior ``KroneckerInducing`` of the adapter's rank.
        prior: as in ``from_peft``. Default: the method's.
        guide: a ``Laplace``. Default: the method's.
        likelihood: a likelihood with classes. Default: by PEFT's task type.
        batch_size: as in ``fit``.
        precision: as in ``fit``.
        progress: as in ``fit``.

    Raises:
        ConfigurationError: the guide is another one, or the likelihood has no classes.

    Reference:
        Yang et al. 2024, Laplace-LoRA, arXiv:2308.13111.

    Example::

        likelihood = MultipleChoice()
        blora = bayesianize(net, "my_lora", data=train, collate=collate, likelihood=likelihood)
        blora.predict(batch).probs  # B x K
    """
    usual = replace(METHODS["bayesian-lora"], guide=Laplace(), linearized=True)
    record = get_method(method or usual)
    family = record.guide if guide is None else guide
    if not isinstance(family, Laplace):
        raise ConfigurationError(
            f"guide must be Laplace() for bayesianize, got {family!r}, which is trained; start "
            "with BayesianLoRA.from_peft and continue with fit."
        )
    parts: dict[str, Any] = {"prior": prior, "guide": guide, "likelihood": likelihood}
    with put_back(net):
        blora = BayesianLoRA.from_peft(net, folder, method=record, **parts, tokenizer=tokenizer)
        try:
            rows, collate = blora.reading(data, collate)
            batches = [*batches_of(rows, collate, batch_size)]  # read once
            loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
            finish(blora, loader, precision=precision, progress=progress)
            _check_width(blora, batches, precision)
        except BaseException:
            blora.unwrap()
            raise
    return blora


def _check_width(blora: BayesianLoRA, batches: list[Batch], precision: str) -> None:
    """Warns if the draws explain some of the training data much worse than the LoRA does."""
    some = random.Random(0).sample(batches, min(len(batches), _CHECKED))
    with draws_apart(blora.guide, blora.device), running(blora, precision, training=False):
        lora, draws = (
            -float(torch.cat([blora.log_predictive(batch, count) for batch in some]).mean())
            for count in (0, None)
        )
        classes = blora.predict(some[0], 0).probs.shape[-1]
    warn_above_chance(lora, classes, blora.likelihood)
    if draws > lora + _RISE:
        warnings.warn(
            f"The posterior's NLL on the training data is {draws:.3g}, and that of the LoRA alone "
            f"{lora:.3g}, so the draws claim less than the LoRA knows. Call blora.calibrate(data) "
            "with labeled examples that it has not seen, or use predict(batch, num_samples=0).",
            stacklevel=3,
        )


@one_at_a_time
def finish(
    blora: BayesianLoRA,
    data: Any,
    *,
    collate: Collate | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
    num_held_out: int = 0,
) -> dict[str, float]:
    """Gives a ``Laplace`` guide its width; ``fit`` calls it at its end.

    ``data`` is the training set, whose curvature is scaled to ``num_data``. ``num_held_out`` of the
    ``num_data`` examples were not in the training; the other options are those of ``fit``.
    Temperatures are reset to 1, so call :meth:`BayesianLoRA.calibrate
    <pyro_blora.BayesianLoRA.calibrate>` afterwards. Returns the prior precision of each site.
    """
    families = post_hoc_families(blora)
    if not families:
        raise ConfigurationError(
            "finish must have a Laplace guide, which finds its width after training, got "
            f"{blora.method.guide!r}, which needs no finish."
        )
    hide = None if progress is None else not progress
    with Snapshot(blora).put_back_after(Exception), running(blora, precision, training=False):
        data, collate = blora.reading(data, collate)
        batches = list(batches_of(data, collate, batch_size))
        begin_training(blora)
        count = blora.likelihood.num_data
        trained = None if count is None else count - num_held_out
        shown = tqdm(batches, desc="finish", disable=hide, unit="batch")
        by_batch = (scores(blora, blora.model.prepared(batch)) for batch in shown)
        return Laplace.finish(families, by_batch, trained)


def scores(blora: BayesianLoRA, batch: Batch) -> dict[str, Tensor]:
    """``g_bc`` of :meth:`~pyro_blora.guides.Laplace.finish` at the guide's center, by site."""
    logits, jacobian = logit_jacobian(blora.model, blora.guide, batch)
    p = logits.softmax(-1)
    by_site = {}
    for name, J in jacobian.items():
        weight = p.reshape(*p.shape, *(1,) * (J.dim() - 2))
        by_site[name] = weight.sqrt() * (J - (weight * J).sum(1, keepdim=True))
    return by_site
