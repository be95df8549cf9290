"""A prior and a guide family of the user's own, as the documentation has them."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch.distributions import constraints

from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Likelihood, MultipleChoice
from pyro_blora.models import KroneckerInducing, UpdateModel
from pyro_blora.updates import LowRankUpdate


class Plain(UpdateModel):
    """The example of ``UpdateModel``: A is learned, B is random."""

    roles: ClassVar[dict[str, str]] = {"A": "direction"}

    def __init__(self, *, rank: int = 2) -> None:
        super().__init__()

    def setup(self, group):
        self.A = PyroParam(self.randn(group.n, self.rank, group.d_in) / group.d_in**0.5)

    def forward(self):
        with self.plate():
            B = pyro.sample(self.site("B"), self.normal(self.group.d_out, self.rank))
        return LowRankUpdate(A=self.A, B=B)


class Scaled(Plain):
    """With a positive random scale for each layer, and both factors random."""

    def forward(self):
        with self.plate():
            tau = pyro.sample(self.site("tau"), dist.HalfNormal(torch.tensor(0.5)))
            A = pyro.sample(self.site("A"), self.normal(self.rank, self.group.d_in))
            B = pyro.sample(self.site("B"), self.normal(self.group.d_out, self.rank))
        return LowRankUpdate(A=A + self.A, B=tau[..., None, None] * B)


class Centered(Plain):
    """The scale, which the layers share, is in the density of B alone."""

    def forward(self):
        tau = pyro.sample(self.site("tau"), dist.HalfCauchy(torch.tensor(0.5)))
        with self.plate():
            normal = self.normal(self.group.d_out, self.rank, scale=tau[..., None, None])
            B = pyro.sample(self.site("B"), normal)
        return LowRankUpdate(A=self.A, B=B)


class Shifted(Plain):
    """The mean of B, real like B itself, is a site that the layers share."""

    def forward(self):
        mean = pyro.sample(self.site("mean"), self.normal())
        with self.plate():
            one = torch.ones(self.group.d_out, self.rank)
            B = pyro.sample(self.site("B"), dist.Normal(mean[..., None, None], one).to_event(2))
        return LowRankUpdate(A=self.A, B=B)


class RandomScale(KroneckerInducing):
    no_start: ClassVar[str] = "its scales are random"

    def __init__(self, *, sigma=None, conditional="deterministic") -> None:
        super().__init__(rank=2, scale="fixed", sigma=sigma, conditional=conditional)

    def layer_scale(self):
        with self.plate():
            return pyro.sample(self.site("sigma"), dist.HalfCauchy(self.sigma_start))


class Spread(SiteGuide):
    """The example of ``SiteGuide``: one standard deviation for each layer."""

    roles: ClassVar[dict[str, str]] = {"loc": "mean", "scale": "scale"}

    def setup(self, site):
        loc, scale = site.start()
        self.loc = PyroParam(loc)
        flat = scale.flatten(-site.event_dim).mean(-1) if site.event_dim else scale
        self.scale = PyroParam(self.init_scale * flat, constraints.positive)

    def distribution(self):
        scale = self.scale.reshape(self.scale.shape + (1,) * self.site.event_dim)
        return dist.Normal(self.loc, scale).to_event(self.site.event_dim)


class Sloped(MultipleChoice):
    roles: ClassVar[dict[str, str]] = {"slope": "likelihood"}
    held_out: ClassVar[float] = 0.0

    def __init__(self, *, num_data=None):
        super().__init__(num_data=num_data)
        self.slope = PyroParam(torch.ones(()))

    def logits(self, net, batch):
        return self.slope * super().logits(net, batch)


class OfX(Likelihood):
    """Of a network that is called with ``x``, by position."""

    keys = ("x",)

    def logits(self, net, batch):
        return net(batch["x"])
