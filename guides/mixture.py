"""A mixture of mean-field normals, for posteriors with several modes."""

from typing import ClassVar

import torch
from pyro.distributions import Categorical, Normal
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch.distributions import constraints

from pyro_blora.distributions import NormalMixture
from pyro_blora.errors import check_count
from pyro_blora.guides._site_guide import Site, SiteGuide


class Mixture(SiteGuide):
    r"""A mixture of ``components`` mean-field normals for each layer.

    .. math::

        q(U) = \frac1K \sum_k \prod_{ij} \mathcal{N}(U_{ij}; \mu_{kij}, s_{kij}^2).

    Each layer chooses its component independently, with equal probabilities; several components
    may coincide to give a mode more weight. The KL has no closed form, so the ELBO estimates it.

    Args:
        components: ``K``, at least 2. Default: 3.
        init_scale: a component's initial standard deviation in units of the prior's. Default: 0.01.
        spread: standard deviation of the components' means at the start, around the prior's mean
            and in units of the prior's standard deviation. Default: 0.01.

    Parameters, for a site of batch shape ``(n,)``: ``locs`` and ``scales``, ``(K, n,
    *event_shape)``.

    Reference:
        Jaakkola, Jordan 1998, "Improving the mean field approximation via the use of mixture
        distributions".

    Example::

        blora = BayesianLoRA(net, guide=Mixture(components=4))
    """

    roles: ClassVar[dict[str, str]] = {"locs": "mean", "scales": "scale"}

    def __init__(
        self, *, components: int = 3, init_scale: float = 0.01, spread: float = 0.01
    ) -> None:
        super().__init__(init_scale=init_scale)
        check_count("Mixture: components", components, 2, "; use MeanField for one")

    def setup(self, site: Site) -> None:
        """Registers ``locs`` around the prior's mean, and ``scales``."""
        loc, scale = site.start()
        noise = torch.randn(self.components, *loc.shape, device=loc.device)
        self.locs = PyroParam(loc + self.spread * scale * (noise - noise.mean(0)))
        scales = (self.init_scale * scale).expand_as(noise).clone()
        self.scales = PyroParam(scales, constraints.positive)

    def distribution(self) -> TorchDistribution:
        """The mixture, of batch shape ``(n,)``."""
        last = -1 - self.site.event_dim
        normals = Normal(self.locs.movedim(0, last), self.scales.movedim(0, last))
        normals = normals.to_event(self.site.event_dim)
        return NormalMixture(Categorical(logits=self.locs.new_zeros(normals.batch_shape)), normals)
