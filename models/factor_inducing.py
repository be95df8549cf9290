"""The prior of the published code, with an inducing matrix for each of LoRA's two factors."""

from typing import ClassVar, Literal

import pyro
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import normalize

from pyro_blora import updates
from pyro_blora.errors import ConfigurationError
from pyro_blora.models._update_model import UpdateModel
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates import LowRankUpdate, Side

_LAMBDA_MAX = 0.03  # the published code's cap


class FactorInducing(UpdateModel):
    r"""A sparse Gaussian process over each of LoRA's factors, :math:`\Delta W = B A`.

    For ``f`` in ``A, B``, of shape ``d_r x d_c`` (``r x d_in`` and ``d_out x r``):

    .. math::

        U_f \sim \mathcal{MN}(0, \Psi_r, \Psi_c), \qquad
        f = \sigma_f \left(T_r U_f T_c + \lambda_f\, (E - T_r \bar U T_c)\right),

    with :math:`\Psi = Z Z^\top + D^2`, :math:`T_r = Z_r^\top \Psi_r^{-1}`, :math:`T_c =
    \Psi_c^{-1} Z_c`, :math:`E \sim \mathcal{N}(0, 1)` and :math:`\bar U` the inducing matrix of
    :math:`E` by the extended Matheron rule: given ``U``, ``vec f`` has the covariance
    :math:`\sigma_f^2 \lambda_f^2 (I - T_r Z_r \otimes Z_c^\top T_c)`.

    Four points differ from the published code. The mean update is zero at the start, because guides
    start ``U_B`` at zero and ``U_A`` at a draw. Each Cholesky factor is computed anew in every
    step, from its own matrix. The rows of ``Z`` are normalized, so that sigma alone sets the size
    of an update. The cap of lambda is smooth, so that it always has a gradient.

    Args:
        rank: ``r``. Default: 8.
        inducing: ``m``, the size of each ``U``, at most ``r``. Default: ``r``.
        sigma: :math:`\sigma_B`, the prior scale of ``B``, in units of weight; its initial value if
            learned. :math:`\sigma_A` is 1, as only their product affects dW. Default: 0.1.
        scale: ``"learned"`` (one for each layer) or ``"fixed"``. Default: learned.
        conditional: ``"deterministic"`` (lambda = 0), ``"exact"`` (lambda = 1) or ``"scaled"``
            (lambda learned, its KL in the ELBO). Default: deterministic.
        lambda_init: initial value of a learned lambda, below its cap of 0.03. Default: 0.001.
        noise_init: initial value of ``D``. Default: 0.1.

    Sites, for a group ``g`` of ``n`` layers: ``g.U_A`` and ``g.U_B``, whitened, batch shape
    ``(n,)``, event shape ``(m, m)``. A learned lambda adds factors ``g.conditional_kl_A, _B``.

    Reference:
        Bayesian-LoRA, arXiv:2601.21003, as in its released code; Ritter et al. 2021,
        arXiv:2105.14594, section 3.

    Example::

        blora = BayesianLoRA(net, prior=FactorInducing(conditional="scaled"), guide=MeanField())
    """

    roles: ClassVar[dict[str, str]] = {
        **{f"Z_{side}_{f}": "direction" for f in "AB" for side in "rc"},
        **{f"D_{side}_{f}": "scale" for f in "AB" for side in "rc"},
        "sigma_": "scale",
        "lambda_A": "scale",
        "lambda_B": "scale",
    }
    learning_rates: ClassVar[dict[str, float]] = {"mean": 2e-2, "scale": 1e-2}

    def __init__(
        self,
        *,
        rank: int = 8,
        inducing: int | None = None,
        sigma: float = 0.1,
        scale: Literal["learned", "fixed"] = "learned",
        conditional: Literal["deterministic", "exact", "scaled"] = "deterministic",
        lambda_init: float = 0.001,
        noise_init: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < lambda_init < _LAMBDA_MAX:
            raise ConfigurationError(
                f"lambda_init={lambda_init!r} must be between 0 and {_LAMBDA_MAX}."
            )
        self.check_positive("rank", "sigma", "noise_init")
        if not 1 <= self.size <= rank:
            raise ConfigurationError(f"inducing={inducing!r} must be between 1 and rank={rank!r}.")

    @property
    def size(self) -> int:
        """``m``."""
        return self.rank if self.inducing is None else self.inducing

    def setup(self, group: LayerGroup) -> None:
        """Registers ``Z`` (n x m x d), ``D`` (n x m) and lambda (n) of each factor; sigma (n)."""
        self.check_rank(self.rank, group)
        ones = torch.ones(group.n, device=group.device)
        for factor, shape in self._shapes(group).items():
            for side, d in zip("rc", shape, strict=True):
                Z = normalize(self.randn(group.n, self.size, d), dim=-1)
                D = self.noise_init * ones.unsqueeze(-1).expand(-1, self.size)
                setattr(self, f"Z_{side}_{factor}", PyroParam(Z))
                setattr(self, f"D_{side}_{factor}", PyroParam(D.clone(), constraints.positive))
            if self.conditional == "scaled":
                cap = constraints.interval(0.0, _LAMBDA_MAX)
                setattr(self, f"lambda_{factor}", PyroParam(self.lambda_init * ones, cap))
        if self.scale == "learned":
            self.sigma_ = PyroParam(self.sigma * ones, constraints.positive)
        self._start = self.randn(group.n, self.size, self.size)

    def forward(self) -> LowRankUpdate:
        """Samples both ``U``; ``A`` is ``(..., n, r, d_in)``, ``B`` ``(..., n, d_out, r)``."""
        scale = self.sigma_[:, None, None] if self.scale == "learned" else self.sigma
        mean_A, A = self._factor("A", {"start": self._start})
        mean_B, B = self._factor("B", {})
        mean = LowRankUpdate(A=mean_A, B=scale * mean_B)
        if self.conditional == "deterministic":
            return mean
        return LowRankUpdate(A=A, B=scale * B, mean=mean)

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Takes orthonormal directions for each factor; ``U_A`` has a root mean square of one."""
        B, A = self.widened(B, A, self.size)
        eye = torch.eye(self.rank, self.size, dtype=A.dtype, device=A.device).expand(len(A), -1, -1)
        cores = []
        for factor, sides in {"A": (eye, A), "B": (B, eye.mT)}.items():
            D = (getattr(self, f"D_{side}_{factor}") for side in "rc")
            Z_r, core, Z_c = updates.between_orthonormal(*sides, *D)
            setattr(self, f"Z_r_{factor}", Z_r)
            setattr(self, f"Z_c_{factor}", Z_c)
            cores.append(core)
        size_A, size_B = (core.square().mean((-1, -2), keepdim=True).sqrt() for core in cores)
        sigma: Tensor | float = self.sigma
        if self.scale == "learned":
            sigma = torch.where(size_B > 0, size_A * size_B, sigma)
            self.sigma_ = sigma[:, 0, 0]
        return {self.site("U_A"): cores[0] / size_A, self.site("U_B"): cores[1] * size_A / sigma}

    def _shapes(self, group: LayerGroup) -> dict[str, tuple[int, int]]:
        return {"A": (self.rank, group.d_in), "B": (group.d_out, self.rank)}

    def _factor(self, factor: str, infer: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The conditional mean of the factor, and a draw around it."""
        (L_r, Q_r), (L_c, Q_c) = self._whitened("r", factor), self._whitened("c", factor)
        with self.plate():
            prior = self.normal(self.size, self.size)
            V = pyro.sample(self.site(f"U_{factor}"), prior, infer=infer)
            if self.conditional == "scaled":
                lam = getattr(self, f"lambda_{factor}")
                kl = updates.conditional_kl(lam, *self._shapes(self.group)[factor])
                pyro.factor(self.site(f"conditional_kl_{factor}"), -kl)
        mean: Tensor = Q_r.mT @ V @ Q_c
        if self.conditional == "deterministic":
            return mean, mean
        rows = Side.of(L_r, Q_r, getattr(self, f"D_r_{factor}"))
        cols = Side.of(L_c, Q_c, getattr(self, f"D_c_{factor}"))
        noise = updates.weight_noise(V.shape[:-2], rows, cols)
        if self.conditional == "scaled":
            noise = lam[:, None, None] * noise
        return mean, mean + noise

    def _whitened(self, side: str, factor: str) -> tuple[Tensor, Tensor]:
        Z = normalize(getattr(self, f"Z_{side}_{factor}"), dim=-1)
        Psi = updates.inducing_covariance(Z, getattr(self, f"D_{side}_{factor}"))
        return updates.whiten(Z, Psi, f"Psi_{side} of {factor} in {self.group.name!r}")
