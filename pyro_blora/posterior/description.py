"""The groups, the sites and the sizes of an adapter, for people to read."""

from collections.abc import Iterator

from torch import nn

from pyro_blora.guides._site_guide import Site
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.structured_guide import StructuredGuide

__all__ = ["described_groups", "described_size"]


def described_groups(model: BayesianLoRAModel, guide: nn.Module) -> Iterator[str]:
    """A line for each group of layers, for each of its sites, with their parameters, and head."""
    families = guide.families() if isinstance(guide, StructuredGuide) else {}

    def line(site: Site) -> str:
        shape = " x ".join(map(str, site.prior.shape())) or "one number"
        family = families.get(site.name)
        size = "" if family is None else f", {_size(family):,} parameters in the guide"
        return f"    {site.name}: {shape}{size}"

    for group in model.groups:
        size = _size(getattr(model, group.name))
        yield (
            f"  {group.name}: {group.n} layers of {group.d_out} x {group.d_in}, "
            f"{size:,} parameters in the prior"
        )
        yield from (line(site) for site in model.sites if site.group == group.name)
    names = [group.name for group in model.groups]
    yield from (line(site)[2:] for site in model.sites if site.group not in names)
    if not families:
        size = _size(guide)  # an AutoGuide makes them at its first call
        yield (f"  guide: {size:,} parameters" if size else "  guide: no parameters yet")
    yield from (f"  {name}: trained whole, as a point" for name in model.trained_heads.names)


def described_size(trained: int, net: nn.Module) -> str:
    """A line of how many numbers are trained, beside those of the network."""
    frozen = _size(net)
    share = trained / (trained + frozen)
    return f"  trainable: {trained:,} beside {frozen:,} frozen ({share:.2%})"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
