"""Inducing directions along the pretrained weight's own singular directions."""

from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from pyro_blora.models._core_density import Core
from pyro_blora.models.kronecker_inducing import KroneckerInducing
from pyro_blora.network.quantised import top_singular
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates.low_rank_update import LowRankUpdate

__all__ = ["SpectralInducing"]


class SpectralInducing(KroneckerInducing):
    r"""A random core between the top singular directions of the pretrained weight.

    With :math:`W_0 = P \Sigma R^\top` the directions are :math:`Z_r = P_{:m}^\top`,
    :math:`Z_c = R_{:m}^\top` and

    .. math::

        \mathbb{E}[\Delta W \mid V] = \sigma\, P_{:m}\, \mathrm{diag}(w)\, V\, R_{:m}^\top,
        \qquad V_{ij} \sim \mathcal{N}(0, 1),

    up to the factor :math:`1 / (1 + D^2)` that ``D`` leaves, so with fixed directions only ``m_r
    m_c`` numbers a layer are random and next to none besides are trained: the subspaces of LoRA-XS
    (a point ``V``) and B-LoRA-XS.

    Args:
        rank: ``m``, or ``(m_r, m_c)``. Default: 16.
        weighting: ``"singular"`` weighs the rows by :math:`w_i = \Sigma_i / \Sigma_1`, as LoRA-XS's
            ``B = P Sigma`` does; ``"none"`` by one. Default: none.
        learn_directions: whether ``Z`` and ``D`` are trained from there. Default: no.
        sigma: as in :class:`KroneckerInducing`. Default: 0.3.
        scale: as there. Default: learned.
        core: as there. Default: normal.
        noise_init: as there. Default: 0.1.

    Sites: as in :class:`KroneckerInducing`, with the deterministic conditional.

    Raises:
        ConfigurationError: the rank exceeds a layer's size, or the weights are quantised by
            another library than torchao or bitsandbytes.

    Reference:
        Balazy et al. 2024, "LoRA-XS", arXiv:2405.17604; Marszalek et al. 2025, "Minimal ranks,
        maximum confidence: parameter-efficient uncertainty quantification for LoRA" (B-LoRA-XS),
        arXiv:2502.12122.

    Example::

        blora = BayesianLoRA(net, prior=SpectralInducing(rank=16), guide=FullRank())
    """

    def __init__(
        self,
        *,
        rank: int | tuple[int, int] = 16,
        weighting: Literal["none", "singular"] = "none",
        learn_directions: bool = False,
        sigma: float = 0.3,
        scale: Literal["learned", "fixed", "half-cauchy"] = "learned",
        core: Core = "normal",
        noise_init: float = 0.1,
    ) -> None:
        super().__init__(rank=rank, sigma=sigma, scale=scale, core=core, noise_init=noise_init)
        self.weighting = weighting
        self.learn_directions = learn_directions
        self.check_choice("weighting", ("none", "singular"))

    def setup(self, group: LayerGroup) -> None:
        """Registers what the Kronecker prior does; ``Z`` and ``D`` are buffers where fixed."""
        super().setup(group)
        m_r, m_c = self.ranks
        Z_r, Z_c, values = top_singular(group, m_r, m_c)
        self.Z_r, self.Z_c = Z_r.to(group.device), Z_c.to(group.device)
        for name in () if self.learn_directions else ("Z_r", "Z_c", "D_r", "D_c"):
            value = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, value)
        weights = torch.ones(group.n, m_r)
        if self.weighting == "singular":
            first = values[:, :m_r] / values[:, :1]
            weights[:, : first.shape[1]] = first.cpu()
        self.weights: Tensor
        self.register_buffer("weights", weights.to(group.device))

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Raises ConfigurationError: it cannot."""
        raise self.cannot_start("its directions are those of the pretrained weight")

    def forward(self) -> LowRankUpdate:
        """Samples ``V``; its rows are weighed on the way to ``B``."""
        update = super().forward()
        return replace(update, core=self.weights.unsqueeze(-1) * cast(Tensor, update.core))
