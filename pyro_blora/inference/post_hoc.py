"""Guides that find the width of a posterior around a point, after training or without it."""

import os
import random
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Laplace
from pyro_blora.guides._post_hoc import Evidence, PostHoc
from pyro_blora.guides._site_guide import forked_rng
from pyro_blora.inference.loop import running
from pyro_blora.likelihoods import Batch, Likelihood
from pyro_blora.methods import Method, get_method
from pyro_blora.models import UpdateModel
from pyro_blora.posterior.batches import Collate, batches_of, repeat_batch
from pyro_blora.posterior.bayesian_lora_model import one_at_a_time
from pyro_blora.posterior.guide import StructuredGuide, read_store
from pyro_blora.posterior.linearized import logit_jacobian


def post_hoc_families(blora: BayesianLoRA) -> dict[str, PostHoc]:
    """The families that find their width after training (``Laplace``, ``Isotropic``), by site."""
    guide = blora.guide
    if not isinstance(guide, StructuredGuide):
        return {}
    found = {name: f for name, f in guide.families().items() if isinstance(f, PostHoc)}
    if found and not blora.likelihood.has_classes:
        raise ConfigurationError(
            f"{blora.guide_family!r} must have a likelihood with classes, got "
            f"{type(blora.likelihood).__name__}; pass likelihood=, such as MultipleChoice() or "
            "LabelTokens(token_ids=...), or take a guide that is trained."
        )
    return found


def share_to_hold_out(blora: BayesianLoRA, train: Any, share: float | None) -> float:
    """The share of the training examples to calibrate with: as passed, or the default."""
    if share is not None and not 0 <= share < 1:
        raise ConfigurationError(f"held_out must be a share in [0, 1), got {share}.")
    sized = hasattr(train, "__len__") and not isinstance(train, DataLoader | IterableDataset)
    usual = blora.method.held_out
    usual = blora.likelihood.held_out if usual is None else usual
    if sized and blora.likelihood.has_classes:
        return usual if share is None else share
    if share:
        raise ConfigurationError(
            f"held_out={share} must have examples with classes, got a DataLoader or a likelihood "
            "of text; leave it out, and call blora.calibrate(data, collate) for classes."
        )
    if usual and share is None:
        warnings.warn(
            f"The scores of {type(blora.likelihood).__name__} need a temperature, but no examples "
            "can be held out of a DataLoader to fit it: pass the examples themselves, or pass "
            "held_out=0.0 and call blora.calibrate(data, collate) afterwards.",
            stacklevel=4,
        )
    return 0.0


def hold_out(train: Any, share: float) -> tuple[Any, Any]:
    """Splits examples into those to train on and those to calibrate with, by a fixed choice."""
    count = int(share * len(train)) if share else 0
    if not count:
        return train, ()
    chosen = set(random.Random(0).sample(range(len(train)), count))
    others = [i for i in range(len(train)) if i not in chosen]
    # a data set of `datasets` keeps its columns, which a Trainer may sort by
    part = getattr(train, "select", None) or partial(Subset, train)
    return part(others), part(sorted(chosen))


def begin_training(blora: BayesianLoRA) -> None:
    """Reads Pyro's store, and resets what an earlier training left behind.

    That is the temperatures of predictions and the width of a post-hoc guide.
    """
    read_store(blora)
    for temperature in (blora.model.temperature, blora.model.mean_temperature):
        temperature.fill_(1)
    for family in post_hoc_families(blora).values():
        family.reopen()


def draws_of_evaluation(blora: BayesianLoRA, num_samples: int | None) -> int | None:
    """The draws of a validation: 0 by default while a guide is a point, whose draws are equal."""
    points = any(not family.finished for family in post_hoc_families(blora).values())
    return 0 if num_samples is None and points else num_samples


