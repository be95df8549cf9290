"""A random vector between two fixed or learned factors."""

from typing import ClassVar

import pyro
import torch
from pyro.nn import PyroParam
from torch import Tensor

from pyro_blora.models._update_model import UpdateModel
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates import LowRankUpdate


class Subspace(UpdateModel):
    r"""``r`` random numbers in each layer: :math:`\Delta W = B\, \mathrm{diag}(s)\, A`.

    .. math::

        s_i \sim \mathcal{N}(0, \sigma^2), \quad i = 1 \dots r.

    Args:
        rank: ``r``. Default: 8.
        sigma: standard deviation of ``s`` under the prior. Default: 1.

    ``A`` and ``B`` are trained and start as in LoRA; guides start ``s`` at ``sigma``.

    Sites, for a group ``g`` of ``n`` layers: ``g.s``, batch shape ``(n,)``, event shape ``(r,)``.

    Reference:
        Samplawski et al. 2025, "Scalable Bayesian low-rank adaptation" (ScalaBL), arXiv:2506.21408.

    Example::

        blora = BayesianLoRA(net, prior=Subspace(rank=8), guide=FullRank())
    """

    roles: ClassVar[dict[str, str]] = {"A": "direction", "B": "direction"}
    learning_rates: ClassVar[dict[str, float]] = {"mean": 2e-2, "scale": 1e-2, "direction": 1e-3}

    def __init__(self, *, rank: int = 8, sigma: float = 1.0) -> None:
        super().__init__()
        self.check_positive("rank", "sigma")

    def setup(self, group: LayerGroup) -> None:
        """Registers ``A`` (n x r x d_in) and ``B`` (n x d_out x r)."""
        self.check_rank(self.rank, group)
        self.A = PyroParam(self.lora_start(self.rank))
        self.B = PyroParam(torch.zeros(group.n, group.d_out, self.rank, device=group.device))

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Takes the factors as they are, with ``s`` at ``sigma``."""
        B, self.A = self.widened(B, A, self.rank)
        self.B = B / self.sigma
        return {self.site("s"): torch.full_like(B[:, 0], self.sigma)}

    def forward(self) -> LowRankUpdate:
        """Samples ``s``; the core is its diagonal matrix."""
        prior = self.normal(self.rank, scale=self.sigma)
        start = torch.full_like(self.B[:, 0], self.sigma)
        with self.plate():
            s = pyro.sample(self.site("s"), prior, infer={"start": start})
        return LowRankUpdate(A=self.A, core=torch.diag_embed(s), B=self.B)
