"""A normal whose covariance is of low rank plus a diagonal."""

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch.distributions import constraints

from pyro_blora.distributions import Reshaped
from pyro_blora.errors import check_count
from pyro_blora.guides._site_guide import Site, SiteGuide


class LowRank(SiteGuide):
    r"""A normal with a few directions of correlation for each layer.

    .. math::

        q(\mathrm{vec}\,U) = \mathcal{N}(\mu, F F^\top + \mathrm{diag}(s)^2), \qquad
        F \in \mathbb{R}^{k \times r}, \quad k = m_r m_c.

    Args:
        rank: ``r``, the number of directions, capped at ``k``. Default: 4.
        init_scale: standard deviation at the start in units of the prior's. Default: 0.01.

    Parameters, for a site of batch shape ``(n,)``: ``loc`` and ``scale``, ``(n, *event_shape)``,
    and ``factor``, ``(n, k, r)``, which accounts for a hundredth of the variance at the start.

    Reference:
        Ong, Nott, Smith 2018, on factor covariance structure, arXiv:1701.03208.

    Example::

        blora = BayesianLoRA(net, guide=LowRank(rank=8))
    """

    roles: ClassVar[dict[str, str]] = {"loc": "mean", "scale": "scale", "factor": "scale"}
    symmetric: ClassVar[bool] = True

    def __init__(self, *, rank: int = 4, init_scale: float = 0.01) -> None:
        super().__init__(init_scale=init_scale)
        check_count("LowRank: rank", rank)

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean, ``factor`` and ``scale``."""
        loc, scale = site.start()
        scale = self.init_scale * scale
        flat = scale.reshape(*site.batch_shape, site.size)
        rank = min(self.rank, site.size)
        factor = 0.1 * torch.randn(*flat.shape, rank, device=flat.device) * rank**-0.5
        factor = factor.clamp(-0.5 * rank**-0.5, 0.5 * rank**-0.5) * flat.unsqueeze(-1)
        self.loc = PyroParam(loc)
        self.factor = PyroParam(factor)
        rest = (flat.square() - factor.square().sum(-1)).sqrt()
        self.scale = PyroParam(rest.reshape(scale.shape), constraints.positive)

    def distribution(self) -> TorchDistribution:
        """The normal, with the event shape of the site."""
        flat = (*self.site.batch_shape, self.site.size)
        q = dist.LowRankMultivariateNormal(
            self.loc.reshape(flat), self.factor, self.scale.square().reshape(flat)
        )
        return Reshaped(q, self.site.event_shape)
