"""An ensemble: several point estimates trained side by side."""

from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor

from pyro_blora.distributions import Members
from pyro_blora.errors import check_count
from pyro_blora.guides._site_guide import Site, SiteGuide


class Ensemble(SiteGuide):
    r"""Point masses, :math:`q(U) = \frac1K \sum_k \delta(U - u_k)`.

    The particles take the members in turn, and all layers take the same one, so that a multiple of
    ``K`` draws averages over all members equally. The KL of a point mass to a density is infinite;
    as in :class:`Delta` its entropy, which is constant, is left out. The objective is therefore *no
    bound* on the evidence, but the mean of the members' MAP objectives,
    :math:`\frac1K \sum_k \log p(D, u_k)`.

    Args:
        members: ``K``. Default: 5.
        spread: standard deviation of the members at the start, around the prior's mean and in units
            of the prior's standard deviation. Default: 0.1.

    Parameters, for a site of batch shape ``(n,)``: ``points``, ``(K, n, *event_shape)``. Buffer:
    ``turn``, the index of the next member.

    Reference:
        Lakshminarayanan, Pritzel, Blundell 2017, arXiv:1612.01474; for LoRA, Wang, Aitchison,
        Rudolph 2023, "LoRA ensembles for large language model fine-tuning", arXiv:2310.00035.

    Example::

        blora = BayesianLoRA(net, guide=Ensemble(members=5))
        blora.predict(batch, num_samples=5)  # every member once
    """

    roles: ClassVar[dict[str, str]] = {"points": "mean"}
    couples_sites: ClassVar[bool] = True  # a draw takes the same member at every site
    turn: Tensor

    def __init__(self, *, members: int = 5, spread: float = 0.1) -> None:
        super().__init__()
        check_count("Ensemble: members", members, 2, "; use Delta for one")

    def setup(self, site: Site) -> None:
        """Registers ``points`` around the prior's mean."""
        loc, scale = site.start()
        noise = torch.randn(self.members, *loc.shape, device=loc.device)
        self.points = PyroParam(loc + self.spread * scale * (noise - noise.mean(0)))
        self.register_buffer("turn", torch.zeros((), dtype=torch.long, device=loc.device))

    def distribution(self) -> TorchDistribution:
        """The members, beginning with the next in turn."""
        return Members(self.points, self.site.event_dim, self.turn)