def bayesianize(
    net: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    data: Any,
    collate: Collate | None = None,
    tokenizer: Any = None,
    method: str | Method | None = None,
    prior: UpdateModel | None = None,
    guide: PostHoc | None = None,
    likelihood: Likelihood | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
) -> BayesianLoRA:
    """Gives a trained LoRA a posterior around it, in one pass over the data.

    The posterior mean is the LoRA. ``Laplace`` takes the width from the curvature of the loss at
    the mean, which needs one forward pass, and one backward pass for each class but the first.
    ``Isotropic`` reads the data once, and then runs the network about ten times over them.

    Args:
        net: the base network, as in :meth:`~pyro_blora.BayesianLoRA.from_peft`.
        folder: as in ``from_peft``; it or a ``PeftModel`` can be the only positional argument.
        data: the training set for ``Laplace``, an anchor set for ``Isotropic``, as in ``fit``.
        collate: as in ``fit``.
        tokenizer: as in :class:`~pyro_blora.BayesianLoRA`.
        method: a method with such a guide, ``"laplace-lora"`` or ``"tfb"``. Default:
            ``Laplace()`` with the prior ``KroneckerInducing`` of the adapter's rank.
        prior: as in ``from_peft``. Default: the method's.
        guide: ``Laplace`` or ``Isotropic``. Default: the method's.
        likelihood: a likelihood with classes. Default: by PEFT's task type.
        batch_size: as in ``fit``.
        precision: as in ``fit``.
        progress: as in ``fit``.

    Raises:
        ConfigurationError: the guide is another one, or the likelihood has no classes.

    Reference:
        Yang et al. 2024, Laplace-LoRA, arXiv:2308.13111; Shi et al. 2024, Training-free
        Bayesianization, arXiv:2412.05723.

    Example::

        likelihood = MultipleChoice()
        blora = bayesianize(net, "my_lora", data=train, collate=collate, likelihood=likelihood)
        blora.predict(batch).probs  # B x K
    """
    made = method if isinstance(method, Method) else get_method(method or "bayesian-lora")
    if guide is None:
        guide = cast(PostHoc, made.guide_of()) if method else Laplace()
    if not isinstance(guide, PostHoc):
        raise ConfigurationError(
            f"guide must be Laplace() or Isotropic() for bayesianize, got {guide!r}, which is "
            "trained; start with BayesianLoRA.from_peft and continue with fit."
        )
    if method is None:
        made = replace(made, linearized=isinstance(guide, Laplace))
    parts: dict[str, Any] = {"prior": prior, "guide": guide, "likelihood": likelihood}
    blora = BayesianLoRA.from_peft(net, folder, method=made, **parts, tokenizer=tokenizer)
    reading: dict[str, Any] = {"collate": collate, "batch_size": batch_size}
    try:
        finish(blora, data, **reading, precision=precision, progress=progress)
    except BaseException:
        blora.unwrap()
        raise
    return blora


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
    """Gives a post-hoc guide (``Laplace``, ``Isotropic``) its width; ``fit`` calls it at its end.

    ``data`` is the training set for ``Laplace``, whose curvature is scaled to ``num_data``, and the
    anchor set for ``Isotropic``. ``num_held_out`` of the ``num_data`` examples were not in the
    training; the other options are those of ``fit``. Temperatures are reset to 1, so call
    :meth:`BayesianLoRA.calibrate <pyro_blora.BayesianLoRA.calibrate>` afterwards. Returns the
    figures of the family: for ``Laplace`` the prior precision of each site, for ``Isotropic`` the
    width.
    """
    families = post_hoc_families(blora)
    if not families:
        raise ConfigurationError(
            "finish must have a guide that finds its width after training (Laplace, Isotropic), "
            f"got {blora.guide_family!r}, which needs no finish."
        )
    begin_training(blora)
    data, collate = blora.reading(data, collate)
    batches = list(batches_of(data, collate, batch_size))
    hide = None if progress is None else not progress

    def all_scores() -> Iterator[dict[str, Tensor]]:
        for batch in tqdm(batches, desc="finish", disable=hide, unit="batch"):
            found = scores(blora, blora.model.prepared(batch))
            yield {name: found[name] for name in families}

    def loss(num_samples: int) -> float:
        return anchor_loss(blora, batches, num_samples)

    with running(blora, precision, training=False):
        count = blora.likelihood.num_data
        evidence = Evidence(all_scores, loss, None if count is None else count - num_held_out)
        return type(next(iter(families.values()))).finish(families, evidence)


def scores(blora: BayesianLoRA, batch: Batch) -> dict[str, Tensor]:
    """``g_bc`` of :class:`~pyro_blora.guides._post_hoc.Evidence` at the guide's center, by site."""
    logits, jacobian = logit_jacobian(blora.model, blora.guide, batch)
    p = logits.softmax(-1)
    found = {}
    for name, J in jacobian.items():
        weight = p.reshape(*p.shape, *(1,) * (J.dim() - 2))
        found[name] = weight.sqrt() * (J - (weight * J).sum(1, keepdim=True))
    return found


@torch.no_grad()
def anchor_loss(blora: BayesianLoRA, batches: Iterable[Batch], num_samples: int) -> float:
    """Mean negative log-likelihood of draws in nats per example, with the same noise every time."""
    total, count = 0.0, 0
    with forked_rng(blora.model.groups[0].device):
        torch.manual_seed(0)
        for batch in map(blora.model.prepared, batches):
            rows = repeat_batch(batch, num_samples)
            updates = blora.sample_updates(num_samples * batch.examples, batch)
            with blora.model.applied(updates) as net:
                logits = blora.likelihood.logits(net, rows)
            labels = blora.likelihood.labels(rows)
            assert labels is not None
            q = blora.likelihood.distribution(logits, labels)
            total -= float(q.log_prob(labels).sum()) / num_samples
            count += batch.examples
    return total / count
