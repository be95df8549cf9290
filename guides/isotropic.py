"""A single width, the largest that the loss on an anchor set allows."""

import math
from collections.abc import Mapping
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_blora.guides._post_hoc import Evidence, PostHoc
from pyro_blora.guides._site_guide import Site


class Isotropic(PostHoc):
    r"""A normal of one width :math:`s` around a point estimate, found without more training.

    .. math::

        q(U) = \mathcal{N}\left(\hat U, s^2 \mathrm{diag}(\tau)^2\right), \qquad
        s = \max \{ s : \mathcal{L}(s) \le \mathcal{L}(0) + \epsilon \},

    with :math:`\tau` the prior's standard deviations and :math:`\mathcal{L}` the mean negative
    log-likelihood of draws on an anchor set. It trains like :class:`Delta`; then
    :func:`pyro_blora.inference.finish` finds :math:`s` by bisection.

    The original, Training-free Bayesianization, rotates LoRA's factors by an SVD, so that the noise
    is isotropic in the weight, and uses the model's own answers as labels and a relative
    threshold. Here the noise is isotropic in the site, and the labels come from the data.

    Args:
        threshold: :math:`\epsilon`, in nats per example. Default: 0.003.
        max_width: the largest ``s`` that is tried. Default: 1, the prior's own width.
        iterations: bisections of ``log s``, down to a thousandth of ``max_width``. Default: 8.
        num_samples: draws for each example in the estimate of the loss. Default: 4.

    Parameters, for a site of batch shape ``(n,)``: ``loc``, ``(n, *event_shape)``. Buffers:
    ``unit``, :math:`\tau`, and ``width``, :math:`s`.

    Reference:
        Shi et al. 2024, "Training-free Bayesianization for low-rank adapters", arXiv:2412.05723.

    Example::

        blora = BayesianLoRA(net, guide=Isotropic())
        fit(blora, train, collate=collate, num_steps=300)  # also finds the width
    """

    symmetric: ClassVar[bool] = True
    unit: Tensor
    width: Tensor

    def __init__(
        self,
        *,
        threshold: float = 0.003,
        max_width: float = 1.0,
        iterations: int = 8,
        num_samples: int = 4,
    ) -> None:
        super().__init__()
        self.check_positive("threshold", "max_width", "iterations", "num_samples")

    def setup(self, site: Site) -> None:
        """Registers ``loc``, the prior's standard deviations and the width."""
        super().setup(site)
        self.register_buffer("unit", site.start()[1])
        self.register_buffer("width", torch.ones((), device=self.loc.device))

    @classmethod
    def finish(cls, families: Mapping[str, "Isotropic"], evidence: Evidence) -> dict[str, float]:
        """Finds the width by bisection of its logarithm."""
        first = next(iter(families.values()))

        def loss(width: float) -> float:
            for family in families.values():
                family.width.fill_(width)
                family.settle()
            return evidence.loss(first.num_samples)

        try:
            allowed = loss(0.0) + first.threshold  # a point, but with the noise of the other widths
            high = math.log(first.max_width)
            low = high - math.log(1000)
            if loss(math.exp(high)) <= allowed:
                low = high
            else:
                for _ in range(first.iterations):
                    middle = (low + high) / 2
                    fits = loss(math.exp(middle)) <= allowed
                    low, high = (middle, high) if fits else (low, middle)
        except BaseException:  # the width so far is only a trial
            for family in families.values():
                family.reopen()
            raise
        for family in families.values():
            family.width.fill_(math.exp(low))
        return {"width": math.exp(low)}

    def widened(self) -> TorchDistribution:
        """The normal around ``loc``."""
        return dist.Normal(self.loc, self.width * self.unit).to_event(self.site.event_dim)
