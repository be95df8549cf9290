"""Layer scales drawn from a common hyperprior."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_blora.models._update_model import Core
from pyro_blora.models.kronecker_inducing import KroneckerInducing


class Hierarchical(KroneckerInducing):
    r"""A Kronecker inducing prior whose scales share strength across the layers of a group.

    .. math::

        \tau \sim \mathrm{HalfCauchy}(s), \qquad z_l \sim \mathcal{N}(0, 1), \qquad
        \sigma_l = \tau\, e^{\omega z_l}.

    Layers that learn little pull the common scale down, and each layer can still depart from it.

    Args:
        rank: as in :class:`KroneckerInducing`. Default: 8.
        sigma: ``s``, the scale of the hyperprior. Default: 0.3.
        spread: ``omega``, the standard deviation of ``log sigma`` between layers. Default: 0.5.
        core, noise_init: as in :class:`KroneckerInducing`. Defaults: normal, 0.1.

    Sites, for a group ``g`` of ``n`` layers: ``g.tau``, batch shape ``()``; ``g.z``, ``(n,)``;
    ``g.V``, ``(n,)``, event shape ``(m_r, m_c)``.

    Reference:
        Gelman 2006, "Prior distributions for variance parameters in hierarchical models".

    Example::

        blora = BayesianLoRA(net, prior=Hierarchical(rank=8, spread=1.0))
    """

    no_start: ClassVar[str] = "its scales are random"

    def __init__(
        self,
        *,
        rank: int | tuple[int, int] = 8,
        sigma: float = 0.3,
        spread: float = 0.5,
        core: Core = "normal",
        noise_init: float = 0.1,
    ) -> None:
        super().__init__(rank=rank, sigma=sigma, scale="fixed", core=core, noise_init=noise_init)
        self.check_positive("spread")

    def layer_scale(self) -> Tensor:
        """Samples the scales, ``(..., n)``."""
        tau = pyro.sample(self.site("tau"), dist.HalfCauchy(self.sigma_start.mean()))
        with self.plate():
            z = pyro.sample(self.site("z"), self.normal(), infer={"nonlinear": True})
        return tau * (self.spread * z).exp()
