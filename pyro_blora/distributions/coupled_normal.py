"""Normal arrays that are correlated along a batch dimension."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints
from torch.distributions.kl import register_kl

from pyro_blora.distributions.factors import multiply, solve
from pyro_blora.distributions.reshaped import kl_from_moments

__all__ = ["CoupledNormal"]


class CoupledNormal(TorchDistribution):
    r"""``n`` arrays with a joint normal law, correlated through an ``n x n`` factor.

    .. math::

        X_{l} = M_{l} + S \odot \sum_{k \le l} L_{lk} E_k, \quad E \sim N(0, 1), \qquad
        \mathrm{Cov}[X_{li}, X_{kj}] = (L L^\top)_{lk}\, S_i^2\, \delta_{ij}.

    The last batch dimension is that of the ``n`` arrays. By the chain rule the ``l``-th entry of
    :meth:`log_prob` is :math:`\log q(X_l \mid X_{<l})`, and that of :meth:`entropy` the entropy
    of this conditional, so that *sums* over the dimension are those of the joint law: it may stand
    under a plate that is never subsampled.

    Args:
        loc: ``M``, ``(n, *event_shape)``.
        scale: ``S``, ``event_shape``, positive.
        layer_scale_tril: ``L``, ``(n, n)``, lower triangular with a positive diagonal.

    Raises:
        ValueError: the shapes do not fit.

    Example::

        >>> d = CoupledNormal(torch.zeros(5, 3, 2), torch.ones(3, 2), torch.eye(5))
        >>> d.batch_shape, d.event_shape
        (torch.Size([5]), torch.Size([3, 2]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, layer_scale_tril: Tensor) -> None:
        n = loc.shape[0]
        if loc.shape[1:] != scale.shape or layer_scale_tril.shape != (n, n):
            raise ValueError(
                "CoupledNormal needs loc (n, *event), scale (*event) and layer_scale_tril (n, n); "
                f"got {tuple(loc.shape)}, {tuple(scale.shape)}, {tuple(layer_scale_tril.shape)}."
            )
        self.loc, self.scale, self.layer_scale_tril = loc, scale, layer_scale_tril
        super().__init__(loc.shape[:1], scale.shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays of the event shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(
        self, batch_shape: Sequence[int], _instance: "CoupledNormal | None" = None
    ) -> "CoupledNormal":
        """Independent copies of the joint law, in new dimensions on the left.

        Raises:
            ValueError: ``batch_shape`` does not end in ``n``.
        """
        batch_shape = torch.Size(batch_shape)
        if batch_shape[-1:] != self.loc.shape[:1]:
            raise ValueError(
                f"A CoupledNormal of {self.loc.shape[0]} arrays expands to the left alone, not to "
                f"{tuple(batch_shape)}."
            )
        new = CoupledNormal(self.loc, self.scale, self.layer_scale_tril)
        new._batch_shape = batch_shape
        return new

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)),
            dtype=self.loc.dtype,
            device=self.loc.device,
        )
        flat = noise.flatten(-len(self.event_shape)) if self.event_shape else noise.unsqueeze(-1)
        mixed = multiply(self.layer_scale_tril, flat)
        return self.loc + self.scale * mixed.reshape(noise.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """``log q(X_l | X_<l)`` in nats, of the broadcast batch shape."""
        error = (value - self.loc) / self.scale
        flat = error.flatten(-len(self.event_shape)) if self.event_shape else error.unsqueeze(-1)
        white = solve(self.layer_scale_tril, flat)
        return -0.5 * (white.square() + math.log(2 * math.pi)).sum(-1) - self._log_scale()

    def entropy(self) -> Tensor:
        """The entropy of ``X_l`` given ``X_<l``, ``batch_shape``."""
        size = self.event_shape.numel()
        entropy = 0.5 * size * (1 + math.log(2 * math.pi)) + self._log_scale()
        return entropy.expand(self.batch_shape)

    def _log_scale(self) -> Tensor:
        diagonal = self.layer_scale_tril.diagonal().log()
        return self.event_shape.numel() * diagonal + self.scale.log().sum()

    @property
    def mean(self) -> Tensor:
        """Of shape ``batch_shape + event_shape``."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each entry, ``batch_shape + event_shape``."""
        layers = self.layer_scale_tril.square().sum(-1)
        layers = layers.reshape(layers.shape + (1,) * len(self.event_shape))
        return (layers * self.scale.square()).expand(self.batch_shape + self.event_shape)


register_kl(CoupledNormal, Independent)(kl_from_moments)
register_kl(CoupledNormal, Normal)(kl_from_moments)
