"""Named pairs of a prior and a guide: published methods, each with its citation.

A method is named by a recipe (``"blob"``) or by a pair of class names (``"Subspace+FullRank"``,
``"my_module:MyPrior+MeanField"``), in ``BayesianLoRA.from_recipe`` and in every command. Packages
may add recipes through the entry-point group ``pyro_blora.recipes``; each entry is a
:class:`Recipe`.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from torch import nn

import pyro_blora.guides as guides
import pyro_blora.models as models
from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.guides import Delta, Ensemble, MeanField, SiteGuide
from pyro_blora.likelihoods import CausalLM, Likelihood, SequenceClassification
from pyro_blora.likelihoods.multiple_choice import Scale
from pyro_blora.models import GaussianFactors, KroneckerInducing, UpdateModel
from pyro_blora.network.targets import is_classifier

__all__ = [
    "RECIPES",
    "WITHOUT_PAIR",
    "Recipe",
    "all_recipes",
    "recipe",
    "usual_likelihood",
    "usual_prior",
]


@dataclass(frozen=True)
class Recipe:
    """A published method as a prior beside a guide.

    Attributes:
        name: what it is called.
        prior: makes the prior of a rank.
        guide: makes the guide.
        citation: authors, year, title or venue, arXiv number.
        summary: what it is, in a line.
        fit: options of :func:`pyro_blora.fit` that belong to it.
        num_samples: draws for a prediction, where the method fixes them.
        linearised: whether its predictive is the linearised one.
        scale: that of an option's score, as of ``MultipleChoice``: learned by this library's own
            methods and by pairs of classes, fixed by published ones.
        rank: what suits it where none is given.

    ``pyro-blora compare`` goes by all of them. In a program::

        method = recipe("laplace-lora")
        likelihood = MultipleChoice(num_data=len(train), scale=method.scale)
        blora = BayesianLoRA.from_recipe(net, method.name, likelihood=likelihood)
        fit(blora, train, collate=collate, num_steps=300, **method.fit)
        blora.predict(batch, linearised=method.linearised).probs  # B x K
    """

    name: str
    prior: Callable[[int], UpdateModel]
    guide: Callable[[], SiteGuide]
    citation: str
    summary: str
    fit: dict[str, Any] = field(default_factory=dict)
    num_samples: int | None = None
    linearised: bool = False
    scale: Scale = "fixed"
    rank: int = 8

    def prior_of(self, rank: int | None) -> UpdateModel:
        """The prior of a rank, or of the rank that suits the method."""
        return self.prior(self.rank if rank is None else rank)


def usual_prior(rank: int = 8) -> UpdateModel:
    """The prior of ``BayesianLoRA(net)`` and of the recipes that differ in the guide alone.

    Args:
        rank: the size of the inducing matrices. Default: 8.

    Example::

        >>> usual_prior(rank=4)
        KroneckerInducing(rank=4, sigma='shared', keep=0.9)
    """
    return KroneckerInducing(rank=rank, sigma="shared", keep=0.9)


def usual_likelihood(net: nn.Module) -> Likelihood:
    """The likelihood of ``BayesianLoRA(net)``: for a classifier its classes, else a text's tokens.

    Args:
        net: the network.
    """
    return SequenceClassification() if is_classifier(net) else CausalLM()


_KNOWN = (
    Recipe(
        "fisher",
        lambda rank: models.FisherInducing(rank=rank),
        guides.MatrixNormal,
        "this library; after Lin et al. 2026, Bayesian-LoRA, arXiv:2601.21003",
        "a core between the top directions of the network's own gradients, from the prior on",
        scale="relative",
        rank=32,
    ),
    Recipe(
        "lora",
        lambda rank: GaussianFactors(rank=rank, random="both", sigma=1e4, alpha=2.0 * rank),
        Delta,
        "Hu et al. 2021, LoRA, arXiv:2106.09685",
        "maximum likelihood: a point estimate under a prior too wide to be felt",
        num_samples=0,
    ),
    Recipe(
        "map",
        lambda rank: KroneckerInducing(rank=rank, sigma="shared"),  # no direction left out
        Delta,
        "Lin et al. 2026, Bayesian-LoRA, arXiv:2601.21003 (its collapsed limit)",
        "the posterior's mode under the Kronecker prior",
        num_samples=0,
        scale="relative",
    ),
    Recipe(
        "bayesian-lora",
        usual_prior,
        guides.MatrixNormal,
        "Lin et al. 2026, Bayesian-LoRA, arXiv:2601.21003 (with directions left out by chance)",
        "one inducing matrix for each weight, matrix normal posterior",
        scale="relative",
    ),
    Recipe(
        "bayesian-lora-factor",
        lambda rank: models.FactorInducing(rank=rank, conditional="scaled"),
        MeanField,
        "Lin et al. 2026, Bayesian-LoRA, arXiv:2601.21003 (as its code reads it)",
        "an inducing matrix for each LoRA factor, conditional noise with a capped lambda",
    ),
    Recipe(
        "mean-field",
        usual_prior,
        MeanField,
        "Blundell et al. 2015, Weight uncertainty in neural networks, arXiv:1505.05424",
        "the Kronecker prior with independent normals",
        scale="relative",
    ),
    Recipe(
        "blob",
        lambda rank: GaussianFactors(rank=rank, random="A", sigma=0.2, alpha=2.0 * rank),
        lambda: MeanField(init_scale=0.0125),  # BLoB's eps = 0.05: s = eps^2
        "Wang et al. 2024, BLoB, arXiv:2406.11675",
        "A random with independent normals, B a point",
    ),
    Recipe(
        "scalabl",
        lambda rank: models.Subspace(rank=rank),
        MeanField,
        "Samplawski et al. 2025, ScalaBL, arXiv:2506.21408",
        "r random numbers for each weight between learned factors",
    ),
    Recipe(
        "b-lora-xs",
        lambda rank: models.SpectralInducing(rank=rank),
        guides.FullRank,
        "Marszalek et al. 2025, B-LoRA-XS, arXiv:2502.12122",
        "a random core between the weight's singular directions, full covariance (paper: SWAG)",
    ),
    Recipe(
        "laplace-lora",
        lambda rank: GaussianFactors(rank=rank, random="both", sigma=1.0, alpha=2.0 * rank),
        guides.Laplace,
        "Yang et al. 2024, Laplace-LoRA, arXiv:2308.13111",
        "curvature around a trained LoRA, prior precision by the marginal likelihood",
        linearised=True,
    ),
    Recipe(
        "tfb",
        lambda rank: GaussianFactors(rank=rank, random="A", sigma=1.0, alpha=2.0 * rank),
        guides.Isotropic,
        "Shi et al. 2024, Training-free Bayesianization, arXiv:2412.05723",
        "the widest isotropic noise that the loss of a trained LoRA allows (paper: after an SVD)",
    ),
    Recipe(
        "ensemble",
        lambda rank: GaussianFactors(rank=rank, random="both", sigma=1.0, alpha=2.0 * rank),
        lambda: Ensemble(spread=0.01),  # so little that every member starts at the network itself
        "Wang et al. 2023, LoRA ensembles, arXiv:2310.00035",
        "five LoRAs side by side",
        num_samples=5,
    ),
)
RECIPES: dict[str, Recipe] = {known.name: known for known in _KNOWN}


# Methods that are no prior beside a guide; `compare` has them all the same.
WITHOUT_PAIR = {
    "mc-dropout": (
        "plain LoRA by PEFT with its dropout left on in prediction",
        "Gal, Ghahramani 2016, Dropout as a Bayesian approximation, arXiv:1506.02142",
    ),
    "temperature": (
        "another method's log-probabilities scaled on validation items: temperature:NAME",
        "Guo et al. 2017, On calibration of modern neural networks, arXiv:1706.04599",
    ),
}


def all_recipes() -> dict[str, Recipe]:
    """The library's recipes and those of installed packages, by name."""
    found = {entry.name: entry.load() for entry in entry_points(group="pyro_blora.recipes")}
    return {**found, **RECIPES}


