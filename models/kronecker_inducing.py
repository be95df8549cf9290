"""The paper's prior in the product reading: one inducing matrix for each adapted weight."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, cast

import pyro
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_blora.errors import ConfigurationError
from pyro_blora.models._core_density import Core, check_core, sample_core
from pyro_blora.models._update_model import UpdateModel
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates.conditional_noise import JointNoise, MarginalNoise, Side, conditional_kl
from pyro_blora.updates.kronecker import (
    between_orthonormal,
    inducing_covariance,
    whiten_or_explain,
)
from pyro_blora.updates.low_rank_update import LowRankUpdate, Noise

__all__ = ["KroneckerInducing"]

Conditional = Literal["deterministic", "exact", "scaled"]


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

    With ``keep`` below one a draw of the weight has some of the directions alone,

    .. math::

        \Delta W \mid V = \sigma\, Q_r^\top \mathrm{diag}(s_r)\, V\, \mathrm{diag}(s_c)\, Q_c,
        \qquad s \sim \mathrm{Bernoulli}(\text{keep}) / \text{keep},

    of the same mean. It is dropout of directions: ``s`` has one law under p and q, so that the KL
    stays that of ``V``, and the ELBO a bound. The directions are fitted, and no KL sees it; one
    that may be absent cannot lean on the others, and over-fits less (docs/calibration_tried.md).

    The noise of the conditional is added to the layer's output, never drawn as a
    ``d_out x d_in`` weight: output :math:`i` at input :math:`x` has variance
    :math:`\sigma^2\lambda^2(|x|^2 - q_i |Q_c x|^2)`, :math:`q_i = |(Q_r)_{\cdot i}|^2`.

    Args:
        rank: ``m``, the size of ``U``, or ``(m_r, m_c)``. Default: 8.
        sigma: standard deviation of the entries of ``dW`` in the directions of ``Z`` under the
            prior, in units of weight (over ``keep``, where that is below 1); the start where it is
            learned. ``"shared"`` is :math:`\min(1, 6/n)` for a group of ``n`` layers: beyond six, a
            step of all their cores moves the output as far as one of six layers does, and draws,
            which do not agree with each other, move it less
            (docs/calibration.md). Groups do not know of each other. Default: 1.
        scale: ``"learned"`` (the ELBO learns sigma, one for each layer), ``"fixed"``, or
            ``"half-cauchy"`` (sigma is random, half-Cauchy of scale ``sigma`` in each layer).
            Default: learned.
        core: the density of the entries of ``V``: a name (see
            :func:`~pyro_blora.models._core_density.sample_core`) or a function from a shape to a
            distribution. Default: normal.
        conditional: ``"deterministic"`` (lambda = 0), ``"exact"`` (lambda = 1) or ``"scaled"``
            (lambda learned, with the KL of the conditional in the ELBO). Default: deterministic.
        lambda_init: where a learned lambda starts. Default: 0.1.
        noise: ``"marginal"`` draws the conditional noise of each output at each position by
            itself, with the exact variance; ``"joint"`` draws it as one weight gives it to all
            outputs at all positions of a particle. Marginal noise wants the options of a multiple
            choice in packed rows, where they share that of their question; in rows of their own
            they would not, unlike under one weight, and are refused. Default: marginal.
        noise_init: where ``D`` starts. Default: 0.1.
        keep: the probability, in (0, 1], that a direction is there in a draw of the weight; each
            of ``Z_r`` and ``Z_c`` by itself. Below one the prior asks ``fit`` for faster
            directions (5e-3, not 2e-3) and a ``direction_share`` of 0.75. Default: 1, all of them.

    Sites, for a group ``g`` of ``n`` layers: ``g.V``, batch shape ``(n,)``, event shape
    ``(m_r, m_c)``; with a learned lambda also the factor ``g.conditional_kl``, ``(n,)``; with a
    half-Cauchy scale also ``g.sigma``, ``(n,)``.

    Raises:
        ConfigurationError: an option is out of its range, or the rank exceeds a layer's size.

    Reference:
        Bayesian-LoRA, arXiv:2601.21003; the inducing weights are those of Ritter et al. 2021,
        "Sparse uncertainty representation in deep learning with inducing weights",
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
    # Fast cores and slow directions, which the KL does not see: docs/calibration_tried.md.
    learning_rates: Mapping[str, float] = {"mean": 5e-2, "scale": 3e-2, "direction": 2e-3}

    def __init__(
        self,
        *,
        rank: int | tuple[int, int] = 8,
        sigma: float | Literal["shared"] = 1.0,
        scale: Literal["learned", "fixed", "half-cauchy"] = "learned",
        core: Core = "normal",
        conditional: Conditional = "deterministic",
        lambda_init: float = 0.1,
        noise: Literal["marginal", "joint"] = "marginal",
        noise_init: float = 0.1,
        keep: float = 1.0,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.sigma = sigma
        self.scale = scale
        self.core = core
        self.conditional = conditional
        self.lambda_init = lambda_init
        self.noise = noise
        self.noise_init = noise_init
        self.keep = keep
        self.check_choice("conditional", ("deterministic", "exact", "scaled"))
        self.check_choice("noise", ("marginal", "joint"))
        self.check_choice("scale", ("learned", "fixed", "half-cauchy"))
        self.check_positive("rank", "lambda_init", "noise_init")
        if isinstance(sigma, str):
            self.check_choice("sigma", ("shared",))
        else:
            self.check_positive("sigma")
        if not 0 < keep <= 1:
            raise ConfigurationError(f"keep={keep!r} is no probability in (0, 1].")
        if keep < 1:  # directions over-fit less, and may be faster
            self.learning_rates = {**self.learning_rates, "direction": 5e-3}
            self.direction_share = 0.75
        check_core(core)

    @property
    def ranks(self) -> tuple[int, int]:
        """``(m_r, m_c)``."""
        return (self.rank, self.rank) if isinstance(self.rank, int) else self.rank

    @property
    def sigma_start(self) -> float:
        """The prior scale of the group's layers, or where it starts."""
        return min(1.0, 6 / self.group.n) if isinstance(self.sigma, str) else self.sigma

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
        if self.scale == "learned":
            self.sigma_ = PyroParam(self.sigma_start * ones, constraints.positive)
        if self.conditional == "scaled":
            self.lambda_ = PyroParam(self.lambda_init * ones, constraints.positive)

    def _directions(self, side: str, m: int, d: int) -> Tensor:
        # Rows of norm one: Z Z^T is near the identity, and D sets how far Q is from orthonormal.
        return self.randn(self.group.n, m, d) * d**-0.5

    def forward(self) -> LowRankUpdate:
        """Samples ``V``; the update has ``A = Q_c``, ``core = sigma V``, ``B = Q_r^T``."""
        (L_r, Q_r), (L_c, Q_c) = self._whitened("r"), self._whitened("c")
        sigma = self.layer_scale()
        with self.plate():
            V = sample_core(self, self.core, self.ranks)
            if self.conditional == "scaled":
                kl = conditional_kl(self.lambda_, self.group.d_out, self.group.d_in)
                pyro.factor(self.site("conditional_kl"), -kl)
        noise: tuple[Noise, ...] | None = None
        if self.conditional != "deterministic":
            scales = (sigma * (self.lambda_ if self.conditional == "scaled" else 1.0)).unbind(-1)
            noise = tuple(MarginalNoise(s) for s in scales)
            if self.noise == "joint":
                rows, cols = Side.of(L_r, Q_r, self.D_r), Side.of(L_c, Q_c, self.D_c)
                layers = zip(scales, rows.unbind(), cols.unbind(), strict=True)
                noise = tuple(JointNoise(*layer) for layer in layers)
        update = LowRankUpdate(A=Q_c, core=sigma[..., None, None] * V, B=Q_r.mT, noise=noise)
        return update if self.keep == 1 else self._some_directions(update)

    def _some_directions(self, update: LowRankUpdate) -> LowRankUpdate:
        core = cast(Tensor, update.core)
        rows, cols = (
            torch.full(shape, self.keep, device=core.device).bernoulli() / self.keep
            for shape in (core.shape[:-1], (*core.shape[:-2], core.shape[-1]))
        )
        core = rows.unsqueeze(-1) * core * cols.unsqueeze(-2)
        return replace(update, core=core, mean=update.without_noise(), leaves_out=True)

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Orthonormal directions and a core; a learned sigma is the core's root mean square."""
        if self.scale == "half-cauchy" or self.core in ("horseshoe", "ard"):
            raise self.cannot_start("with a random scale the mean of the update is known by draws")
        B, A = self.widened(B, A, min(self.ranks))
        self.Z_r, core, self.Z_c = between_orthonormal(B, A, *self.ranks)
        # Z Z^T is the identity, so that Psi = 1 + D^2 is diagonal
        rows, cols = (1 + D.square() for D in (self.D_r, self.D_c))
        core = core * (rows.unsqueeze(-1) * cols.unsqueeze(-2)).sqrt()
        if self.scale == "learned":
            size = core.square().mean((-1, -2)).sqrt()
            self.sigma_ = torch.where(size > 0, size, self.sigma_start)
        return {self.site("V"): core / self.layer_scale()[:, None, None]}

    def layer_scale(self) -> Tensor:
        """The prior scale sigma of each layer, ``(..., n)``; sampled where it is random."""
        if self.scale == "learned":
            return cast(Tensor, self.sigma_)
        sigma = torch.full((self.group.n,), self.sigma_start, device=self.group.device)
        if self.scale == "half-cauchy":
            with self.plate():
                sigma = pyro.sample(self.site("sigma"), pyro.distributions.HalfCauchy(sigma))
        return sigma

    def _whitened(self, side: str) -> tuple[Tensor, Tensor]:
        """``L`` and ``Q = L^-1 Z`` of one side, by one batched Cholesky for all layers."""
        Z, D = getattr(self, f"Z_{side}"), getattr(self, f"D_{side}")
        Psi = inducing_covariance(Z, D)
        return whiten_or_explain(Z, Psi, side, f"group {self.group.name!r}")
