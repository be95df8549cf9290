"""Methods: a prior and a guide, with how the pair is trained and how it predicts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import pyro_blora.guides as guides
import pyro_blora.models as models
from pyro_blora.errors import ConfigurationError, check_count, check_kind, near_miss
from pyro_blora.guides import SiteGuide
from pyro_blora.models import UpdateModel

T = TypeVar("T")

LINEARIZED = 256  # draws of the linearized network, which cost no passes


@dataclass(frozen=True)
class Method:
    """A prior, a guide, and how the pair is trained and predicts.

    Example::

        get_method("laplace-lora").linearized  # True, as published
        Method("mine", prior=Subspace(), guide=FullRank(), num_samples=20)
    """

    name: str
    prior: UpdateModel | Mapping[str, UpdateModel]  #: a template as in ``BayesianLoRA``
    guide: SiteGuide | Mapping[str, SiteGuide] | Callable[..., Any]  #: likewise
    #: AdamW's rates by parameter role that differ from the prior's own
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    held_out: float | None = (
        None  #: share that ``fit`` calibrates with; by default the likelihood's
    )
    #: draws of a prediction; by default 10, but 0 for a point, and 256 if linearized
    num_samples: int | None = None
    linearized: bool = False  #: whether predictions use the linearized network

    def with_rank(self, rank: int) -> "Method":
        """The same method with a prior of another rank."""
        check_kind("prior", self.prior, UpdateModel)
        options = {**self.prior.options(), "rank": rank}  # type: ignore[union-attr]
        return replace(self, prior=type(self.prior)(**options))

    def draws(self, num_samples: int | None = None, default: int = 10) -> int:
        """The number of posterior draws for a prediction: as passed, the method's, or its usual."""
        if num_samples is None:
            num_samples = self.num_samples
        if num_samples is None:
            is_point = getattr(self.guide, "is_point", False)
            num_samples = 0 if is_point else LINEARIZED if self.linearized else default
        check_count("num_samples", num_samples, 0)
        return num_samples

    def check_draws(self) -> None:
        """Raises ConfigurationError if the method averages linearized logits, not networks."""
        if self.linearized:
            raise ConfigurationError(
                f"The method {self.name!r} averages draws of linearized logits, which no network "
                "computes; use num_samples=0, the mean, or a method with linearized=False."
            )


_published = partial(Method, held_out=0.0)  # their papers fit no temperature
_KRONECKER = models.KroneckerInducing()
_LORA = models.GaussianFactors(random="both", sigma=1e4)
_WIDE = models.GaussianFactors(random="both", sigma=1.0)
_MEAN_FIELD = guides.MeanField(init_scale=0.1)
_BLOB = models.GaussianFactors(random="A", sigma=0.2)
_KNOWN = (
    Method("bayesian-lora", _KRONECKER, guides.MatrixNormal()),
    _published("lora", _LORA, guides.Delta(), {"mean": 5e-4}),
    Method("map", _KRONECKER, guides.Delta()),
    _published("bayesian-lora-factor", models.FactorInducing(conditional="scaled"), _MEAN_FIELD),
    Method("mean-field", _KRONECKER, guides.MeanField()),
    # BLoB's eps^2 with eps = 0.05
    _published("blob", _BLOB, guides.MeanField(init_scale=0.0125)),
    _published("scalabl", models.Subspace(), _MEAN_FIELD),
    _published("b-lora-xs", models.SpectralInducing(rank=8), guides.FullRank(init_scale=0.1)),
    _published("laplace-lora", _WIDE, guides.Laplace(), linearized=True),
    # the spread is so small that every member starts at the pretrained network
    _published("ensemble", _WIDE, guides.Ensemble(spread=0.01), num_samples=5),
)
METHODS: dict[str, Method] = {known.name: known for known in _KNOWN}


def get_method(method: str | Method) -> Method:
    """The method of a name in :data:`METHODS`, or of a pair ``"PRIOR+GUIDE"``.

    ``PRIOR`` and ``GUIDE`` are classes of ``pyro_blora.models`` and ``pyro_blora.guides``, or
    ``module:Class``. A :class:`Method` is returned as it is.

    Example::

        >>> get_method("bayesian-lora").guide
        MatrixNormal()
        >>> get_method("Subspace+FullRank").with_rank(4).prior
        Subspace(rank=4)
    """
    if isinstance(method, Method):
        return method
    if method in METHODS:
        return METHODS[method]
    prior, plus, guide = method.partition("+")
    if not plus:
        raise ConfigurationError(
            f"method {method!r} is unknown; {near_miss(method, METHODS)}. Or give a prior and a "
            "guide, KroneckerInducing+MeanField. Only compare takes KIND:NAME, with a single kind."
        )
    parts = _made("prior", prior, models, UpdateModel), _made("guide", guide, guides, SiteGuide)
    return Method(method, *parts)


def _made(kind: str, name: str, package: ModuleType, contract: type[T]) -> T:
    """An object of a class with this name, without arguments."""
    path, _, last = name.rpartition(":")
    if path:
        package = import_module(path)
    known: dict[str, type[T]] = {
        n: each
        for n, each in vars(package).items()
        if isinstance(each, type) and issubclass(each, contract) and each is not contract
    }
    if last not in known:
        raise ConfigurationError(f"{kind} {name!r} is unknown; {near_miss(last, known)}.")
    return known[last]()
