"""Independent normals."""

from typing import ClassVar

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch.distributions import constraints

from pyro_blora.guides._site_guide import Site, SiteGuide


class MeanField(SiteGuide):
    r"""Independent normals, :math:`q(U) = \prod_{ij} \mathcal{N}(U_{ij}; \mu_{ij}, s_{ij}^2)`.

    If the posterior is correlated, this guide finds conditional variances, which are too small.

    Args:
        init_scale: standard deviation at the start in units of the prior's. Default: 0.01.

    Parameters, for a site of batch shape ``(n,)``: ``loc`` and ``scale``, ``(n, *event_shape)``.

    Example::

        blora = BayesianLoRA(net, guide=MeanField(init_scale=0.05))
    """

    roles: ClassVar[dict[str, str]] = {"loc": "mean", "scale": "scale"}
    symmetric: ClassVar[bool] = True

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean and ``scale`` at ``init_scale`` times its scale."""
        loc, scale = site.start()
        self.loc = PyroParam(loc)
        self.scale = PyroParam(self.init_scale * scale, constraints.positive)

    def distribution(self) -> TorchDistribution:
        """``Normal(loc, scale)``, as one event."""
        return dist.Normal(self.loc, self.scale).to_event(self.site.event_dim)
