"""The contract of a guide family: the variational distribution of one sample site."""

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import Distribution, Independent, StudentT, biject_to
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint, independent
from torch.distributions.transforms import Transform
from typing_extensions import Self

from pyro_blora.errors import ConfigurationError
from pyro_blora.options import Options


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """Allows seeding within the context, and restores the global random state afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _of_components(support: Constraint) -> Constraint:
    """A mixture's support, which ``biject_to`` does not know, replaced by its components'."""
    if isinstance(support, MixtureSameFamilyConstraint):
        return _of_components(support.base_constraint)
    if isinstance(support, independent):
        inside = _of_components(support.base_constraint)
        return independent(inside, support.reinterpreted_batch_ndims)
    return support


def is_real(constraint: Constraint) -> bool:
    """Whether a constraint admits every tensor of its shape."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint is torch.distributions.constraints.real


def _median(prior: Distribution, unknown: Tensor) -> Tensor:
    """The exact median of a distribution of real numbers, or ``unknown``."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if isinstance(prior, StudentT):  # which has no icdf, but is symmetric
        return prior.loc
    try:
        return prior.icdf(unknown.new_tensor(0.5))
    except NotImplementedError:
        return unknown


@dataclass(frozen=True)
class Site:
    """A latent site as a guide family sees it, read from a trace of the prior."""

    name: str
    prior: TorchDistribution  #: its distribution, batch shape ``(..., n)`` for ``n`` layers
    plates: tuple[CondIndepStackFrame, ...]  #: the plates around it
    suggested: Tensor | None = None  #: the prior's suggestion of a start, ``(n, *event_shape)``

    @property
    def group(self) -> str:
        """The name of the site's group of layers, which is the part before the first dot."""
        return self.name.partition(".")[0]

    @property
    def shape(self) -> torch.Size:
        """Batch shape, then event shape, of the *unconstrained* value."""
        return torch.Size(self.transform.inverse_shape(self.prior.shape()))

    @property
    def event_dim(self) -> int:
        """Number of dimensions of one draw, unconstrained."""
        return len(self.event_shape)

    @property
    def batch_shape(self) -> torch.Size:
        """The prior's batch shape, ``(n,)`` for ``n`` layers."""
        return torch.Size(self.prior.batch_shape)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one draw, unconstrained."""
        return self.shape[len(self.batch_shape) :]

    @property
    def size(self) -> int:
        """Number of entries of one draw, unconstrained."""
        return self.event_shape.numel()

    @property
    def support(self) -> Constraint:
        """The support of the prior, or of its components if it is a mixture."""
        return _of_components(self.prior.support)

    @property
    def transform(self) -> Transform:
        """The transform from real numbers to the support of the site."""
        try:
            return biject_to(self.support)
        except NotImplementedError as error:
            raise ConfigurationError(
                f"Site {self.name!r} is {type(self.prior).__name__}, whose support "
                f"({self.support}) is not an image of the real numbers. Relax a discrete site "
                "(RelaxedBernoulli), or sum it out (MixtureSameFamily)."
            ) from error

    @property
    def is_real(self) -> bool:
        """Whether the support is all of R^d, so that no transform is needed."""
        return is_real(self.support)

    def start(self) -> tuple[Tensor, Tensor]:
        """Location and scale of the prior in unconstrained coordinates, each of ``shape``.

        They are the mean and the standard deviation if the prior is real and these are finite,
        otherwise the median, exact where it is known, and half the distance between the 16 % and
        84 % quantiles of 1,000 draws. A start that the prior suggests replaces the location.
        """
        loc = scale = torch.tensor(torch.nan)
        if self.is_real:
            loc, scale = self.prior.mean, self.prior.variance.sqrt()
            if not loc.isfinite().all():
                loc = _median(self.prior, loc)
        if not (loc.isfinite().all() and scale.isfinite().all()):
            with forked_rng(self.prior.sample().device):
                torch.manual_seed(0)
                draws = self.transform.inv(self.prior.sample(torch.Size([1000]))).detach()
            low, median, high = draws.quantile(draws.new_tensor([0.16, 0.5, 0.84]), dim=0)
            scale = (high - low) / 2
            loc = loc if loc.isfinite().all() else median
        if self.suggested is not None:
            loc = self.transform.inv(self.suggested)
        return loc.detach().clone(), scale.detach().clone()


class SiteGuide(Options, PyroModule):
    r"""A guide family: :math:`q(U)` of one site of any prior.

    A family is made before the sites are known; :meth:`bind` copies it for each site, whose shape,
    plates and support it reads from the prior, as an AutoGuide does. A subclass defines
    :meth:`setup`, which registers the parameters of q, each a :class:`pyro.nn.PyroParam`, and
    :meth:`distribution`, which returns q over the *unconstrained* value of the site.

    Args:
        init_scale: standard deviation of q at the start, in units of the prior's. 1 starts at the
            prior itself, where KL[q || p] = 0, if no site's prior depends on another site; a small
            value starts near a plain LoRA.

    Example::

        class Spread(SiteGuide):  # one standard deviation for each layer
            roles = {"loc": "mean", "scale": "scale"}

            def setup(self, site: Site) -> None:
                loc, scale = site.start()
                self.loc = PyroParam(loc)
                flat = scale.flatten(-site.event_dim).mean(-1)
                self.scale = PyroParam(self.init_scale * flat, constraints.positive)

            def distribution(self) -> TorchDistribution:
                scale = self.scale.reshape(self.scale.shape + (1,) * self.site.event_dim)
                return Normal(self.loc, scale).to_event(self.site.event_dim)
    """

    #: the learning rate of each parameter in ``fit``: ``"mean"``, ``"scale"`` or ``"direction"``
    roles: ClassVar[dict[str, str]] = {}
    couples_sites: ClassVar[bool] = False  #: whether draws of two sites depend on each other
    #: whether q is symmetric around its mean, so that draws are made in pairs of mirror images;
    #: False for a subclass of a symmetric family that defines another distribution
    symmetric: ClassVar[bool] = False
    is_point: ClassVar[bool] = False  #: whether q is a point mass, whose draws are all equal
    site: Site

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "symmetric" not in vars(cls) and "distribution" in vars(cls):
            cls.symmetric = False

    def __init__(self, *, init_scale: float = 0.01) -> None:
        super().__init__()
        self.check_positive("init_scale")

    def check_size(self, site: Site, option: str, size: int) -> None:
        """Raises an error if ``size``, in each layer of ``site``, exceeds this limit."""
        most = getattr(self, option)
        if size > most:
            raise ConfigurationError(
                f"{type(self).__name__}: site {site.name!r} is {tuple(site.event_shape)} in each "
                f"layer, and {size:,} is more than {option}={most}; use MeanField, or "
                f"raise {type(self).__name__}.{option}."
            )

    def bind(self, site: Site) -> Self:
        """A copy of this family for ``site``, with its parameters registered."""
        # Constructed anew, because a deep copy would keep the parameter-store mode of the original
        bound = type(self)(**copy.deepcopy(self.options()))
        bound.site = site
        bound.setup(site)
        return bound

    def setup(self, site: Site) -> None:
        """Registers the parameters of q for ``site``, which start from the prior."""
        raise NotImplementedError(f"{type(self).__name__} must define setup(site).")

    def distribution(self) -> TorchDistribution:
        """The distribution q of the unconstrained value, whose shape is ``site.shape``."""
        raise NotImplementedError(f"{type(self).__name__} must define distribution().")

    def forward(self) -> TorchDistribution:
        """The distribution q of the value of the site itself, in the prior's support."""
        q = self.distribution()
        if self.site.is_real:
            return q
        # with a cache, because a flow can only score the value that it has just drawn
        return TransformedDistribution(q, [self.site.transform.with_cache()])

    def center(self) -> Tensor:
        """The image of the mean of :meth:`distribution`, which draws estimate if it is unknown."""
        q = self.distribution()
        try:
            mean: Tensor = q.mean
        except NotImplementedError:
            with forked_rng(next(self.parameters()).device):
                torch.manual_seed(0)
                mean = q.sample(torch.Size([1000])).mean(0)
        return mean if self.site.is_real else self.site.transform(mean)
