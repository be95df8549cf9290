"""The largest isotropic width that the loss on an anchor set allows."""

import math
from collections.abc import Sequence

import torch

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.guides._site_guide import forked_rng
from pyro_blora.guides.isotropic import Isotropic
from pyro_blora.likelihoods import Batch
from pyro_blora.posterior.bayesian_lora_model import repeat_batch
from pyro_blora.posterior.structured_guide import StructuredGuide

__all__ = ["anchor_loss", "fit_isotropic"]


@torch.no_grad()
def anchor_loss(blora: BayesianLoRA, batches: Sequence[Batch], num_samples: int) -> float:
    """Mean negative log-likelihood of draws in nats for each example, the same noise every time.

    Args:
        blora: the adapter.
        batches: the anchor set, with labels.
        num_samples: draws, one for each example and repetition.
    """
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


def fit_isotropic(blora: BayesianLoRA, batches: Sequence[Batch]) -> float:
    """Finds the width by bisection of its logarithm and finishes every :class:`Isotropic` family.

    Args:
        blora: the trained adapter.
        batches: the anchor set, with labels.

    Returns:
        The width; the loss at it exceeds that of the point by at most the family's threshold, but
        where even a thousandth of ``max_width`` exceeds it: then it is that.
    """
    assert isinstance(blora.guide, StructuredGuide)
    families = [f for f in blora.guide.families().values() if isinstance(f, Isotropic)]
    first = families[0]

    def loss(width: float) -> float:
        for family in families:
            family.finish(width)
        return anchor_loss(blora, batches, first.num_samples)

    allowed = loss(0.0) + first.threshold  # of the point, under the noise that all widths have

    def fits(log_width: float) -> bool:
        return loss(math.exp(log_width)) <= allowed

    high = math.log(first.max_width)
    low = high - math.log(1000)
    if fits(high):
        low = high
    else:
        for _ in range(first.iterations):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    for family in families:
        family.finish(math.exp(low))
    return math.exp(low)
