"""The guide of a whole model: one bound guide family for each latent site, or an AutoGuide."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation, AutoMessenger
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Independent, kl_divergence

from pyro_blora.distributions import Members
from pyro_blora.errors import ConfigurationError, check_kind
from pyro_blora.guides import Ensemble, Laplace
from pyro_blora.guides._site_guide import Site, SiteGuide, forked_rng
from pyro_blora.methods import Method
from pyro_blora.network.targets import by_group
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.store import read_store

DRAWS_PLATE = "posterior_samples"  # the name of the plate of Posterior.draws

GuideFactory = Callable[[BayesianLoRAModel], nn.Module]


def start_guide(guide: nn.Module) -> None:
    """Runs an AutoGuide that has not read the model yet, so that its parameters exist."""
    if not is_started(guide):
        with torch.no_grad():
            guide()


def is_started(guide: nn.Module) -> bool:
    """Whether a guide has its parameters, which an AutoGuide makes at its first call."""
    return not isinstance(guide, AutoGuide | AutoMessenger) or any(True for _ in guide.parameters())


@contextmanager
def ensembles_from_start(guide: nn.Module) -> Iterator[None]:
    """Lets ensembles begin with their first member within the context, and restores their turns."""
    turns = [family.turn for family in guide.modules() if isinstance(family, Ensemble)]
    before = [turn.clone() for turn in turns]
    for turn in turns:
        turn.zero_()
    try:
        yield
    finally:
        for turn, value in zip(turns, before, strict=True):
            turn.copy_(value)


@contextmanager
def draws_apart(guide: nn.Module, device: torch.device) -> Iterator[None]:
    """Makes draws the same every time; restores the RNG state and ensembles' turns afterwards."""
    with forked_rng(device), ensembles_from_start(guide):
        torch.manual_seed(0)
        yield


