"""Normal arrays that are correlated along a batch dimension."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_blora.distributions._real_law import RealLaw

__all__ = ["CoupledNormal"]


class CoupledNormal(RealLaw):
    r"""``n`` arrays with a joint normal law, correlated through an ``n x n`` factor.

    .. math::

        X_{l} = M_{l} + S \odot \sum_{k \le l} L_{lk} E_k, \quad E \sim N(0, 1), \qquad
        \mathrm{Cov}[X_{li}, X_{kj}] = (L L^\top)_{lk}\, S_i^2\, \delta_{ij}.

    The last batch dimension is that of the ``n`` arrays. By the chain rule the ``l``-th entry of
    :meth:`log_prob` is :math:`\log q(X_l \mid X_{<l})`, and that of :meth:`entropy` the entropy
    of this conditional, so that *sums* over the dimension are those of the joint law: it may stand
    under a plate that is never subsampled. Dimensions that :meth:`expand` adds have independent
    copies of the joint law.

    Args:
        loc: ``M``, ``(n, *event_shape)``.
        scale: ``S``, ``event_shape``, positive.
        layer_scale_tril: ``L``, ``(n, n)``, lower triangular with a positive diagonal.

    Example::

        >>> d = CoupledNormal(torch.zeros(5, 3, 2), torch.ones(3, 2), torch.eye(5))
        >>> d.batch_shape, d.event_shape
        (torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(self, loc: Tensor, scale: Tensor, layer_scale_tril: Tensor) -> None:
        self.loc, self.scale, self.layer_scale_tril = loc, scale, layer_scale_tril
        super().__init__(loc.shape[:1], scale.shape)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        error = self.scale * (self.layer_scale_tril @ self._flat(noise)).reshape(shape)
        return self.made_of(noise, self.loc + error)

    def log_prob(self, value: Tensor) -> Tensor:
        """``log q(X_l | X_<l)`` in nats, of the broadcast batch shape."""
        if (own := self.of_own_draw(value)) is not None:
            return own
        error = self._flat((value - self.loc) / self.scale)
        white = torch.linalg.solve_triangular(self.layer_scale_tril, error, upper=False)
        return -0.5 * (white.square() + math.log(2 * math.pi)).sum(-1) - self._log_scale()

    def entropy(self) -> Tensor:
        """The entropy of ``X_l`` given ``X_<l``, ``batch_shape``."""
        size = self.event_shape.numel()
        entropy = 0.5 * size * (1 + math.log(2 * math.pi)) + self._log_scale()
        return entropy.expand(self.batch_shape)

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - len(self.event_shape)], self.event_shape.numel())

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
