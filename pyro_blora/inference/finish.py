"""What follows training for the guides that find their width afterwards."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.guides._post_hoc import Evidence, PostHoc
from pyro_blora.guides._site_guide import forked_rng
from pyro_blora.inference.loop import Collate, batches_of
from pyro_blora.likelihoods import Batch
from pyro_blora.network.adapter import in_mode
from pyro_blora.network.precision import choose_precision
from pyro_blora.posterior.bayesian_lora_model import repeat_batch, to_device
from pyro_blora.posterior.guide import StructuredGuide
from pyro_blora.posterior.predictive import logit_jacobian

__all__ = ["anchor_loss", "finish", "post_hoc_families", "running", "scores"]


def post_hoc_families(guide: object) -> dict[str, PostHoc]:
    """The families that find their width after training (``Laplace``, ``Isotropic``), by site."""
    if not isinstance(guide, StructuredGuide):
        return {}
    return {name: f for name, f in guide.families().items() if isinstance(f, PostHoc)}


@contextmanager
def running(blora: BayesianLoRA, precision: str, *, training: bool) -> Iterator[None]:
    """Within, the network is in this precision and mode; afterwards all is as before."""
    model = blora.model
    before = model.kl_weight, model.precision
    model.precision = choose_precision(precision, model.groups[0].device)
    try:
        with in_mode(blora.net, training=training), pyro.validation_enabled(False):
            yield
    finally:
        model.kl_weight, model.precision = before


def finish(
    blora: BayesianLoRA,
    data: Sequence[Any] | DataLoader[Any],
    *,
    collate: Collate | None = None,
    length: Callable[[Any], int] | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
) -> dict[str, float]:
    """Gives a post-hoc guide (``Laplace``, ``Isotropic``) its width; ``fit`` calls it at its end.

    Args:
        blora: the trained adapter.
        data: the training set for ``Laplace``, whose curvature is scaled to ``num_data``; the
            anchor set for ``Isotropic``. Or a ``DataLoader`` of batches.
        collate: makes a batch of a list of examples.
        length: the length of an example; batches of like lengths waste no padding.
        batch_size: examples at once.
        precision: of the network, as in ``fit``.
        progress: whether to show a progress bar; ``None`` shows it on a terminal.

    Returns:
        What the family says of its width: ``Laplace`` the prior precision of each site,
        ``Isotropic`` the width.

    Raises:
        ConfigurationError: the guide is not one of these, or ``collate`` is missing.
        BatchError: there is no data.
    """
    families = post_hoc_families(blora.guide)
    if not families:
        raise ConfigurationError(
            "finish is for guides that find their width after training (Laplace, Isotropic), not "
            f"for {blora.guide_family!r}."
        )
    if not isinstance(data, DataLoader) and collate is None:
        raise ConfigurationError("finish needs collate=, which makes batches of examples.")
    batches = list(batches_of(data, collate, length, batch_size))
    if not batches:
        raise BatchError("There is nothing to finish with: the data set is empty.")
    device = blora.model.groups[0].device
    hide = None if progress is None else not progress

    def all_scores() -> Iterator[dict[str, Tensor]]:
        for batch in tqdm(batches, desc="finish", disable=hide, unit="batch"):
            found = scores(blora, to_device(batch, device))
            yield {name: found[name] for name in families}

    def loss(num_samples: int) -> float:
        return anchor_loss(blora, (to_device(batch, device) for batch in batches), num_samples)

    with running(blora, precision, training=False):
        evidence = Evidence(all_scores, loss, blora.likelihood.num_data)
        return type(next(iter(families.values()))).finish(families, evidence)


def scores(blora: BayesianLoRA, batch: Batch) -> dict[str, Tensor]:
    """``g_bc`` of :class:`~pyro_blora.guides._post_hoc.Evidence` at the guide's centre, by site.

    Raises:
        ConfigurationError: the likelihood has more than one choice for each example.
    """
    logits, jacobian = logit_jacobian(blora.model, blora.guide, batch)
    p = logits.softmax(-1)
    found = {}
    for name, J in jacobian.items():
        weight = p.reshape(*p.shape, *(1,) * (J.dim() - 2))
        found[name] = weight.sqrt() * (J - (weight * J).sum(1, keepdim=True))
    return found


@torch.no_grad()
def anchor_loss(blora: BayesianLoRA, batches: Iterable[Batch], num_samples: int) -> float:
    """Mean negative log-likelihood of draws in nats for each example, the same noise every time."""
    total, count = 0.0, 0
    with forked_rng(blora.model.groups[0].device):
        torch.manual_seed(0)
        for batch in batches:
            examples = blora.likelihood.examples(batch)
            rows = repeat_batch(batch, num_samples)
            updates = blora.sample_updates(num_samples * examples, batch)
            with blora.model.applied(updates) as net:
                logits = blora.likelihood.logits(net, rows)
            labels = blora.likelihood.labels(rows)
            assert labels is not None
            q = blora.likelihood.distribution(logits, labels)
            total -= float(q.log_prob(labels).sum()) / num_samples
            count += examples
    return total / count
