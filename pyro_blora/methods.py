"""Methods by name: a prior beside a guide, and how such a pair is trained and predicts.

``BayesianLoRA(net)`` is ``METHODS["bayesian-lora"]``. ``BayesianLoRA(net, method=...)`` and every
command take a name of this table, or a pair of class names: ``"Subspace+FullRank"``,
``"my_module:MyPrior+MeanField"``. The records import nothing heavy.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

from pyro_blora.errors import ConfigurationError, near_miss

if TYPE_CHECKING:
    from pyro_blora.guides import SiteGuide
    from pyro_blora.models import UpdateModel

_RATES = {
    "mean": 5e-2,  # of the guide, in units of a whitened core
    "scale": 2e-2,  # of the guide and of the prior: a step of their logarithm
    "direction": 5e-3,
    "likelihood": 5e-2,
    "head": 1e-3,
}
_POINT_EPOCHS = 6.0
_POINT_STEPS = 300  # at least: fewer teach a new head nothing
_SLOWER = {**_RATES, "mean": 2e-2, "scale": 1e-2}
_LORA_RATES = {**_SLOWER, "mean": 1e-3, "direction": 1e-3}  # means are LoRA's own factors


@dataclass(frozen=True)
class Method:
    """A prior beside a guide, and all that training and prediction are told of the pair.

    Attributes:
        name: what it is called.
        prior: the prior's class: a name of ``pyro_blora.models``, or ``module:Class``.
        guide: the guide's class, likewise of ``pyro_blora.guides``.
        citation: authors, year, title or venue, arXiv number.
        prior_options: of the prior's constructor, besides the rank.
        guide_options: of the guide's constructor.
        rank: what suits it where none is given. Default: 8.
        scale: that of an option's score, as of ``MultipleChoice``. Default: fixed.
        learning_rates: of AdamW, by the role of a parameter; of a role that is missing, and by
            default, ``bayesian-lora``'s.
        point_epochs: epochs (at least 300 steps) after which the learning rate of directions and
            heads is zero, because no KL keeps them from memorizing. Default: never.
        num_samples: draws for a prediction, if the method fixes them.
        linearized: whether its predictive is the linearized one.

    Example::

        get_method("laplace-lora").linearized  # as published
        Method("mine", "my_module:MyPrior", "MeanField", rank=4)
    """

    name: str
    prior: str
    guide: str
    citation: str = ""
    prior_options: Mapping[str, Any] = field(default_factory=dict)
    guide_options: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 8
    scale: Literal["learned", "fixed"] = "fixed"
    learning_rates: Mapping[str, float] = field(default_factory=_RATES.copy)
    point_epochs: float | None = None
    num_samples: int | None = None
    linearized: bool = False

    def point_steps(self, of_an_epoch: int | None) -> int | None:
        """The steps in which points learn, by the batches of an epoch; ``None`` for all."""
        if self.point_epochs is None or of_an_epoch is None:
            return None
        return max(_POINT_STEPS, round(self.point_epochs * of_an_epoch))

    def prior_of(self, rank: int | None = None) -> "UpdateModel":
        """The prior of a rank, or of the rank that suits the method."""
        made = _class(self.prior, "prior")
        options = dict(self.prior_options)
        if "rank" in inspect.signature(made).parameters:
            options["rank"] = self.rank if rank is None else rank
        return cast("UpdateModel", made(**options))

    def guide_of(self) -> "SiteGuide":
        """The guide family."""
        return cast("SiteGuide", _class(self.guide, "guide")(**self.guide_options))


_KNOWN = (
    Method(
        "bayesian-lora",
        "KroneckerInducing",
        "MatrixNormal",
        "Lin et al. 2026, Bayesian-LoRA, arXiv:2601.21003 (begun narrow, its width the weight's)",
        scale="learned",
        point_epochs=_POINT_EPOCHS,
    ),
    Method(
        "fisher",
        "FisherInducing",
        "MatrixNormal",
        "this library; after Lin et al. 2026, Bayesian-LoRA, arXiv:2601.21003",
        rank=32,
        scale="learned",
        point_epochs=_POINT_EPOCHS,
    ),
    Method(
        "lora",
        "GaussianFactors",
        "Delta",
        "Hu et al. 2021, LoRA, arXiv:2106.09685",
        prior_options={"random": "both", "sigma": 1e4},
        learning_rates={**_LORA_RATES, "mean": 5e-4},
        num_samples=0,
    ),
    Method(
        "map",
        "KroneckerInducing",
        "Delta",
        "Lin et al. 2026, Bayesian-LoRA, arXiv:2601.21003 (its collapsed limit)",
        scale="learned",
        num_samples=0,
    ),
    Method(
        "bayesian-lora-factor",
        "FactorInducing",
        "MeanField",
        "Lin et al. 2026, Bayesian-LoRA, arXiv:2601.21003 (as its code reads it)",
        prior_options={"conditional": "scaled"},
        guide_options={"init_scale": 0.1},
        learning_rates=_SLOWER,
    ),
    Method(
        "mean-field",
        "KroneckerInducing",
        "MeanField",
        "Blundell et al. 2015, Weight uncertainty in neural networks, arXiv:1505.05424",
        scale="learned",
        point_epochs=_POINT_EPOCHS,
    ),
    Method(
        "blob",
        "GaussianFactors",
        "MeanField",
        "Wang et al. 2024, BLoB, arXiv:2406.11675",
        prior_options={"random": "A", "sigma": 0.2},
        guide_options={"init_scale": 0.0125},  # BLoB's eps = 0.05: s = eps^2
        learning_rates=_LORA_RATES,
    ),
    Method(
        "c-lora",
        "GaussianFactors",
        "Amortized",
        "Rahmati et al. 2025, C-LoRA, arXiv:2505.17773",
        prior_options={"random": "A", "sigma": 0.2},
        guide_options={"init_scale": 0.0125},
        learning_rates=_LORA_RATES,
    ),
    Method(
        "scalabl",
        "Subspace",
        "MeanField",
        "Samplawski et al. 2025, ScalaBL, arXiv:2506.21408",
        guide_options={"init_scale": 0.1},
        learning_rates={**_SLOWER, "direction": 1e-3},
    ),
    Method(
        "b-lora-xs",
        "SpectralInducing",
        "FullRank",
        "Marszalek et al. 2025, B-LoRA-XS, arXiv:2502.12122",
        guide_options={"init_scale": 0.1},
        learning_rates=_SLOWER,
    ),
    Method(
        "laplace-lora",
        "GaussianFactors",
        "Laplace",
        "Yang et al. 2024, Laplace-LoRA, arXiv:2308.13111",
        prior_options={"random": "both", "sigma": 1.0},
        learning_rates=_LORA_RATES,
        linearized=True,
    ),
    Method(
        "tfb",
        "GaussianFactors",
        "Isotropic",
        "Shi et al. 2024, Training-free Bayesianization, arXiv:2412.05723",
        prior_options={"random": "A", "sigma": 1.0},
        learning_rates=_LORA_RATES,
    ),
    Method(
        "ensemble",
        "GaussianFactors",
        "Ensemble",
        "Wang et al. 2023, LoRA ensembles, arXiv:2310.00035",
        prior_options={"random": "both", "sigma": 1.0},
        guide_options={"spread": 0.01},  # so little that every member starts at the network itself
        learning_rates=_LORA_RATES,
        num_samples=5,
    ),
)
METHODS: dict[str, Method] = {known.name: known for known in _KNOWN}

# What a comparison shows of a method's training, besides its last step
BEST = "lora-best"
SHOWN = {
    BEST: "lora at its best validation step",
    "temperature": "another's log-probabilities scaled on validation items: temperature:NAME",
    "distilled": "one pass at another's mean, its temperature from the draws: distilled:NAME",
}


def get_method(name: str) -> Method:
    """A method by its name in :data:`METHODS`, or by ``"PRIOR+GUIDE"``.

    These are class names of ``pyro_blora.models`` and ``pyro_blora.guides``, or ``module:Class``.

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
        usual = method_of(_class(left, "prior"), _class(right, "guide"))
        pair = Method(name, left, right)
        num_samples = 0 if right.rpartition(":")[2] == "Delta" else None
        kept = ("rank", "learning_rates", "point_epochs", "linearized")
        own = {each: getattr(usual, each) for each in kept}
        return replace(pair, scale="learned", num_samples=num_samples, **own)
    if name in SHOWN:
        raise ConfigurationError(
            f"{name} is no prior beside a guide ({SHOWN[name]}); `pyro-blora compare` has it."
        )
    raise ConfigurationError(
        f"method {name!r} is unknown; {near_miss(name, METHODS)}. Or give a prior and a guide: "
        "KroneckerInducing+MeanField."
    )


