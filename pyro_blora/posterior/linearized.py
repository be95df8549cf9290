"""The logits' first-order expansion at the guide's center, and draws of it."""

import pyro
import torch
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import Batch
from pyro_blora.likelihoods.reading import in_single_precision
from pyro_blora.network.adapter import in_mode
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel, repeat_batch, row_of
from pyro_blora.posterior.guide import StructuredGuide


@torch.inference_mode(False)  # off, because inference mode forbids derivatives
def logit_jacobian(
    model: BayesianLoRAModel, guide: nn.Module, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at the guide's center, ``(B, C)``, and ``d(logit_c - logit_0)`` by unconstrained site.

    A particle for each example lets one backward pass per class give that row of every Jacobian,
    ``(B, C, n, *event_shape)``.
    """
    if not isinstance(guide, StructuredGuide):
        raise ConfigurationError(
            "guide must be of a family in pyro_blora.guides to linearize around its center, got "
            f"{type(guide).__name__}; pass linearized=False."
        )
    batch = model.prepared(batch)
    examples = batch.examples
    if examples > 1 and not model.keeps_rows(batch):
        singles = [row_of(batch, k) for k in range(examples)]
        every = [logit_jacobian(model, guide, row) for row in singles]
        jacobians = {name: torch.cat([J[name] for _, J in every]) for name in every[0][1]}
        return torch.cat([logits for logits, _ in every]), jacobians
    batch = repeat_batch(batch, 1)  # a copy, because autograd saves no inference tensor
    sites = {name: family.site for name, family in guide.families().items()}
    leaves: dict[str, Tensor] = {}
    with torch.no_grad():
        center = guide.center()
    for name, site in sites.items():
        outside = (1,) * (model.max_plate_nesting - len(site.batch_shape))
        point = site.transform.inv(center[name]).reshape(*outside, *site.shape)
        leaves[name] = point.repeat(examples, *(1,) * point.dim()).requires_grad_()
    with torch.enable_grad():
        values = {name: sites[name].transform(x) for name, x in leaves.items()}
        updates = pyro.poutine.condition(model.updates, data=values)()
        updates = {name: update.without_noise() for name, update in updates.items()}
        with model.applied(updates) as net:
            logits = model.likelihood.logits(net, batch)
        logits = in_single_precision(logits)
        if logits.dim() != 2:
            raise ConfigurationError(
                "A linearization must have one choice per example, logits (B, C), got those of "
                f"{type(model.likelihood).__name__}, {tuple(logits.shape)}; pass linearized=False."
            )
        rows = [[torch.zeros_like(leaf) for leaf in leaves.values()]]
        for c in range(1, logits.shape[-1]):
            total = (logits[:, c] - logits[:, 0]).sum()
            keep = c + 1 < logits.shape[-1]
            # a site may enter the density of another alone
            slopes = torch.autograd.grad(
                total, list(leaves.values()), retain_graph=keep, materialize_grads=True
            )
            rows.append(list(slopes))
    stacked = (torch.stack(site_rows, 1) for site_rows in zip(*rows, strict=True))
    return logits.detach(), {
        name: J.reshape(*J.shape[:2], *site.shape)
        for (name, site), J in zip(sites.items(), stacked, strict=True)
    }


@torch.no_grad()
def linearized_logits(
    model: BayesianLoRAModel, guide: nn.Module, batch: Batch, num_samples: int
) -> Tensor:
    """Draws of the logits, ``(S, B, C)``, by ``f(c) + J (U_s - c)`` at the guide's center ``c``."""
    if num_samples < 1:
        raise ConfigurationError(f"num_samples={num_samples} must be at least 1 to linearize.")
    model.check_attached()
    with in_mode(model.net, training=False):
        logits, jacobian = logit_jacobian(model, guide, batch)
    assert isinstance(guide, StructuredGuide)
    drawn = logits.repeat(num_samples, 1, 1)
    with torch.autocast(logits.device.type, enabled=False):
        for name, family in guide.families().items():
            center = family.site.transform.inv(family.center())
            moved = family.distribution().sample(torch.Size([num_samples])) - center
            J = jacobian[name].reshape(*logits.shape, -1).to(moved.dtype)
            drawn += torch.einsum("bck,sk->sbc", J, moved.reshape(num_samples, -1))
    return drawn
