"""Row and column covariances from any GPyTorch kernels over embeddings of the neurons."""

from contextlib import suppress
from typing import Any, ClassVar, Literal

import gpytorch
import pyro
import torch
from gpytorch.kernels import Kernel
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.func import functional_call

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.models._update_model import Core
from pyro_blora.models.kronecker_inducing import KroneckerInducing
from pyro_blora.network.targets import LayerGroup, top_singular
from pyro_blora.updates import whiten

KERNELS: dict[str, Any] = {
    "rbf": gpytorch.kernels.RBFKernel,
    "matern": gpytorch.kernels.MaternKernel,
    "linear": gpytorch.kernels.LinearKernel,
}


class KernelInducing(KroneckerInducing):
    r"""A sparse Gaussian process over the weight update, with kernels between neurons.

    .. math::

        \mathbb{E}[\Delta W \mid V] = \sigma\, Q_r^\top V Q_c, \quad
        Q = L^{-1} k(Z, e), \; L L^\top = k(Z, Z) + D^2,

    so that :math:`\mathrm{Cov}[\mathrm{vec}\,\Delta W] = \sigma^2\, Q_r^\top Q_r \otimes Q_c^\top
    Q_c`, the Nystroem approximation of :math:`\sigma^2\, k_r \otimes k_c`. Every output and input
    neuron has an embedding :math:`e`, and ``m`` inducing points ``Z`` start at random embeddings.
    The conditional is deterministic. Linear kernels over one-hot embeddings give a
    :class:`KroneckerInducing`, behind which other kernels were far in the one benchmark of them
    (SST-2 with MiniLM, ``docs/calibration.md``).

    Args:
        rank: ``m``, or ``(m_r, m_c)``. Default: 8.
        row_kernel: a GPyTorch kernel (sums and products included), shared by the layers of a group,
            or one of ``"rbf"``, ``"matern"``, ``"linear"``, with hyperparameters for each layer.
            Priors that GPyTorch registers on its hyperparameters enter the ELBO. Default: rbf.
        col_kernel: the same for the columns.
        embedding: ``"learned"``: trained from the pretrained weight's first singular directions,
            or from random numbers if the weight is quantized. ``"one-hot"``: neuron ``i`` is unit
            vector ``i``, in as many dimensions as there are neurons. Default: learned.
        embedding_size: dimensions of a learned embedding. Default: 8.
        sigma: prior standard deviation of an entry of dW at the inducing points (elsewhere it is
            smaller); the initial value, since it is learned for each layer. Default: 0.01.
        core, noise_init: as in :class:`KroneckerInducing`. Defaults: normal, 0.1.

    Sites, for a group ``g`` of ``n`` layers: ``g.V``, batch shape ``(n,)``, event shape
    ``(m_r, m_c)``. Priors of the kernels add the factors ``g.hyperprior_r`` and ``g.hyperprior_c``.

    Reference:
        Bayesian-LoRA, arXiv:2601.21003, with kernels in place of inner products; neuron embeddings
        as in Karaletsos, Bui 2020, arXiv:2002.04033.

    Example::

        kernel = RBFKernel(lengthscale_prior=GammaPrior(3.0, 6.0)) + LinearKernel()
        blora = BayesianLoRA(net, prior=KernelInducing(row_kernel=kernel, col_kernel="rbf"))
    """

    roles: ClassVar[dict[str, str]] = {
        **KroneckerInducing.roles,
        "E_r": "direction",
        "E_c": "direction",
    }
    no_start: ClassVar[str] = "its directions come from kernels"
    row_kernel: str | Kernel
    col_kernel: str | Kernel

    def __init__(
        self,
        *,
        rank: int | tuple[int, int] = 8,
        row_kernel: str | Kernel = "rbf",
        col_kernel: str | Kernel = "rbf",
        embedding: Literal["learned", "one-hot"] = "learned",
        embedding_size: int = 8,
        sigma: float = 0.01,
        core: Core = "normal",
        noise_init: float = 0.1,
    ) -> None:
        super().__init__(rank=rank, sigma=sigma, core=core, noise_init=noise_init)
        self.check_positive("embedding_size")
        for kernel in (row_kernel, col_kernel):
            if isinstance(kernel, str) and kernel not in KERNELS:
                raise ConfigurationError(
                    f"kernel {kernel!r} is unknown; {near_miss(kernel, KERNELS)}. Or give a "
                    "GPyTorch kernel."
                )

    def setup(self, group: LayerGroup) -> None:
        """Registers ``E`` (n x d x k), ``Z`` (n x m x k), ``D`` (n x m), sigma and the kernels."""
        self.roles = dict(type(self).roles)  # type: ignore[misc]
        self._parts: dict[str, tuple[_Covariances, dict[str, str]]] = {}
        super().setup(group)
        self._set_kernel("r", self.row_kernel)
        self._set_kernel("c", self.col_kernel)

    def _directions(self, side: str, m: int, d: int) -> Tensor:
        """Registers the embedding and chooses the inducing points from it."""
        if self.embedding == "one-hot":
            return super()._directions(side, m, d)
        n, k = self.group.n, self.embedding_size
        scale = k**-0.5  # distances of about one: GPyTorch's kernels start with lengthscale 0.7
        E = torch.empty(n, d, 0)
        with suppress(ConfigurationError):  # a quantized weight
            left, right, _ = top_singular(self.group, min(k, d), min(k, d))
            E = (left if side == "r" else right).mT.cpu() * d**0.5 * scale
        E = torch.cat([E, scale * torch.randn(n, d, k - E.shape[-1])], -1)
        setattr(self, f"E_{side}", PyroParam(E.to(self.group.device)))
        points = torch.stack([embeddings[torch.randperm(d)[:m]] for embeddings in E])
        return points.to(self.group.device)

    def _set_kernel(self, side: str, kernel: str | Kernel) -> None:
        if isinstance(kernel, str):
            kernel = KERNELS[kernel](batch_shape=torch.Size([self.group.n]))
        covariances = _Covariances(kernel).to(self.group.device)
        names = {}
        for name, parameter in covariances.named_parameters():
            names[name] = f"kernel_{side}_" + name.replace(".", "_")
            self.roles[names[name]] = "scale"
            setattr(self, names[name], PyroParam(parameter.detach().clone()))
        self._parts[side] = (covariances, names)

    def _whitened(self, side: str) -> tuple[Tensor, Tensor]:
        covariances, names = self._parts[side]
        Z, D = getattr(self, f"Z_{side}"), getattr(self, f"D_{side}")
        E = torch.eye(Z.shape[-1], device=Z.device).expand(len(Z), -1, -1)
        if self.embedding == "learned":
            E = getattr(self, f"E_{side}")
        state = {name: getattr(self, attribute) for name, attribute in names.items()}
        K_zz, K_ze, log_priors = functional_call(covariances, state, (Z, E))
        Psi = K_zz + torch.diag_embed(D.square())
        if log_priors:
            pyro.factor(self.site(f"hyperprior_{side}"), sum(log_priors))
        return whiten(K_ze, Psi, f"Psi_{side} of group {self.group.name!r}")


class _Covariances(nn.Module):
    """The covariances and log priors of a kernel in one call, for ``functional_call``."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, Z: Tensor, E: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        priors = self.kernel.named_priors()
        log_priors = [prior.log_prob(value(owner)).sum() for _, owner, prior, value, _ in priors]
        return self.kernel(Z, Z).to_dense(), self.kernel(Z, E).to_dense(), log_priors
