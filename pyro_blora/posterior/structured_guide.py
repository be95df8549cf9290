"""The guide of a whole model: one bound guide family for each latent site."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides._post_hoc import PostHoc
from pyro_blora.guides._site_guide import Site, SiteGuide, forked_rng
from pyro_blora.posterior.amortised_context import (
    context_of_particles,
    context_size,
    pooled_context,
)
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel

__all__ = [
    "GuideFactory",
    "StructuredGuide",
    "analytic_kl",
    "draws_apart",
    "make_guide",
    "start_guide",
    "warn_of_a_point",
]


GuideFactory = Callable[[BayesianLoRAModel], nn.Module]


def start_guide(guide: nn.Module, batch: Mapping[str, Any] | None) -> None:
    """Runs a guide that reads the model at its first call, as AutoGuides do; others it leaves be.

    Args:
        guide: any guide.
        batch: a batch with labels.

    Raises:
        ConfigurationError: the guide has no parameters yet and there are no labels, without which
            it would take them for latent.
    """
    if any(True for _ in guide.parameters()):
        return
    if batch is None or batch.get("labels") is None:
        raise ConfigurationError(
            f"{type(guide).__name__} reads the model at its first call, which needs labels: train "
            "first, or call blora.guide(batch) with a batch of the training set."
        )
    with torch.no_grad():
        guide(batch)


@contextmanager
def draws_apart(guide: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, draws are the same every time; afterwards all is as if there had been none.

    Args:
        guide: any guide; an ``Ensemble``'s turn is put back, too.
        device: whose generator is seeded and put back, besides the CPU's.
    """
    turns = [turn for name, turn in guide.named_buffers() if name.split(".")[-1] == "turn"]
    before = [turn.clone() for turn in turns]
    with forked_rng(device):
        torch.manual_seed(0)
        for turn in turns:
            turn.zero_()
        try:
            yield
        finally:
            for turn, value in zip(turns, before, strict=True):
                turn.copy_(value)


class StructuredGuide(PyroModule):
    """q over all sites: the product of one :class:`SiteGuide` for each.

    Its sites have the names, plates and order of the model's, as
    :class:`~pyro.infer.TraceMeanField_ELBO` requires.

    Args:
        family: a guide family, copied for each site.
        sites: the latent sites of the prior.
        model: the model.
    """

    def __init__(self, family: SiteGuide, sites: list[Site], model: BayesianLoRAModel) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, as AutoGuide does, so that it is no child
        self._site_guides: list[tuple[Site, str]] = []
        self._plates: dict[str, pyro.plate] = {}  # made once: a new plate costs as much as a site
        size = context_size(model.net) if family.reads_context else 0
        for site in (replace(site, context_size=size) for site in sites):
            attribute = site.name.replace(".", "_")
            self._site_guides.append((site, attribute))
            for frame in site.plates:
                if frame.name not in self._plates:  # one plate for all the sites within
                    self._plates[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
            setattr(self, attribute, family.bind(site))
        self.reads_context, self.couples_sites = family.reads_context, family.couples_sites
        self.nesting = model.max_plate_nesting

    def families(self) -> dict[str, SiteGuide]:
        """The bound family of each site."""
        return {site.name: getattr(self, attribute) for site, attribute in self._site_guides}

    def forward(self, batch: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Samples every site; ``batch`` is read by amortised families alone.

        Returns:
            The sampled values by site name.
        """
        context = self._context(batch)
        self._see(None if context is None else context_of_particles(context, self.nesting))
        values: dict[str, Tensor] = {}
        device = self._model[0].groups[0].device.type
        with torch.autocast(device, enabled=False):
            for site, attribute in self._site_guides:
                q = getattr(self, attribute)()
                with ExitStack() as stack:
                    for frame in site.plates:
                        stack.enter_context(self._plates[frame.name])
                    values[site.name] = pyro.sample(site.name, q)
        return values

    def center(self, batch: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The centre of q at each site: the image of the mean of the unconstrained value.

        That is no mean where the site is constrained; for that of the updates see
        :func:`~pyro_blora.posterior.sample_updates.mean_updates`.

        Of an amortised family the means for each example of ``batch``, ``(B, n, *event_shape)``.
        """
        context = self._context(batch)
        if context is not None:
            context = context.reshape(len(context), *(1,) * self.nesting, context.shape[-1])
        self._see(context)
        with torch.autocast(self._model[0].groups[0].device.type, enabled=False):
            return {name: family.center() for name, family in self.families().items()}

    def _context(self, batch: Mapping[str, Any] | None) -> Tensor | None:
        if batch is None or not self.reads_context:
            return None
        return pooled_context(self._model[0].net, batch)

    def _see(self, context: Tensor | None) -> None:
        if self.reads_context:
            for family in self.families().values():
                family.context = context


def analytic_kl(guide: nn.Module, model: BayesianLoRAModel) -> Tensor | None:
    """KL[q(U) || p(U)] summed over all sites in nats, or ``None`` where it is not analytic."""
    if not isinstance(guide, StructuredGuide):
        return None
    with torch.no_grad():
        guide_trace = pyro.poutine.trace(guide).get_trace()
        model_trace = pyro.poutine.trace(
            pyro.poutine.replay(model.updates, trace=guide_trace)
        ).get_trace()
        total = torch.zeros(())
        for site in model.sites:
            q, p = (trace.nodes[site.name]["fn"] for trace in (guide_trace, model_trace))
            try:
                total = total + torch.distributions.kl_divergence(q, p).sum().cpu()
            except NotImplementedError:
                return None
        return total


def make_guide(family: SiteGuide | GuideFactory, model: BayesianLoRAModel) -> nn.Module:
    """The guide of a model.

    Args:
        family: a guide family, or a callable that makes a guide from the model.
        model: the model.

    Raises:
        ConfigurationError: ``family`` is neither, or is a class and not an object.
    """
    if not callable(family) or (isinstance(family, type) and issubclass(family, SiteGuide)):
        raise ConfigurationError(
            f"guide={family!r} is neither a guide family of pyro_blora.guides nor a callable that "
            "makes a guide from a model, such as pyro.infer.autoguide.AutoNormal. A guide family "
            "is passed as an object, MatrixNormal(), not as the class."
        )
    sites = model.sites  # which also checks the prior's update
    if isinstance(family, SiteGuide):
        return StructuredGuide(family, sites, model)
    guide = family(model)
    if not isinstance(guide, nn.Module):
        raise ConfigurationError(
            f"guide={family!r} made a {type(guide).__name__} of the model, which is no guide. Pass "
            "the class of an AutoGuide, guide=AutoNormal, or a function that makes a guide."
        )
    return guide


def warn_of_a_point(guide: nn.Module, num_samples: int) -> None:
    """Warns where draws are asked of a post-hoc guide that has no width yet."""
    if not num_samples:
        return
    if isinstance(guide, AutoLaplaceApproximation):
        warnings.warn(
            "AutoLaplaceApproximation is still a point, so all draws are alike: once it is "
            "trained, `blora.guide = blora.guide.laplace_approximation(batch)` makes it a normal, "
            "by a Hessian over all latents together, which needs attn_implementation='eager'; the "
            "family Laplace() is for many latents.",
            stacklevel=3,
        )
    if not isinstance(guide, StructuredGuide):
        return
    for family in guide.families().values():
        if isinstance(family, PostHoc) and not family.finished:
            warnings.warn(
                f"{type(family).__name__} is still a point, so all draws are alike: train with "
                "pyro_blora.fit, or call pyro_blora.inference.finish(blora, train, collate=...) "
                "after a loop of your own.",
                stacklevel=3,
            )
            return
