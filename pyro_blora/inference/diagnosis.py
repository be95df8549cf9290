"""Why a loss is not finite."""

import pyro
import torch
from torch import nn

from pyro_blora.errors import NonFiniteLossError
from pyro_blora.likelihoods import Batch

__all__ = ["explain_non_finite"]


def explain_non_finite(
    model: nn.Module, guide: nn.Module, batch: Batch, step: int
) -> NonFiniteLossError:
    """The error to raise for a NaN or infinite loss: which parameter or site is at fault."""
    bad = [
        name.removesuffix("_unconstrained")
        for module in (model, guide)
        for name, parameter in module.named_parameters()
        if not bool(parameter.isfinite().all())
    ]
    if bad:
        return NonFiniteLossError(
            f"The loss is not finite at step {step}: the parameters {', '.join(bad[:6])} are not. "
            "Lower the learning rates, or clip gradients with max_grad_norm."
        )
    sites: list[str] = []
    with torch.no_grad(), pyro.validation_enabled(False):
        q = pyro.poutine.trace(guide).get_trace(batch)
        p = pyro.poutine.trace(pyro.poutine.replay(model, trace=q)).get_trace(batch)
        for label, trace in (("guide", q), ("model", p)):
            trace.compute_log_prob()
            for name in [*trace.stochastic_nodes, *trace.observation_nodes]:
                node = trace.nodes[name]
                if not bool(torch.as_tensor(node["value"]).isfinite().all()):
                    sites.append(f"{name} in the {label} (its value)")
                elif not bool(node["log_prob_sum"].isfinite()):
                    sites.append(f"{name} in the {label} (its log-probability)")
    where = ", ".join(sites) or "none in a second evaluation of the same batch"
    return NonFiniteLossError(
        f"The loss is not finite at step {step}; not finite are: {where}. Lower the learning "
        "rates, lower the prior's sigma, or use precision='float32'."
    )
