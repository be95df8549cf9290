"""Draws of the sites that are not the guide's: those of MCMC, or any values by site."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.sample_updates import updates_at
from pyro_blora.updates.low_rank_update import LowRankUpdate

__all__ = ["Samples", "draws_given"]

Samples = Mapping[str, Tensor]  # by site, (S, *shape of the site), as MCMC.get_samples has them


def draws_given(
    model: BayesianLoRAModel, samples: Samples
) -> tuple[int, Callable[[int], dict[str, LowRankUpdate]]]:
    """The number of draws ``S``, and a function that gives the updates at the next few of them.

    Args:
        model: the model, whose sites these are.
        samples: for each latent site, by its name, values of shape ``(S, *shape)``, where ``shape``
            is the site's own, the ``n`` layers of its group first.

    Returns:
        ``S``, and a function of how many of the draws are next; the factors of the updates have
        as many in a leading dimension.

    Raises:
        ConfigurationError: a site is missing or unknown, or its values are no tensor, of another
            shape or number than the others', or outside of the support of its prior.
    """
    number = _checked(model, samples)
    values = {}
    for site in model.sites:
        value = _moved(samples[site.name], model)
        outside = (1,) * (model.max_plate_nesting - len(site.batch_shape))
        values[site.name] = value.reshape(len(value), *outside, *value.shape[1:])
    done = 0

    @torch.no_grad()
    def draw(count: int) -> dict[str, LowRankUpdate]:
        nonlocal done
        part = {name: value[done : done + count] for name, value in values.items()}
        done += count
        return updates_at(model, part, count)

    return number, draw


def _checked(model: BayesianLoRAModel, samples: Samples) -> int:
    """The number of draws, once every site of the model is seen to have as many."""
    sites = {site.name: site.prior for site in model.sites}
    for name in samples:
        if name not in sites:
            raise ConfigurationError(
                f"samples has {name!r}, which is no latent site of the model; leave it out, or "
                f"{near_miss(str(name), sites)}."
            )
    if missing := sorted(set(sites) - set(samples)):
        raise ConfigurationError(
            f"samples lacks the sites {', '.join(missing)}; give values of every latent site."
        )
    counts = {}
    for name, prior in sites.items():
        value, shape = samples[name], tuple(prior.shape())
        if not isinstance(value, Tensor):
            raise ConfigurationError(
                f"samples[{name!r}] is a {type(value).__name__}, expected a tensor."
            )
        if value.dim() == 0 or not len(value) or tuple(value.shape[1:]) != shape:
            wanted = ", ".join(map(str, ("S", *shape)))
            raise ConfigurationError(
                f"samples[{name!r}] has shape {tuple(value.shape)}, expected ({wanted}): S draws, "
                "S >= 1, of the site's own shape. Chains are joined: get_samples() without "
                "group_by_chain."
            )
        counts[name] = len(value)
        if not bool(prior.support.check(_moved(value, model)).all()):
            raise ConfigurationError(
                f"samples[{name!r}] has values that are not finite or outside of the support of "
                f"its prior, {prior.support}; give the values of the site itself, not "
                "unconstrained ones."
            )
    if len(set(counts.values())) > 1:
        raise ConfigurationError(
            f"samples has different numbers of draws, {counts}; give as many of each site."
        )
    return next(iter(counts.values()))


def _moved(value: Tensor, model: BayesianLoRAModel) -> Tensor:
    """The value on the model's device, as precise as its parameters."""
    dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
    return value.to(model.groups[0].device, dtype)
