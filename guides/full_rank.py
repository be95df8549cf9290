"""A normal with a full covariance for each layer."""

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch.distributions import constraints

from pyro_blora.distributions import Reshaped
from pyro_blora.guides._site_guide import Site, SiteGuide


class FullRank(SiteGuide):
    r"""A normal with all correlations within a layer, and none between layers.

    .. math::

        q(\mathrm{vec}\,U) = \mathcal{N}(\mu, L L^\top), \qquad
        L \in \mathbb{R}^{k \times k}, \quad k = m_r m_c.

    A site of more than ``max_size`` entries, 1024, such as a factor of a LoRA, is an error.

    Args:
        init_scale: standard deviation at the start in units of the prior's. Default: 0.01.

    Parameters, for a site of batch shape ``(n,)``: ``loc``, ``(n, *event_shape)``, and
    ``scale_tril``, ``(n, k, k)``.

    Example::

        blora = BayesianLoRA(net, guide=FullRank())
    """

    roles: ClassVar[dict[str, str]] = {"loc": "mean", "scale_tril": "scale"}
    symmetric: ClassVar[bool] = True
    max_size: ClassVar[int] = 1024

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean and ``scale_tril``, diagonal."""
        self.check_size(site, "max_size", site.size)
        loc, scale = site.start()
        flat = (self.init_scale * scale).reshape(*site.batch_shape, site.size)
        self.loc = PyroParam(loc)
        self.scale_tril = PyroParam(torch.diag_embed(flat), constraints.lower_cholesky)

    def distribution(self) -> TorchDistribution:
        """The normal, with the event shape of the site."""
        loc = self.loc.reshape(*self.site.batch_shape, self.site.size)
        q = dist.MultivariateNormal(loc, scale_tril=self.scale_tril)
        return Reshaped(q, self.site.event_shape)
