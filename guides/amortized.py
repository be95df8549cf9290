"""A posterior that depends on the input."""

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides._site_guide import Site
from pyro_blora.guides.mean_field import MeanField


class Amortized(MeanField):
    r"""Mean-field normals whose means and scales are shifted by the input.

    .. math::

        q(U \mid x) = \mathcal{N}\left(\mu + s \odot f(x), \; (s \odot e^{g(x)})^2\right),
        \qquad (f, g) = W h, \quad h = \tanh(W_h c(x) + b_h),

    with :math:`c(x)` the mean of the input embeddings of the tokens, scaled to length
    :math:`\sqrt d`, or ``batch["context"]`` if the batch has one. In training each particle takes
    the mean over its own examples. With a particle for each example (``fit``'s default) every
    example has its own posterior, as in prediction.

    The loss counts the KL, a mean over the particles, once for the data set, as published. With
    ``f = g = 0`` (the start) this is the ELBO. Otherwise it is *no bound* on the evidence of a
    model in which all examples share ``U``. ``fit(..., kl_weight=len(train))`` counts the KL once
    for each example: a bound for the model in which every example has its own ``U``.

    Args:
        hidden: size of ``h``. Default: 16.
        context_size: ``d``, if batches have a ``"context"``. Default: the input embeddings' size.
        init_scale: standard deviation at the start in units of the prior's. Default: 0.01.

    Parameters, for a site of batch shape ``(n,)``: ``loc`` and ``scale``, ``(n, *event_shape)``;
    ``hidden_weight`` (hidden, d) and ``hidden_bias`` (hidden); ``loc_weight`` and ``scale_weight``,
    ``(n, *event_shape, hidden)``, zero at the start.

    Reference:
        Rahmati et al. 2025, "C-LoRA: Contextual low-rank adaptation", arXiv:2505.17773.

    Example::

        blora = BayesianLoRA(net, guide=Amortized(hidden=32))
    """

    roles: ClassVar[dict[str, str]] = {
        **MeanField.roles,
        "hidden_weight": "direction",
        "hidden_bias": "direction",
        "loc_weight": "direction",
        "scale_weight": "direction",
    }
    reads_context: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True

    def __init__(
        self, *, hidden: int = 16, context_size: int | None = None, init_scale: float = 0.01
    ) -> None:
        super().__init__(init_scale=init_scale)

    def setup(self, site: Site) -> None:
        """Registers the normals and the network that shifts them."""
        super().setup(site)
        size = self.context_size or site.context_size
        if size < 1:
            raise ConfigurationError(
                "Amortized: the network has no input embeddings; give batches a 'context' (B x d) "
                "and pass context_size=d."
            )
        zeros = torch.zeros(*self.loc.shape, self.hidden, device=self.loc.device)
        weight = torch.randn(self.hidden, size, device=self.loc.device)
        self.hidden_weight = PyroParam(weight * size**-0.5)
        self.hidden_bias = PyroParam(torch.zeros_like(weight[:, 0]))
        self.loc_weight = PyroParam(zeros)
        self.scale_weight = PyroParam(zeros.clone())

    def distribution(self, context: Tensor | None = None) -> TorchDistribution:
        """The normals, of batch shape ``(n,)``, or ``(P, n)`` for ``P`` contexts."""
        loc, scale = self.loc, self.scale
        if context is not None:
            h = torch.tanh(context @ self.hidden_weight.mT + self.hidden_bias)
            loc = loc + scale * self._shift(h, self.loc_weight)
            scale = scale * self._shift(h, self.scale_weight).exp()
        return dist.Normal(loc, scale).to_event(self.site.event_dim)

    def _shift(self, h: Tensor, weight: Tensor) -> Tensor:
        """``weight h``, ``(P, ..., *shape)`` for ``P`` contexts or ``shape`` for a single one."""
        flat = h.reshape(-1, self.hidden) @ weight.reshape(-1, self.hidden).mT
        contexts = h.shape[: h.dim() - 1 - len(self.site.batch_shape)]
        return flat.reshape(contexts + self.site.shape)
