"""A point estimate, as in MAP training."""

from typing import ClassVar

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam

from pyro_blora.guides._site_guide import Site, SiteGuide


class Delta(SiteGuide):
    r"""A point mass, :math:`q(U) = \delta(U - u)`; the ELBO is then the MAP objective.

    With ``KroneckerInducing(conditional="deterministic")`` this is plain LoRA with
    ``B = sigma T_r U``, ``A = T_c`` and a Gaussian penalty on ``U``.

    Parameters, for a site of batch shape ``(n,)``: ``loc``, ``(n, *event_shape)``.

    Example::

        blora = BayesianLoRA(net, guide=Delta())
    """

    roles: ClassVar[dict[str, str]] = {"loc": "mean"}
    is_point: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean."""
        self.loc = PyroParam(site.start()[0])

    def distribution(self) -> TorchDistribution:
        """The point mass at ``loc``."""
        return dist.Delta(self.loc, event_dim=self.site.event_dim)
