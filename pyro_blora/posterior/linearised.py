r"""The Jacobian of a batch's logits with respect to the sites, at the centre of the guide.

The centre is the mean of the unconstrained values. Where a scale is random the update there is not
the mean update, but any point near the draws serves an expansion.

With a particle for each example every example has its own copy of the core, so that one backward
pass for a class gives that row of the Jacobian of *every* example. A softmax knows its logits up to
a common shift, so class 0 stands still and ``C - 1`` passes do.
"""

import pyro
import torch
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import Batch
from pyro_blora.network.adapter import in_mode
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel, repeat_batch
from pyro_blora.posterior.sample_updates import sample_updates
from pyro_blora.posterior.structured_guide import StructuredGuide

__all__ = ["linearised_logits", "logit_jacobian"]


@torch.inference_mode(False)  # which forbids derivatives
def logit_jacobian(
    model: BayesianLoRAModel, guide: nn.Module, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at the guide's centre, and their Jacobian in unconstrained coordinates.

    The network is evaluated in the mode it is in.

    Returns:
        The logits, ``(B, C)``, without gradient, and for each site ``d(logit_c - logit_0)``,
        ``(B, C, n, *event_shape)``, zero for ``c = 0``.

    Raises:
        ConfigurationError: the guide is not of this library, or the likelihood has more than one
            choice for each example.
    """
    if not isinstance(guide, StructuredGuide):
        raise ConfigurationError(
            f"{type(guide).__name__} is not a family of pyro_blora.guides, whose centre a "
            "linearisation needs; use num_samples draws."
        )
    examples = model.likelihood.examples(batch)
    batch = repeat_batch(batch, 1)  # a copy, for autograd keeps no tensor made in inference mode
    sites = {name: family.site for name, family in guide.families().items()}
    leaves: dict[str, Tensor] = {}
    with torch.no_grad():
        centre = guide.center(batch)
    for name, site in sites.items():
        point = site.transform.inv(centre[name])
        outside = (1,) * (guide.nesting - len(site.batch_shape))
        point = point.reshape(-1, *outside, *site.shape)  # of each example, or one for all
        leaves[name] = point.expand(examples, *point.shape[1:]).clone().requires_grad_()
    with torch.enable_grad():
        values = {name: sites[name].transform(x) for name, x in leaves.items()}
        updates = pyro.poutine.condition(model.updates, data=values)()
        updates = {name: update.without_noise() for name, update in updates.items()}
        with model.applied(updates) as net:
            logits = model.likelihood.logits(net, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.dim() != 2:
            raise ConfigurationError(
                "A linearisation needs one choice among a few classes for each example, (B, C) "
                f"logits; {type(model.likelihood).__name__} has {tuple(logits.shape)}."
            )
        rows = [[torch.zeros_like(leaf) for leaf in leaves.values()]]
        for c in range(1, logits.shape[-1]):
            total = (logits[:, c] - logits[:, 0]).sum()
            keep = c + 1 < logits.shape[-1]
            rows.append(list(torch.autograd.grad(total, list(leaves.values()), retain_graph=keep)))
    stacked = (torch.stack(site_rows, 1) for site_rows in zip(*rows, strict=True))
    return logits.detach(), {
        name: J.reshape(*J.shape[:2], *site.shape)
        for (name, site), J in zip(sites.items(), stacked, strict=True)
    }


@torch.no_grad()
def linearised_logits(
    model: BayesianLoRAModel, guide: nn.Module, batch: Batch, num_samples: int
) -> Tensor:
    r"""Draws of the logits by their first-order expansion in the sites at the guide's centre.

    .. math::

        f(U_s) \approx f(\bar U) + J (U_s - \bar U), \qquad U_s \sim q,

    for any guide family, in unconstrained coordinates. The network runs forward once and backward
    once for each class but the first, with dropout off; a draw costs one product with :math:`J`.

    Returns:
        ``(S, B, C)``.

    Raises:
        ConfigurationError: ``num_samples`` is below 1, the guide is none of this library, or the
            likelihood has more than one choice for each example.
    """
    if num_samples < 1:
        raise ConfigurationError(f"num_samples={num_samples} must be at least 1 to linearise.")
    model.check_on_network()
    if any(u.is_noisy for u in sample_updates(model, guide, 1, batch).values()):
        raise ConfigurationError(
            "A linearisation has no place for the noise of a conditional; use num_samples draws, "
            "or a prior with conditional='deterministic'."
        )
    with in_mode(model.net, training=False):
        logits, jacobian = logit_jacobian(model, guide, batch)
    assert isinstance(guide, StructuredGuide)
    drawn = logits.repeat(num_samples, 1, 1)
    with torch.autocast(logits.device.type, enabled=False):
        for name, family in guide.families().items():
            centre = family.site.transform.inv(family.center())
            moved = family.distribution().sample(torch.Size([num_samples])) - centre
            size = family.site.shape.numel()
            moved = moved.reshape(num_samples, -1, size)  # the second is B, or one for all
            J = jacobian[name].reshape(*logits.shape, size).to(moved.dtype)
            drawn += torch.einsum("bck,sbk->sbc", J, moved.expand(-1, len(logits), -1))
    return drawn
