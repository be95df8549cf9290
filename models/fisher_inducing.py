"""Inducing directions along which the network's own gradients lie."""

from typing import ClassVar, Literal

import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_blora.models._core_density import Core, check_core, sample_core
from pyro_blora.models._update_model import UpdateModel
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates.low_rank_update import LowRankUpdate


class FisherInducing(UpdateModel):
    r"""A random core between the top directions of the Fisher information's Kronecker factors.

    The gradient :math:`G = \nabla_{W} \log p(y \mid x)` of a layer is taken before any training,
    with labels that the network itself draws: none of the data's is seen. Its second moments are

    .. math::

        C_r = \mathbb{E}[G G^\top], \qquad C_c = \mathbb{E}[G^\top G], \qquad
        C \approx Z^\top Z

    with :math:`Z` the first :math:`m` eigenvectors, each as long as its eigenvalue's root. A priori

    .. math::

        \Delta W = \sigma\, Z_r^\top V Z_c, \quad V_{ij} \sim \mathcal{N}(0, 1), \qquad
        \text{so that } \Delta W \sim \mathcal{MN}(0, \sigma^2 C_r, C_c)

    cut at rank :math:`m`: an update is expected where the prediction can change. The directions are
    fixed, so the KL counts all that is fitted to the labels but sigma. ``fit`` finds them by
    :func:`~pyro_blora.inference.inform`; until then they are random.

    Args:
        rank: ``m``, or ``(m_r, m_c)``; a smaller layer has all its directions. Default: 32.
        sigma: standard deviation of ``dW`` along directions of mean length, in units of weight; the
            start if it is learned. Default: 0.05.
        scale: ``"learned"`` (the ELBO learns sigma, one for each layer) or ``"fixed"``. Default:
            learned.
        core: the density of the entries of ``V``, as in :class:`KroneckerInducing`. Default:
            normal.

    Sites, for a group ``g`` of ``n`` layers: ``g.V``, batch shape ``(n,)``, event shape
    ``(m_r, m_c)``.

    Reference:
        The factors are those of Martens, Grosse 2015, "Optimizing neural networks with
        Kronecker-factored approximate curvature", arXiv:1503.05671, with an example's tokens summed
        before the square; Wang et al. 2024, "LoRA-GA", arXiv:2407.05000, start a point there.

    Example::

        blora = BayesianLoRA(net, prior=FisherInducing(), guide=MatrixNormal())
        fit(blora, train, collate=collate, num_steps=300)  # finds the directions first
    """

    roles: ClassVar[dict[str, str]] = {"sigma_": "scale"}
    point_epochs: ClassVar[float | None] = 6.0
    no_start: ClassVar[str] = "its directions are those of the network's gradients"
    Z_r: Tensor
    Z_c: Tensor
    informed: Tensor
    _asked = False

    def __init__(
        self,
        *,
        rank: int | tuple[int, int] = 32,
        sigma: float = 0.05,
        scale: Literal["learned", "fixed"] = "learned",
        core: Core = "normal",
    ) -> None:
        super().__init__()
        self.check_positive("rank", "sigma")
        check_core(core)

    def setup(self, group: LayerGroup) -> None:
        """Registers ``Z_r, Z_c`` (n x m x d), which are no parameters, and sigma (n)."""
        m_r, m_c = self.gradient_ranks
        self.register_buffer("Z_r", self.randn(group.n, m_r, group.d_out) * group.d_out**-0.5)
        self.register_buffer("Z_c", self.randn(group.n, m_c, group.d_in) * group.d_in**-0.5)
        self.register_buffer("informed", torch.tensor(False, device=group.device))
        if self.scale == "learned":
            ones = torch.ones(group.n, device=group.device)
            self.sigma_ = PyroParam(self.sigma * ones, constraints.positive)

    @property
    def gradient_ranks(self) -> tuple[int, int]:
        """``(m_r, m_c)`` of this group's layers."""
        m_r, m_c = (self.rank, self.rank) if isinstance(self.rank, int) else self.rank
        return min(m_r, self.group.d_out), min(m_c, self.group.d_in)

    def inform(self, Z_r: Tensor, Z_c: Tensor) -> None:
        """Takes the directions that were found in the gradients."""
        self.Z_r.copy_(Z_r)
        self.Z_c.copy_(Z_c)
        self.informed.fill_(True)

    def forward(self) -> LowRankUpdate:
        """Samples ``V``; the update has ``A = Z_c``, ``core = sigma V``, ``B = Z_r^T``."""
        if torch.is_grad_enabled() and not self._asked:
            self._asked = True  # once: a look at a graphics card takes time
            self.warn_unless_informed()
        with self.plate():
            V = sample_core(self, self.core, self.gradient_ranks)
        sigma = self.sigma_[..., None, None] if self.scale == "learned" else self.sigma
        return LowRankUpdate(A=self.Z_c, core=sigma * V, B=self.Z_r.mT)