def recipe(name: str) -> Recipe:
    """A recipe by its name, or by the class names of a prior and a guide.

    Args:
        name: a key of :func:`all_recipes`, or ``"PRIOR+GUIDE"`` with names of
            ``pyro_blora.models`` and ``pyro_blora.guides``, or with a class of your own as
            ``module:Class``.

    Raises:
        ConfigurationError: there is no such recipe, prior or guide; the message lists near misses.
            Or a module cannot be imported, or a class has arguments without default.

    Example::

        >>> recipe("bayesian-lora").guide()
        MatrixNormal()
        >>> recipe("Subspace+FullRank").prior(4)
        Subspace(rank=4)
    """
    known = all_recipes()
    if name in known:
        return known[name]
    if "+" in name:
        left, _, right = name.partition("+")
        prior = _class(left, models, UpdateModel, "prior")
        guide = _class(right, guides, SiteGuide, "guide")
        ranked = "rank" in inspect.signature(prior).parameters
        return Recipe(
            name,
            lambda rank: prior(rank=rank) if ranked else prior(),
            guide,
            "",
            f"{left} with {right}",
            num_samples=0 if guide is Delta else None,
            scale="relative",
        )
    if name in WITHOUT_PAIR:
        raise ConfigurationError(
            f"{name} is no prior beside a guide ({WITHOUT_PAIR[name][0]}); `pyro-blora compare` "
            "has it, and so have plain_lora and temperature in pyro_blora.evaluation."
        )
    raise ConfigurationError(
        f"recipe {name!r} is unknown; {near_miss(name, known)}. Or give a prior and a guide: "
        "KroneckerInducing+MeanField."
    )


def _class(name: str, package: Any, contract: type, kind: str) -> Callable[..., Any]:
    path, _, last = name.rpartition(":")
    if path:
        try:
            package = importlib.import_module(path)
        except ImportError as error:
            raise ConfigurationError(
                f"{kind} {name!r}: module {path!r} cannot be imported ({error}); it must lie in "
                "the current folder or be installed."
            ) from error
    found = {n: made for n, made in vars(package).items() if _is_made_of(made, contract)}
    if last not in found:
        raise ConfigurationError(f"{kind} {name!r} is unknown; {near_miss(last, found)}.")
    parameters = inspect.signature(found[last]).parameters.values()
    bare = [p.name for p in parameters if p.default is p.empty and p.name != "rank"]
    if bare:
        raise ConfigurationError(
            f"{kind} {name!r} has arguments without a default, {', '.join(bare)}; give them one."
        )
    return found[last]


def _is_made_of(made: Any, contract: type) -> bool:
    return isinstance(made, type) and issubclass(made, contract) and made is not contract
