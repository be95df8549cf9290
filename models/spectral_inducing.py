"""Inducing directions along the pretrained weight's own singular directions."""

from typing import ClassVar, Literal

from pyro_blora.models._update_model import Core
from pyro_blora.models.kronecker_inducing import KroneckerInducing
from pyro_blora.network.targets import LayerGroup, top_singular


class SpectralInducing(KroneckerInducing):
    r"""A random core between the top singular directions of the pretrained weight.

    With :math:`W_0 = P \Sigma R^\top` the directions are :math:`Z_r = P_{:m}^\top`,
    :math:`Z_c = R_{:m}^\top` and

    .. math::

        \mathbb{E}[\Delta W \mid V] = \sigma\, P_{:m}\, V\, R_{:m}^\top,
        \qquad V_{ij} \sim \mathcal{N}(0, 1),

    up to the factor :math:`1 / (1 + D^2)`. The directions are fixed, so that only the ``m_r m_c``
    numbers of the core and sigma are learned in each layer. These are the subspaces of LoRA-XS,
    where ``V`` is a point, and of B-LoRA-XS, which learned little in 300 steps of SST-2 with MiniLM
    (``docs/calibration.md``).

    Args:
        rank: ``m``, or ``(m_r, m_c)``. Default: 16.
        sigma: standard deviation of the core, in units of weight. Default: 0.3.
        scale, core, noise_init: as in :class:`KroneckerInducing`. Defaults: learned, normal, 0.1.

    Sites: as in :class:`KroneckerInducing`, with the deterministic conditional.

    Reference:
        Balazy et al. 2024, "LoRA-XS", arXiv:2405.17604; Marszalek et al. 2025, "Minimal ranks,
        maximum confidence" (B-LoRA-XS), arXiv:2502.12122.

    Example::

        blora = BayesianLoRA(net, prior=SpectralInducing(rank=16), guide=FullRank())
    """

    learning_rates: ClassVar[dict[str, float]] = {"mean": 2e-2, "scale": 1e-2}
    point_epochs: ClassVar[float | None] = None
    no_start: ClassVar[str] = "its directions come from the pretrained weight"

    def __init__(
        self,
        *,
        rank: int | tuple[int, int] = 16,
        sigma: float = 0.3,
        scale: Literal["learned", "fixed"] = "learned",
        core: Core = "normal",
        noise_init: float = 0.1,
    ) -> None:
        super().__init__(rank=rank, sigma=sigma, scale=scale, core=core, noise_init=noise_init)

    def setup(self, group: LayerGroup) -> None:
        """Registers the tensors of the Kronecker prior, with ``Z`` and ``D`` as buffers."""
        super().setup(group)
        self.Z_r, self.Z_c, _ = (each.to(group.device) for each in top_singular(group, *self.ranks))
        for name in ("Z_r", "Z_c", "D_r", "D_c"):
            value = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, value)
