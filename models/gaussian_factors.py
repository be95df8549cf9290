"""Independent normals on LoRA's own factors."""

from typing import ClassVar, Literal

import pyro
from pyro.nn import PyroParam
from torch import Tensor

from pyro_blora.models._update_model import UpdateModel
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates import LowRankUpdate


class GaussianFactors(UpdateModel):
    r"""Plain LoRA with one factor random, or both: :math:`\Delta W = \frac{\alpha}{r} B A`.

    .. math::

        A_{ij} \sim \mathcal{N}(0, \sigma^2) \quad\text{and/or}\quad
        B_{ij} \sim \mathcal{N}(0, \sigma^2).

    A factor that is not random is trained. ``random="A"`` with
    :class:`~pyro_blora.guides.MeanField` is BLoB's model, but particles have independent draws,
    while BLoB derives the draw of each example from a common one by the random signs of Flipout.

    Args:
        rank: ``r``. Default: 8.
        random: ``"A"``, ``"B"`` or ``"both"``. Default: A.
        sigma: standard deviation of the prior, in units of weight. Default: 0.2, BLoB's.
        alpha: LoRA's alpha; the update is ``alpha / r`` times ``B A``. Default: ``2 r``.

    Sites, for a group ``g`` of ``n`` layers: ``g.A``, batch shape ``(n,)``, event shape ``(r,
    d_in)``, and/or ``g.B``, ``(d_out, r)``. Guides start ``A`` as LoRA does, uniform with variance
    ``1 / (3 d_in)``, and ``B`` at zero, so that dW is zero in the mean.

    Reference:
        Wang et al. 2024, "BLoB: Bayesian low-rank adaptation by backpropagation", arXiv:2406.11675.

    Example::

        blora = BayesianLoRA(net, prior=GaussianFactors(random="A"), guide=MeanField())
    """

    roles: ClassVar[dict[str, str]] = {"A": "direction", "B": "direction"}
    # small for the means, because they are LoRA's factors
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
        """Registers the factor that is not random, and keeps the start of a random ``A``."""
        self.check_rank(self.rank, group)
        start = self.lora_start(self.rank)
        if self.random == "B":
            self.A = PyroParam(start)
        else:
            self._start = start  # not a buffer, because the guide holds the trained copy
        if self.random == "A":
            self.B = PyroParam(start.new_zeros(group.n, group.d_out, self.rank))

    def forward(self) -> LowRankUpdate:
        """Samples random factors; ``A`` is ``(..., n, r, d_in)``, ``B`` ``(..., n, d_out, r)``."""
        A = self._factor("A", self.rank, self.group.d_in)
        B = self._factor("B", self.group.d_out, self.rank)
        return LowRankUpdate(A=A, B=self._scale * B)

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Takes the factors as they are, with ``B`` divided by ``alpha / r``."""
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
        infer = {"start": self._start} if name == "A" else {}
        with self.plate():
            prior = self.normal(rows, columns, scale=self.sigma)
            return pyro.sample(self.site(name), prior, infer=infer)