class StructuredGuide(PyroModule):
    """q over all sites: the product of one :class:`SiteGuide` per site.

    Sites have the names, plates and order of the model, as ``TraceMeanField_ELBO`` requires.
    """

    def __init__(
        self,
        family: SiteGuide | Mapping[str, SiteGuide],
        sites: list[Site],
        model: BayesianLoRAModel,
    ) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, as AutoGuide does, so that it is not registered
        self._attributes = {site.name: site.name.replace(".", "_") for site in sites}
        frames = {frame.name: frame for site in sites for frame in site.plates}
        # made once for all sites, because a new plate costs as much as a site
        self._plates = {n: pyro.plate(n, frame.size, dim=frame.dim) for n, frame in frames.items()}
        chosen: dict[str, SiteGuide] = by_group("guide", family, model.groups)
        families = list(chosen.values())
        for each in families:  # an AutoGuide is for the whole model, not for one group
            check_kind("guide", each, SiteGuide)
        self.couples_sites = any(each.couples_sites for each in families)
        self.is_symmetric = all(each.symmetric for each in families)
        for site in sites:
            template = chosen[site.group] if isinstance(family, Mapping) else family
            setattr(self, self._attributes[site.name], template.bind(site))

    def families(self) -> dict[str, SiteGuide]:
        """The bound family of each site."""
        return {name: getattr(self, attribute) for name, attribute in self._attributes.items()}

    def forward(self, batch: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Samples every site; the ``batch`` is the model's alone."""
        values: dict[str, Tensor] = {}
        with torch.autocast(self._model[0].groups[0].device.type, enabled=False):
            for name, family in self.families().items():
                q = family()
                with ExitStack() as stack:
                    for frame in family.site.plates:
                        stack.enter_context(self._plates[frame.name])
                    values[name] = pyro.sample(name, q)
        return values

    def center(self) -> dict[str, Tensor]:
        """The mean of each site, or the image of the mean of its unconstrained value."""
        read_store(self)
        with torch.autocast(self._model[0].groups[0].device.type, enabled=False):
            return {name: family.center() for name, family in self.families().items()}


def point_masses(guide: nn.Module) -> list[Delta | Members]:
    """The distributions q of sites that are point masses; none of an AutoGuide."""
    families = guide.families().values() if isinstance(guide, StructuredGuide) else ()
    with torch.no_grad(), pyro.validation_enabled(False):
        distributions = [family.distribution() for family in families]
    bare = (q.base_dist if isinstance(q, Independent) else q for q in distributions)
    return [q for q in bare if isinstance(q, Delta | Members)]


def analytic_kl(guide: nn.Module, model: BayesianLoRAModel) -> Tensor | None:
    """KL[q(U) || p(U)] summed over all sites in nats, or ``None`` if it is not analytic."""
    if not isinstance(guide, StructuredGuide) or point_masses(guide):
        return None
    found: list[list[Tensor]] = []  # by draw and site
    with torch.no_grad(), draws_apart(guide, model.groups[0].device):
        for _ in range(2):  # draws, between which the KL differs if a site depends on another
            q = pyro.poutine.trace(guide).get_trace()
            p = pyro.poutine.trace(pyro.poutine.replay(model.updates, trace=q)).get_trace()
            pairs = [[trace.nodes[site.name]["fn"] for trace in (q, p)] for site in model.sites]
            try:
                found.append([kl_divergence(*pair).sum().cpu() for pair in pairs])
            except NotImplementedError:
                return None
    same = all(map(torch.equal, *found))
    return sum(found[0], torch.zeros(())) if same else None


def make_guide(
    family: SiteGuide | Mapping[str, SiteGuide] | GuideFactory, model: BayesianLoRAModel
) -> nn.Module:
    """The guide of a model, made from families, or by a callable that takes the model."""
    sites = model.sites  # this also checks the prior's update
    if isinstance(family, SiteGuide | Mapping):
        return StructuredGuide(family, sites, model)
    is_family = isinstance(family, type) and issubclass(family, SiteGuide)
    guide = family(model) if callable(family) and not is_family else family
    check_kind("guide", guide, nn.Module)
    laplace = isinstance(guide, AutoLaplaceApproximation)
    if laplace and any(u.is_noisy for u in torch.no_grad()(model.updates)().values()):
        raise ConfigurationError(
            "AutoLaplaceApproximation must have a prior whose density is the same at every call, "
            "got one that draws noise in each; pass conditional='deterministic'."
        )
    return cast(nn.Module, guide)


def warn_of_a_point(guide: nn.Module, num_samples: int) -> None:
    """Warns if draws are taken from a guide that has no width yet."""
    if num_samples and isinstance(guide, AutoLaplaceApproximation):
        warnings.warn(
            "AutoLaplaceApproximation is still a point, so all draws are equal: after training, "
            "`blora.guide = blora.guide.laplace_approximation(batch)` makes it a normal, and needs "
            "attn_implementation='eager' and a mode. The family Laplace() needs neither.",
            stacklevel=7,
        )
    unfinished = any(isinstance(f, Laplace) and not f.finished for f in guide.modules())
    if num_samples and unfinished:
        warnings.warn(
            "Laplace is still a point, so all draws are equal: train with fit, or call "
            "pyro_blora.inference.finish(blora, train, collate=...) after your own training.",
            stacklevel=7,
        )


def described(
    model: BayesianLoRAModel, guide: nn.Module, method: Method, trained: int
) -> Iterator[str]:
    """Lines on prior, guide, likelihood, groups, sites and heads, with numbers of parameters."""
    yield f"  prior:      {method.prior!r}"
    yield f"  guide:      {getattr(method.guide, '__name__', repr(method.guide))}"
    yield f"  likelihood: {model.likelihood!r}"
    families = guide.families() if isinstance(guide, StructuredGuide) else {}
    for group in model.groups:
        size = f"{_size(getattr(model, group.name)):,} parameters in the prior"
        yield f"  {group.name}: {group.n} layers of {group.d_out} x {group.d_in}, {size}"
        for site in (site for site in model.sites if site.group == group.name):
            shape = " x ".join(map(str, site.prior.shape())) or "one number"
            size = f", {_size(families[site.name]):,} parameters in the guide" if families else ""
            yield f"    {site.name}: {shape}{size}"
    if not families:  # an AutoGuide has no parameters before its first call
        yield f"  guide: {_size(guide):,} parameters"
    yield from (f"  {name}: trained in full, as a point" for name in model.trained_heads.names)
    frozen = _size(model.net)
    share = trained / (trained + frozen)
    yield f"  trainable: {trained:,} beside {frozen:,} frozen ({share:.2%})"
    draws, mean = float(model.temperature), float(model.mean_temperature)
    if draws != 1 or mean != 1:
        yield f"  temperatures: of the draws {draws:.3g}, of the mean {mean:.3g}"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
