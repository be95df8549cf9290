"""Inducing directions along which the network's own gradients lie."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from pyro_blora.models._update_model import Core
from pyro_blora.models.kronecker_inducing import KroneckerInducing
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates import LowRankUpdate


class FisherInducing(KroneckerInducing):
    r"""A random core between the top directions of the Fisher information's Kronecker factors.

    The gradient :math:`G = \nabla_{W} \log p(y \mid x)` of a layer is taken before any training,
    with labels that are drawn from the network itself. Its second moments are

    .. math::

        C_r = \mathbb{E}[G G^\top], \qquad C_c = \mathbb{E}[G^\top G], \qquad
        C \approx Z^\top Z

    where the rows of :math:`Z` are the top :math:`m` eigenvectors, scaled by the roots of their
    eigenvalues. A priori

    .. math::

        \Delta W = \sigma\, Z_r^\top V Z_c, \quad V_{ij} \sim \mathcal{N}(0, 1), \qquad
        \text{so that } \Delta W \sim \mathcal{MN}(0, \sigma^2 C_r, C_c)

    truncated at rank :math:`m`: an update is expected where it can change the prediction. The
    directions are fixed and independent of the data's labels, so that the KL covers everything that
    is fitted to the labels except sigma. ``fit`` finds them by
    :func:`~pyro_blora.inference.inform`; before, they are random.

    Args:
        rank: ``m``, or ``(m_r, m_c)``; a smaller layer has all its directions. Default: 32.
        sigma: standard deviation of ``dW`` along directions of mean length, in units of weight; the
            start if it is learned. Default: 0.05.
        scale, core: as in :class:`KroneckerInducing`. Defaults: learned, normal.

    Sites: as in :class:`KroneckerInducing`, with the deterministic conditional.

    Reference:
        The factors are as in Martens, Grosse 2015 (K-FAC), arXiv:1503.05671, except that an
        example's tokens are summed before the square; Wang et al. 2024, "LoRA-GA",
        arXiv:2407.05000, start a point estimate along them.

    Example::

        blora = BayesianLoRA(net, prior=FisherInducing(), guide=MatrixNormal())
        fit(blora, train, collate=collate, num_steps=300)  # finds the directions first
    """

    no_start: ClassVar[str] = "its directions come from the network's gradients"
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
        super().__init__(rank=rank, sigma=sigma, scale=scale, core=core)

    @property
    def ranks(self) -> tuple[int, int]:
        """``(m_r, m_c)`` of this group's layers."""
        m_r, m_c = super().ranks
        return min(m_r, self.group.d_out), min(m_c, self.group.d_in)

    gradient_ranks = ranks

    def setup(self, group: LayerGroup) -> None:
        """Registers the buffers ``Z_r, Z_c`` (n x m x d) and ``informed``, and sigma (n)."""
        for side, m, d in zip("rc", self.ranks, (group.d_out, group.d_in), strict=True):
            self.register_buffer(f"Z_{side}", self._directions(side, m, d))
        self.register_buffer("informed", torch.tensor(False, device=group.device))
        self._set_scale()

    def inform(self, Z_r: Tensor, Z_c: Tensor) -> None:
        """Takes the top directions of the gradients, ``(n, m_r, d_out)`` and ``(n, m_c, d_in)``.

        They are scaled by a common factor, so that the mean square of a side's lengths is one.
        """
        self.Z_r.copy_(Z_r)
        self.Z_c.copy_(Z_c)
        self.informed.fill_(True)

    def forward(self) -> LowRankUpdate:
        """Samples ``V``; the update has ``A = Z_c``, ``core = sigma V``, ``B = Z_r^T``."""
        if torch.is_grad_enabled() and not self._asked:
            self._asked = True  # only once, because reading a CUDA bool synchronizes the device
            self.warn_unless_informed()
        return super().forward()

    def _whitened(self, side: str) -> tuple[Tensor, Tensor]:
        """No factor, because only conditional noise needs it, and ``Z`` in place of ``Q``."""
        Z = getattr(self, f"Z_{side}")
        return Z.new_empty(0), Z
