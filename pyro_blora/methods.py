"""Named methods: pairs of a prior and a guide, with their options for training and prediction.

``BayesianLoRA(net)`` uses ``METHODS["bayesian-lora"]``. ``BayesianLoRA(net, method=...)`` and all
commands take a name from :data:`METHODS` or a pair of class names, ``"Subspace+FullRank"`` or
``"my_module:MyPrior+MeanField"``. Importing this module does not import torch.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.options import check_count

if TYPE_CHECKING:
    from pyro_blora.guides import SiteGuide
    from pyro_blora.models import UpdateModel


@dataclass(frozen=True)
class Method:
    """A prior, a guide, and how the pair is trained and predicts.

    Attributes:
        name: the method's name.
        prior: the prior's class: a name in ``pyro_blora.models``, or ``module:Class``.
        guide: the guide's class: a name in ``pyro_blora.guides``, or ``module:Class``.
        prior_options: arguments of the prior's constructor, besides the rank.
        guide_options: arguments of the guide's constructor.
        learning_rates: AdamW's rates by parameter role that differ from the prior's own.
        held_out: share of the examples that ``fit`` calibrates with; ``None`` for the likelihood's.
        num_samples: number of posterior draws for a prediction. Default: 10.
        linearized: whether predictions use the linearized network.

    Example::

        get_method("laplace-lora").linearized  # True, as published
        Method("mine", "my_module:MyPrior", "MeanField", num_samples=20)
    """

    name: str
    prior: str
    guide: str
    prior_options: Mapping[str, Any] = field(default_factory=dict)
    guide_options: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    held_out: float | None = 0.0
    num_samples: int | None = None
    linearized: bool = False

    def prior_of(self, rank: int | None = None) -> "UpdateModel":
        """Makes the prior, by default with the method's own rank."""
        options = dict(self.prior_options) | ({} if rank is None else {"rank": rank})
        return cast("UpdateModel", _class(self.prior, "prior")(**options))

    def draws(self, num_samples: int | None) -> int:
        """The number of posterior draws for a prediction: as passed, the method's own, or 10."""
        if num_samples is None:
            num_samples = 10 if self.num_samples is None else self.num_samples
        check_count("num_samples", num_samples, 0)
        return num_samples

    def check_draws(self) -> None:
        """Raises ConfigurationError if the method averages linearized logits, not networks."""
        if self.linearized:
            raise ConfigurationError(
                f"The method {self.name!r} averages draws of linearized logits, which no network "
                "computes; use num_samples=0, the mean, or a method with linearized=False."
            )

    def guide_of(self) -> "SiteGuide":
        """Makes the guide family."""
        return cast("SiteGuide", _class(self.guide, "guide")(**self.guide_options))


_KNOWN = (
    Method("bayesian-lora", "KroneckerInducing", "MatrixNormal", held_out=None),
    Method(
        "lora",
        "GaussianFactors",
        "Delta",
        prior_options={"random": "both", "sigma": 1e4},
        learning_rates={"mean": 5e-4},
        num_samples=0,
    ),
    Method(
        "map",
        "KroneckerInducing",
        "Delta",
        held_out=None,
        num_samples=0,
    ),
    Method(
        "bayesian-lora-factor",
        "FactorInducing",
        "MeanField",
        prior_options={"conditional": "scaled"},
        guide_options={"init_scale": 0.1},
    ),
    Method("mean-field", "KroneckerInducing", "MeanField", held_out=None),
    Method(
        "blob",
        "GaussianFactors",
        "MeanField",
        prior_options={"random": "A", "sigma": 0.2},
        guide_options={"init_scale": 0.0125},  # s = eps^2 with eps = 0.05, as in BLoB
    ),
    Method(
        "c-lora",
        "GaussianFactors",
        "Amortized",
        prior_options={"random": "A", "sigma": 0.2},
        guide_options={"init_scale": 0.0125},
    ),
    Method("scalabl", "Subspace", "MeanField", guide_options={"init_scale": 0.1}),
    Method(
        "b-lora-xs",
        "SpectralInducing",
        "FullRank",
        prior_options={"rank": 8},
        guide_options={"init_scale": 0.1},
    ),
    Method(
        "laplace-lora",
        "GaussianFactors",
        "Laplace",
        prior_options={"random": "both", "sigma": 1.0},
        linearized=True,
    ),
    Method(
        "ensemble",
        "GaussianFactors",
        "Ensemble",
        prior_options={"random": "both", "sigma": 1.0},
        guide_options={
            "spread": 0.01
        },  # so small that every member starts at the pretrained network
        num_samples=5,
    ),
)
METHODS: dict[str, Method] = {known.name: known for known in _KNOWN}

#: Rows of a comparison, ``KIND:NAME``, that come from the training of another method.
KINDS = {
    "split": "NAME on seven eighths of the items, with a temperature fitted to the others",
    "temperature": "NAME with a temperature fitted to validation items",
    "best": "NAME at its best of three validations",
    "mean": "the posterior mean of NAME, in one pass",
    "linearized": "NAME with draws of the linearized network",
    "distilled": "the posterior mean of NAME with a temperature from its draws, in one pass",
}


def get_method(name: str) -> Method:
    """The method of a name in :data:`METHODS`, or of a pair ``"PRIOR+GUIDE"``.

    ``PRIOR`` and ``GUIDE`` are class names as in :class:`Method`.

    Example::

        >>> get_method("bayesian-lora").guide_of()
        MatrixNormal()
        >>> get_method("Subspace+FullRank").prior_of(4)
        Subspace(rank=4)
    """
    if name in METHODS:
        return METHODS[name]
    if "+" in name:
        left, _, right = name.partition("+")
        _class(left, "prior")
        draws = 0 if _class(right, "guide").is_point else None
        return Method(name, left, right, num_samples=draws, held_out=None)
    if kind := kind_of(name)[0] or (name in KINDS and name):
        raise ConfigurationError(
            f"{name} must be a row of a comparison, {kind}:NAME ({KINDS[kind]}), not a method; "
            "use it in `pyro-blora compare` or pyro_blora.compare."
        )
    raise ConfigurationError(
        f"method {name!r} is unknown; {near_miss(name, METHODS)}. Or give a prior and a guide: "
        "KroneckerInducing+MeanField."
    )


def kind_of(row: str) -> tuple[str, str]:
    """The kind of a row of a comparison, or ``""``, and the method that is trained for it."""
    kind, _, name = row.partition(":")
    return (kind, name) if kind in KINDS and name else ("", row)


def _class(name: str, kind: Literal["prior", "guide"]) -> Any:
    import pyro_blora.guides as guides
    import pyro_blora.models as models

    package: Any = models if kind == "prior" else guides
    contract = models.UpdateModel if kind == "prior" else guides.SiteGuide
    path, _, last = name.rpartition(":")
    if path:
        try:
            package = import_module(path)
        except ImportError as error:
            raise ConfigurationError(
                f"{kind} {name!r}: module {path!r} cannot be imported ({error}); it must be in the "
                "current folder or installed."
            ) from error
    found = {
        n: made
        for n, made in vars(package).items()
        if isinstance(made, type) and issubclass(made, contract) and made is not contract
    }
    if last not in found:
        raise ConfigurationError(f"{kind} {name!r} is unknown; {near_miss(last, found)}.")
    parameters = inspect.signature(found[last]).parameters.values()
    if bare := [p.name for p in parameters if p.default is p.empty and p.name != "rank"]:
        raise ConfigurationError(
            f"{kind} {name!r} has arguments without a default, {', '.join(bare)}; give them one."
        )
    return found[last]
