r"""The Jacobian of a batch's logits with respect to the sites, at the centre of the guide.

The centre is the mean of the unconstrained values. Where a scale is random the update there is not
the mean update, but any point near the draws serves an expansion.

With a particle for each example every example has its own copy of the core, so that one backward
pass for a class gives that row of the Jacobian of *every* example. A softmax knows its logits up to
a common shift, so class 0 stands still and ``C - 1`` passes do.
"""

import pyro
import torch
from torch import Tensor

from pyro_blora.adapted import Adapted
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import Batch
from pyro_blora.posterior.bayesian_lora_model import repeat_batch
from pyro_blora.posterior.structured_guide import StructuredGuide

__all__ = ["logit_jacobian"]


@torch.inference_mode(False)  # which forbids derivatives
def logit_jacobian(blora: Adapted, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at the guide's centre, and their Jacobian in unconstrained coordinates.

    Args:
        blora: the adapter, with a guide family of this library; evaluated in the mode it is in.
        batch: ``B`` examples.

    Returns:
        The logits, ``(B, C)``, without gradient, and for each site ``d(logit_c - logit_0)``,
        ``(B, C, n, *event_shape)``, zero for ``c = 0``.

    Raises:
        ConfigurationError: the guide is not of this library, or the likelihood has more than one
            choice for each example.
    """
    guide = blora.guide
    if not isinstance(guide, StructuredGuide):
        raise ConfigurationError(
            f"{type(guide).__name__} is not a family of pyro_blora.guides, whose centre a "
            "linearisation needs; use num_samples draws."
        )
    examples = blora.likelihood.examples(batch)
    batch = repeat_batch(batch, 1)  # a copy, for autograd keeps no tensor made in inference mode
    families = guide.families()
    leaves: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        centre = guide.center(batch)
    for name, family in families.items():
        site = family.site
        point = centre[name] if site.is_real else site.transform.inv(centre[name])
        outside = (1,) * (guide.nesting - len(site.batch_shape))
        point = point.reshape(-1, *outside, *site.shape)  # of each example, or one for all
        leaf = point.expand(examples, *point.shape[1:]).clone().requires_grad_()
        leaves[name] = leaf
    with torch.enable_grad():
        for name, leaf in leaves.items():
            site = families[name].site
            values[name] = leaf if site.is_real else site.transform(leaf)
        updates = pyro.poutine.condition(blora.model.updates, data=values)()
        updates = {name: update.without_noise() for name, update in updates.items()}
        with blora.model.applied(updates) as net:
            logits = blora.likelihood.logits(net, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.dim() != 2:
            raise ConfigurationError(
                "A linearisation needs one choice among a few classes for each example, (B, C) "
                f"logits; {type(blora.likelihood).__name__} has {tuple(logits.shape)}."
            )
        rows = [[torch.zeros_like(leaf) for leaf in leaves.values()]]
        for c in range(1, logits.shape[-1]):
            total = (logits[:, c] - logits[:, 0]).sum()
            keep = c + 1 < logits.shape[-1]
            rows.append(list(torch.autograd.grad(total, list(leaves.values()), retain_graph=keep)))
    jacobian = {}
    for name, site_rows in zip(leaves, zip(*rows, strict=True), strict=True):
        stacked = torch.stack(site_rows, 1)
        jacobian[name] = stacked.reshape(*stacked.shape[:2], *families[name].site.shape)
    return logits.detach(), jacobian
