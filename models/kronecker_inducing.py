"""The prior of the Bayesian-LoRA paper, with one inducing matrix for each adapted weight."""

from typing import ClassVar, Literal, cast

import pyro
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_blora import updates
from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.models._update_model import CORES, Core, UpdateModel
from pyro_blora.network.targets import LayerGroup, dense_weight
from pyro_blora.updates import LowRankUpdate, MarginalNoise


class KroneckerInducing(UpdateModel):
    r"""A Kronecker-factored sparse Gaussian process over the weight update.

    .. math::

        p(U) &= \mathcal{MN}(0, \Psi_r, \Psi_c), \qquad \Psi = Z Z^\top + D^2, \\
        \mathbb{E}[\Delta W \mid U] &= \sigma\, T_r U T_c, \qquad
        T_r = Z_r^\top \Psi_r^{-1},\; T_c = \Psi_c^{-1} Z_c, \\
        \mathrm{Cov}[\mathrm{vec}\,\Delta W \mid U] &= \sigma^2 \lambda^2
        \left(I - T_r Z_r \otimes Z_c^\top T_c\right).

    The site is the whitened core :math:`V` with :math:`U = L_r V L_c^\top`,
    :math:`L L^\top = \Psi`, so :math:`p(V)` is standard normal and
    :math:`\mathbb{E}[\Delta W \mid V] = \sigma\, Q_r^\top V Q_c` with :math:`Q = L^{-1} Z`. In
    LoRA's letters :math:`B = \sigma T_r U` and :math:`A = T_c`: plain LoRA is the limit
    :math:`\lambda \to 0` with a collapsed posterior of :math:`U`.

    The noise of the conditional is drawn at the layer's output, not as a ``d_out x d_in`` weight.
    Output :math:`i` at input :math:`x` has the noise variance
    :math:`\sigma^2\lambda^2(|x|^2 - q_i |Q_c x|^2)`, :math:`q_i = |(Q_r)_{\cdot i}|^2`, drawn
    independently for each output and position. A multiple choice must then be packed, so that the
    options share the noise of their question.

    Args:
        rank: ``m``, the size of ``U``, or ``(m_r, m_c)``. Default: 8.
        sigma: standard deviation of the entries of ``dW`` in the directions of ``Z`` under the
            prior, in units of weight; its initial value if learned. Default: for each layer
            :math:`0.2\, s`, with the root mean square :math:`s` of the singular values of its
            pretrained weight (1 for a weight of zeros, or without data), so that moving a factor
            from one layer of the network to another does not change the prior.
        scale: ``"learned"`` (the ELBO learns sigma, one for each layer) or ``"fixed"``; see
            :class:`Hierarchical` for random scales. Default: learned.
        core: the density of ``V``: a name (see
            :func:`~pyro_blora.models.UpdateModel.sample_core`) or a function of its shape.
            Default: normal.
        conditional: ``"deterministic"`` (lambda = 0), ``"exact"`` (lambda = 1) or ``"scaled"``
            (lambda learned, with the KL of the conditional in the ELBO). Default: deterministic.
        lambda_init: initial value of a learned lambda. Default: 0.1.
        noise_init: initial value of ``D``. Default: 0.1.

    Sites, for a group ``g`` of ``n`` layers: ``g.V``, batch shape ``(n,)``, event shape
    ``(m_r, m_c)``. A learned lambda adds the factor ``g.conditional_kl``, ``(n,)``.

    Reference:
        Bayesian-LoRA, arXiv:2601.21003; the inducing weights are those of Ritter et al. 2021,
        arXiv:2105.14594, section 3.

    Example::

        >>> from torch import nn
        >>> from pyro_blora.network.targets import group_layers
        >>> layers = {f"{i}.q": nn.Linear(6, 5) for i in range(3)}
        >>> prior = KroneckerInducing(rank=2).bind(group_layers(layers)[0])
        >>> prior().core.shape  # n x m_r x m_c
        torch.Size([3, 2, 2])
    """

    roles: ClassVar[dict[str, str]] = {
        "Z_r": "direction",
        "Z_c": "direction",
        "D_r": "scale",
        "D_c": "scale",
        "sigma_": "scale",
        "lambda_": "scale",
    }
    point_epochs: ClassVar[float | None] = 6.0
    no_start: ClassVar[str] = ""
    Z_r: Tensor
    Z_c: Tensor
    sigma_start: Tensor

    def __init__(
        self,
        *,
        rank: int | tuple[int, int] = 8,
        sigma: float | None = None,
        scale: Literal["learned", "fixed"] = "learned",
        core: Core = "normal",
        conditional: Literal["deterministic", "exact", "scaled"] = "deterministic",
        lambda_init: float = 0.1,
        noise_init: float = 0.1,
    ) -> None:
        super().__init__()
        self.check_positive("rank", "lambda_init", "noise_init")
        if sigma is not None:
            self.check_positive("sigma")
        if not callable(core) and core not in CORES:
            raise ConfigurationError(
                f"core={core!r} is unknown; {near_miss(core, CORES)}. Or give a function shape -> "
                "distribution."
            )
        if core in ("horseshoe", "ard"):
            self.no_start = "under a random scale the update has no mean in closed form"  # type: ignore[misc]

    @property
    def ranks(self) -> tuple[int, int]:
        """``(m_r, m_c)``."""
        return (self.rank, self.rank) if isinstance(self.rank, int) else self.rank

    def setup(self, group: LayerGroup) -> None:
        """Registers ``Z_r, Z_c`` (n x m x d), ``D_r, D_c`` (n x m), sigma and lambda (n)."""
        m_r, m_c = self.ranks
        self.check_rank(self.rank, group)
        self.Z_r = PyroParam(self._directions("r", m_r, group.d_out))
        self.Z_c = PyroParam(self._directions("c", m_c, group.d_in))
        ones = torch.ones(group.n, device=group.device)
        D = self.noise_init * ones.unsqueeze(-1)
        self.D_r = PyroParam(D.expand(-1, m_r).clone(), constraints.positive)
        self.D_c = PyroParam(D.expand(-1, m_c).clone(), constraints.positive)
        start = _usual_sigma(group) if self.sigma is None else self.sigma * ones
        self.register_buffer("sigma_start", start, persistent=self.scale != "learned")
        if self.scale == "learned":
            self.sigma_ = PyroParam(start.clone(), constraints.positive)
        if self.conditional == "scaled":
            self.lambda_ = PyroParam(self.lambda_init * ones, constraints.positive)

    def _directions(self, side: str, m: int, d: int) -> Tensor:
        # Rows of norm about one: Z Z^T is near the identity, and D sets how far Q is from it.
        return self.randn(self.group.n, m, d) * d**-0.5

    def forward(self) -> LowRankUpdate:
        """Samples ``V``; the update has ``A = Q_c``, ``core = sigma V``, ``B = Q_r^T``."""
        (_, Q_r), (_, Q_c) = self._whitened("r"), self._whitened("c")
        sigma = self.layer_scale()
        with self.plate():
            V = self.sample_core(self.core, self.ranks)
            if self.conditional == "scaled":
                kl = updates.conditional_kl(self.lambda_, self.group.d_out, self.group.d_in)
                pyro.factor(self.site("conditional_kl"), -kl)
        noise = None
        if self.conditional != "deterministic":
            scale = sigma * self.lambda_ if self.conditional == "scaled" else sigma
            noise = tuple(map(MarginalNoise, scale.unbind(-1)))
        return LowRankUpdate(A=Q_c, core=sigma[..., None, None] * V, B=Q_r.mT, noise=noise)

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Takes orthonormal directions; a learned sigma becomes the core's root mean square."""
        if self.no_start:
            return super().start_at(B, A)
        B, A = self.widened(B, A, min(self.ranks))
        self.Z_r, core, self.Z_c = updates.between_orthonormal(B, A, self.D_r, self.D_c)
        if self.scale == "learned":
            size = core.square().mean((-1, -2)).sqrt()
            self.sigma_ = torch.where(size > 0, size, self.sigma_start)
        return {self.site("V"): core / self.layer_scale()[:, None, None]}

    def layer_scale(self) -> Tensor:
        """The prior scale sigma of each layer, ``(..., n)``; a subclass may sample it."""
        return cast(Tensor, self.sigma_) if self.scale == "learned" else self.sigma_start

    def _whitened(self, side: str) -> tuple[Tensor, Tensor]:
        """``L`` and ``Q = L^-1 Z`` of one side, by one batched Cholesky for all layers."""
        Z, D = getattr(self, f"Z_{side}"), getattr(self, f"D_{side}")
        Psi = updates.inducing_covariance(Z, D)
        return updates.whiten(Z, Psi, f"Psi_{side} of group {self.group.name!r}")


@torch.no_grad()
def _usual_sigma(group: LayerGroup) -> Tensor:
    sizes = []
    for name, module in zip(group.module_names, group.modules, strict=True):
        weight = dense_weight(module, name)
        size = torch.ones(()) if weight.is_meta else torch.linalg.vector_norm(weight)
        sizes.append((size / min(weight.shape) ** 0.5).to(group.device))
    rms = torch.stack(sizes)
    return 0.2 * torch.where(rms > 0, rms, 1.0)
