"""The guide of a whole model: one bound guide family for each latent site."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides._site_guide import Site, SiteGuide

__all__ = ["StructuredGuide", "latent_sites", "start_guide"]


def latent_sites(trace: Trace) -> list[Site]:
    """The latent sites of a trace of the prior, in order."""
    return [
        Site(name, node["fn"], tuple(f for f in node["cond_indep_stack"] if f.vectorized))
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and type(node["fn"]).__name__ != "_Subsample"
    ]


def start_guide(guide: nn.Module, batch: Mapping[str, Any] | None) -> None:
    """Runs a guide that reads the model at its first call, as AutoGuides do; others it leaves be.

    Args:
        guide: any guide.
        batch: a batch with labels.

    Raises:
        ConfigurationError: the guide has no parameters yet and there are no labels, without which
            it would take them for latent.
    """
    if any(True for _ in guide.parameters()):
        return
    if batch is None or batch.get("labels") is None:
        raise ConfigurationError(
            f"{type(guide).__name__} reads the model at its first call, which needs labels: train "
            "first, or call blora.guide(batch) with a batch of the training set."
        )
    with torch.no_grad():
        guide(batch)


class StructuredGuide(PyroModule):
    """q over all sites: the product of one :class:`SiteGuide` for each.

    Its sites have the names, plates and order of the model's, as
    :class:`~pyro.infer.TraceMeanField_ELBO` requires.

    Args:
        family: a guide family, copied for each site.
        sites: the latent sites of the prior.
        kl_weight: a function that gives the weight of the KL, so that model and guide are
            tempered from one place.
    """

    def __init__(
        self, family: SiteGuide, sites: list[Site], kl_weight: Callable[[], float]
    ) -> None:
        super().__init__()
        self._kl_weight = kl_weight
        self._site_guides: list[tuple[Site, str]] = []
        for site in sites:
            attribute = site.name.replace(".", "_")
            self._site_guides.append((site, attribute))
            setattr(self, attribute, family.bind(site))

    def forward(self, batch: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Samples every site; ``batch`` is accepted as the model's argument and not read.

        Returns:
            The sampled values by site name.
        """
        values = {}
        with pyro.poutine.scale(scale=self._kl_weight()):
            for site, attribute in self._site_guides:
                q = getattr(self, attribute)()
                with ExitStack() as stack:
                    for frame in site.plates:
                        stack.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
                    values[site.name] = pyro.sample(site.name, q)
        return values

    def center(self) -> dict[str, Tensor]:
        """The value that stands for q at each site: the image of its mean."""
        return {site.name: getattr(self, name).center() for site, name in self._site_guides}
