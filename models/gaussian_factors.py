"""Independent normals on LoRA's own factors."""

from typing import ClassVar, Literal

import pyro
import torch
from pyro.nn import PyroParam
from torch import Tensor

from pyro_blora.models._update_model import UpdateModel
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates.low_rank_update import LowRankUpdate


class GaussianFactors(UpdateModel):
    r"""Plain LoRA with one factor random, or both: :math:`\Delta W = \frac{\alpha}{r} B A`.

    .. math::

        A_{ij} \sim \mathcal{N}(0, \sigma^2) \quad\text{and/or}\quad
        B_{ij} \sim \mathcal{N}(0, \sigma^2).

    With ``random="A"`` and :class:`~pyro_blora.guides.MeanField` this is BLoB's model. A factor
    that is not random is trained. BLoB draws its noise for each example by Flipout, one draw with
    random signs. Here each particle has a draw of its own: the law for one example is the same, and
    two examples are independent.

    Args:
        rank: ``r``. Default: 8.
        random: ``"A"``, ``"B"`` or ``"both"``. Default: A.
        sigma: standard deviation of the prior, in units of weight. Default: 0.2, BLoB's.
        alpha: LoRA's alpha; the update is ``alpha / r`` times ``B A``. Default: ``2 r``.

    Sites, for a group ``g`` of ``n`` layers: ``g.A``, batch shape ``(n,)``, event shape ``(r,
    d_in)``, and/or ``g.B``, ``(d_out, r)``. Guides start ``A`` as LoRA does, uniform with variance
    ``1 / (3 d_in)``, and ``B`` at zero, so that dW is zero in the mean.

    Reference:
        Wang et al. 2024, "BLoB: Bayesian low-rank adaptation by backpropagation for large language
        models", arXiv:2406.11675.

    Example::

        blora = BayesianLoRA(net, prior=GaussianFactors(random="A"), guide=MeanField())
    """

    roles: ClassVar[dict[str, str]] = {"A": "direction", "B": "direction"}
    # means are LoRA's own factors
    learning_rates: ClassVar[dict[str, float]] = {"mean": 1e-3, "scale": 1e-2, "direction": 1e-3}

    def __init__(
        self,
        *,
        rank: int = 8,
        random: Literal["A", "B", "both"] = "A",
        sigma: float = 0.2,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.check_positive("rank", "sigma", *(() if alpha is None else ("alpha",)))

    def setup(self, group: LayerGroup) -> None:
        """Registers the factor that is not random; remembers where ``A`` starts."""
        self.check_rank(self.rank, group)
        start = self.lora_start(self.rank)
        if self.random == "B":
            self.A = PyroParam(start)
        else:
            self._start = (start,)  # for the guide alone, so that it is in no state dict
        if self.random == "A":
            zero = torch.zeros(group.n, group.d_out, self.rank, device=group.device)
            self.B = PyroParam(zero)

    def forward(self) -> LowRankUpdate:
        """Samples what is random; ``A`` is ``(..., n, r, d_in)``, ``B`` ``(..., n, d_out, r)``."""
        group, scale = self.group, self._scale
        A, B = self._factor("A", self.rank, group.d_in), self._factor("B", group.d_out, self.rank)
        return LowRankUpdate(A=A, B=scale * B)

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """The factors as they are, but for alpha."""
        B, A = self.widened(B, A, self.rank)
        starts = {}
        for name, value in {"A": A, "B": B / self._scale}.items():
            if self.random in (name, "both"):
                starts[self.site(name)] = value
            else:
                setattr(self, name, value)
        return starts

    @property
    def _scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def _factor(self, name: str, rows: int, columns: int) -> Tensor:
        if self.random not in (name, "both"):
            return getattr(self, name)
        infer = {"start": self._start[0]} if name == "A" else {}
        with self.plate():
            prior = self.normal(rows, columns, scale=self.sigma)
            return pyro.sample(self.site(name), prior, infer=infer)
