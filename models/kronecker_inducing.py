"""The paper's prior in the product reading: one inducing matrix for each adapted weight."""

import math
from typing import ClassVar, Literal, cast

import pyro
import torch
from gpytorch.kernels import Kernel
from linear_operator.operators import LinearOperator
from linear_operator.utils.errors import NanError, NotPSDError
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_blora.conditional import JointNoise, MarginalNoise, conditional_kl
from pyro_blora.errors import ConfigurationError, NonFiniteLossError
from pyro_blora.kronecker import (
    inducing_covariance,
    kronecker_covariance,
    lazy_covariance,
    whiten,
)
from pyro_blora.models._update_model import UpdateModel
from pyro_blora.targets import LayerGroup
from pyro_blora.update import LowRankUpdate, Noise

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

    The noise of the conditional is added to the layer's output, never drawn as a
    ``d_out x d_in`` weight: output :math:`i` at input :math:`x` has variance
    :math:`\sigma^2\lambda^2(|x|^2 - q_i |Q_c x|^2)`, :math:`q_i = |(Q_r)_{\cdot i}|^2`.

    Args:
        rank: ``m``, the size of ``U``, or ``(m_r, m_c)``. Default: 8.
        sigma: standard deviation of the entries of ``dW`` in the directions of ``Z`` under the
            prior, in units of weight; the start where it is learned. Default: 0.3.
        learn_sigma: whether the ELBO learns sigma, one for each layer. Default: yes.
        conditional: ``"deterministic"`` (lambda = 0), ``"exact"`` (lambda = 1) or ``"scaled"``
            (lambda learned, with the KL of the conditional in the ELBO). Default: deterministic.
        lambda_init: where a learned lambda starts. Default: 0.1.
        noise: ``"marginal"`` draws the conditional noise of each output at each position by
            itself, with the exact variance; ``"joint"`` draws it as one weight gives it to all
            outputs at all positions of a particle. Default: marginal.
        noise_init: where ``D`` starts. Default: 0.1.
        row_kernel: a GPyTorch kernel between the row directions ``Z_r``, in place of the linear
            one; with the deterministic conditional only. Default: linear.
        col_kernel: the same for ``Z_c``.

    Sites, for a group ``g`` of ``n`` layers: ``g.V``, batch shape ``(n,)``, event shape
    ``(m_r, m_c)``; with a learned lambda also the factor ``g.conditional_kl``, ``(n,)``.

    Raises:
        ConfigurationError: an option is out of its range, or the rank exceeds a layer's size.

    Reference:
        Bayesian-LoRA, arXiv:2601.21003; the inducing weights are those of Ritter et al. 2021,
        "Sparse uncertainty representation in deep learning with inducing weights",
        arXiv:2105.14594, section 3.

    Example::

        >>> from torch import nn
        >>> from pyro_blora.targets import group_layers
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

    def __init__(
        self,
        *,
        rank: int | tuple[int, int] = 8,
        sigma: float = 0.3,
        learn_sigma: bool = True,
        conditional: Conditional = "deterministic",
        lambda_init: float = 0.1,
        noise: Literal["marginal", "joint"] = "marginal",
        noise_init: float = 0.1,
        row_kernel: Kernel | None = None,
        col_kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.sigma = sigma
        self.learn_sigma = learn_sigma
        self.conditional = conditional
        self.lambda_init = lambda_init
        self.noise = noise
        self.noise_init = noise_init
        self.row_kernel = row_kernel
        self.col_kernel = col_kernel
        self._check()

    def _check(self) -> None:
        for option, known in (
            ("conditional", ("deterministic", "exact", "scaled")),
            ("noise", ("marginal", "joint")),
        ):
            if getattr(self, option) not in known:
                raise ConfigurationError(
                    f"{option}={getattr(self, option)!r} is not one of {known}."
                )
        for option in ("sigma", "lambda_init", "noise_init"):
            value = getattr(self, option)
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"{option}={value!r} must be positive and finite.")
        if min(self.ranks) < 1:
            raise ConfigurationError(f"rank={self.rank!r} must be at least 1.")
        if self.conditional != "deterministic" and (self.row_kernel or self.col_kernel):
            raise ConfigurationError(
                f"conditional={self.conditional!r} needs the linear kernel, under which the "
                "variance of dW given U is known; drop row_kernel and col_kernel, or use "
                "conditional='deterministic'."
            )

    @property
    def ranks(self) -> tuple[int, int]:
        """``(m_r, m_c)``."""
        return (self.rank, self.rank) if isinstance(self.rank, int) else self.rank

    def setup(self, group: LayerGroup) -> None:
        """Registers ``Z_r, Z_c`` (n x m x d), ``D_r, D_c`` (n x m), sigma and lambda (n)."""
        m_r, m_c = self.ranks
        if m_r > group.d_out or m_c > group.d_in:
            raise ConfigurationError(
                f"rank={self.rank!r} is too large for group {group.name!r}, whose layers are "
                f"{group.d_out} x {group.d_in}; choose at most {min(group.d_out, group.d_in)}, or "
                "leave the layer out with exclude_modules."
            )
        # Rows of norm one: Z Z^T is near the identity, and D sets how far Q is from orthonormal.
        self.Z_r = PyroParam(self.randn(group.n, m_r, group.d_out) * group.d_out**-0.5)
        self.Z_c = PyroParam(self.randn(group.n, m_c, group.d_in) * group.d_in**-0.5)
        ones = torch.ones(group.n, device=group.device)
        D = self.noise_init * ones.unsqueeze(-1)
        self.D_r = PyroParam(D.expand(-1, m_r).clone(), constraints.positive)
        self.D_c = PyroParam(D.expand(-1, m_c).clone(), constraints.positive)
        if self.learn_sigma:
            self.sigma_ = PyroParam(self.sigma * ones, constraints.positive)
        if self.conditional == "scaled":
            self.lambda_ = PyroParam(self.lambda_init * ones, constraints.positive)

    def forward(self) -> LowRankUpdate:
        """Samples ``V``; the update has ``A = Q_c``, ``core = sigma V``, ``B = Q_r^T``."""
        (L_r, Q_r), (L_c, Q_c) = self._whitened("r"), self._whitened("c")
        sigma = self.scale()
        with self.plate():
            V = pyro.sample(self.site("V"), self.normal(*self.ranks))
            if self.conditional == "scaled":
                kl = conditional_kl(self.lambda_, self.group.d_out, self.group.d_in)
                pyro.factor(self.site("conditional_kl"), -kl)
        noise: tuple[Noise, ...] | None = None
        if self.conditional != "deterministic":
            noise = self._noise(L_r, Q_r, L_c, Q_c)
        return LowRankUpdate(A=Q_c, core=sigma[:, None, None] * V, B=Q_r.mT, noise=noise)

    def scale(self) -> Tensor:
        """The prior scale sigma of each layer, ``(n,)``."""
        if self.learn_sigma:
            return cast(Tensor, self.sigma_)
        return torch.full((self.group.n,), self.sigma, device=self.group.device)

    def row_covariance(self) -> LinearOperator:
        """``Psi_r`` as a linear operator, ``(n, m_r, m_r)``."""
        return self._covariance("r")

    def col_covariance(self) -> LinearOperator:
        """``Psi_c`` as a linear operator, ``(n, m_c, m_c)``."""
        return self._covariance("c")

    def lazy_covariance_matrix(self) -> LinearOperator:
        """``Psi_r (x) Psi_c``, the prior covariance of row-major ``vec U``."""
        return kronecker_covariance(self.row_covariance(), self.col_covariance())

    def _side(self, side: str) -> tuple[Tensor, Tensor, Kernel | None]:
        kernel = self.row_kernel if side == "r" else self.col_kernel
        return getattr(self, f"Z_{side}"), getattr(self, f"D_{side}"), kernel

    def _covariance(self, side: str) -> LinearOperator:
        Z, D, kernel = self._side(side)
        return lazy_covariance(Z, D) if kernel is None else kernel(Z).add_diagonal(D.square())

    def _whitened(self, side: str) -> tuple[Tensor, Tensor]:
        """``L`` and ``Q`` of one side, by one batched Cholesky for all layers."""
        Z, D, kernel = self._side(side)
        if kernel is None:
            Psi = inducing_covariance(Z, D)
        else:
            Psi = kernel(Z).to_dense() + torch.diag_embed(D.square())
        try:
            return whiten(Z, Psi)
        except (NanError, NotPSDError) as error:
            raise NonFiniteLossError(
                f"Psi_{side} of group {self.group.name!r} has no Cholesky factor ({error}); lower "
                f"the learning rate of the directions Z_{side}, or raise noise_init."
            ) from error

    def _noise(self, L_r: Tensor, Q_r: Tensor, L_c: Tensor, Q_c: Tensor) -> tuple[Noise, ...]:
        scale = self.scale() * (self.lambda_ if self.conditional == "scaled" else 1.0)
        if self.noise == "marginal":
            return tuple(MarginalNoise(s) for s in scale.unbind(0))
        D_r, D_c = torch.diag_embed(self.D_r), torch.diag_embed(self.D_c)
        F_r = torch.linalg.solve_triangular(L_r, D_r, upper=False)
        F_c = torch.linalg.solve_triangular(L_c, D_c, upper=False)
        C_r, C_c = torch.linalg.cholesky(Q_r @ Q_r.mT), torch.linalg.cholesky(Q_c @ Q_c.mT)
        sides = (scale, Q_r, F_r, C_r, Q_c, F_c, C_c)
        return tuple(
            JointNoise(*layer) for layer in zip(*(s.unbind(0) for s in sides), strict=True)
        )