def method_of(prior: Any, guide: Any = None) -> Method:
    """The method of these classes, or of what they inherit; else the default's.

    Where none has this guide, it is the prior's first method that is no point estimate.
    """

    def names(made: Any, ours: str) -> list[str]:
        own = (c.__module__.startswith(ours) for c in made.__mro__)
        return [
            c.__name__ if here else f"{c.__module__}:{c.__qualname__}"
            for c, here in zip(made.__mro__, own, strict=True)
        ]

    known = METHODS.values()
    found = [k for n in names(prior, "pyro_blora.models") for k in known if k.prior == n]
    own = [] if guide is None else names(guide, "pyro_blora.guides")
    found.sort(key=lambda each: (each.guide not in own, each.guide == "Delta"))
    return next(iter(found), METHODS["bayesian-lora"])


def trained_for(name: str) -> str:
    """What is trained for a method of a comparison: itself, or what has its temperature."""
    kind, _, rest = name.partition(":")
    name = rest if kind in ("temperature", "distilled") and rest else name
    return "lora" if name in SHOWN else name


def check_method(name: str) -> None:
    """Raises ConfigurationError where a comparison has no such method."""
    get_method(trained_for(name))


def _class(name: str, kind: Literal["prior", "guide"]) -> Callable[..., Any]:
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
                f"{kind} {name!r}: module {path!r} cannot be imported ({error}); it must lie in "
                "the current folder or be installed."
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
