"""The Pyro model: priors over the updates, the wrapped network, the likelihood.

All sites are sampled before the network runs: so activation checkpointing and compilation work.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK, get_plates
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_blora.errors import ConfigurationError, ParticleError
from pyro_blora.guides._site_guide import Site
from pyro_blora.likelihoods import Batch, Likelihood
from pyro_blora.models import UpdateModel
from pyro_blora.network.adapter import (
    Adapter,
    TrainedHeads,
    adapter_of,
    updates_in_place,
    updates_kept_for_backward,
)
from pyro_blora.network.precision import choose_precision
from pyro_blora.network.targets import LayerGroup, by_group
from pyro_blora.options import check_kind
from pyro_blora.posterior.batches import repeat_batch, to_device
from pyro_blora.updates.low_rank_update import LowRankUpdate

# Pyro's handlers and its store are of the process, so one thread at a time runs a model or a guide
LOCK = threading.RLock()
P = ParamSpec("P")
T = TypeVar("T")

# The name that Pyro's ELBO gives to the plate of vectorized particles
ELBO_PLATE = "num_particles_vectorized"


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, for which other threads wait, and which waits for theirs."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        with LOCK:
            return function(*args, **options)

    return run


def open_plates() -> dict[str, int]:
    """The names and sizes of the plates within which Pyro is running now."""
    return {frame.name: frame.size for frame in get_plates() if frame.vectorized}


class BayesianLoRAModel(PyroModule):
    """p(labels, U | batch), an ordinary Pyro model of one argument, the batch.

    Its latent sites are those of each group's prior, such as ``"q_proj.V"``; what is observed is
    ``"labels"``. Module tracking does not see the frozen network, so that ``state_dict`` has the
    adapter alone. While ``enabled`` is false it is the network alone.
    """

    temperature: Tensor

    def __init__(
        self,
        net: nn.Module,
        groups: list[LayerGroup],
        prior: UpdateModel | Mapping[str, UpdateModel],
        likelihood: Likelihood,
        heads: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if getattr(getattr(net, "config", None), "model_type", None) == "xlnet":
            raise ConfigurationError(
                "XLNet has the rows of a batch in the second dimension, where particles cannot "
                "share them out; take another network."
            )
        priors: dict[str, UpdateModel] = by_group("prior", prior, groups)
        for each in priors.values():
            check_kind("prior", each, UpdateModel)
        self._net, self._prior = (net,), (prior,)  # in tuples, so that nn.Module registers neither
        self._starts: dict[str, Tensor] = {}
        # once: a network has thousands of modules
        self._checkpointable = [m for m in net.modules() if hasattr(m, "gradient_checkpointing")]
        self.groups = tuple(groups)
        self.enabled = True
        self._precision = "float32"
        bound = {group.name: priors[group.name].bind(group) for group in groups}
        self.likelihood = likelihood.bind(self.groups[0].device)
        for name, own in bound.items():
            if hasattr(self, name):
                raise ConfigurationError(
                    f"Layers called {name!r} have the name of a part of the model; leave "
                    "them out with exclude_modules, or call them otherwise in the network."
                )
            setattr(self, name, own)
        self.trained_heads = TrainedHeads(net, heads)
        # of the scores of one pass at the posterior mean
        self.register_buffer("temperature", torch.ones((), device=self.groups[0].device))
        self.adapters: tuple[Adapter, ...] = ()
        self.layer_names = [name for group in groups for name in group.module_names]

    @property
    def net(self) -> nn.Module:
        """The wrapped network."""
        return self._net[0]

    @property
    def prior(self) -> UpdateModel | Mapping[str, UpdateModel]:
        """The prior, or those by group, as given, before they knew the layers."""
        return self._prior[0]

    @cached_property
    def _traced(self) -> tuple[list[Site], int]:
        """Sites and nesting; not before Pyro knows whose part this module is."""
        with torch.no_grad():
            trace = pyro.poutine.trace(self.updates).get_trace()
        for group in self.groups:
            getattr(self, group.name).check_update(trace.nodes["_RETURN"]["value"][group.name])
        frames = [f for s in trace.nodes.values() for f in s.get("cond_indep_stack", ())]
        latent = prune_subsample_sites(trace).stochastic_nodes
        return (
            [_site(name, trace.nodes[name], self._starts) for name in latent],
            max([1, *(-f.dim for f in frames if f.vectorized)]),
        )

    @property
    def sites(self) -> list[Site]:
        """The latent sites of the prior, whose update is checked on the way."""
        return self._traced[0]

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions the prior's plates take; the particles' stands just outside."""
        return self._traced[1]

    def start_at(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Turns the priors to given updates, ``B A`` by the layers' names; before the guide."""
        if missing := [name for name in self.layer_names if name not in factors]:
            raise ConfigurationError(
                f"start= has no factors for {', '.join(missing[:4])}; give (B, A) for each layer."
            )
        for group in self.groups:
            pairs = [factors[name] for name in group.module_names]
            rank = max(len(A) for _, A in pairs)
            B = torch.stack([pad(B, (0, rank - len(A))) for B, A in pairs])
            A = torch.stack([pad(A, (0, 0, 0, rank - len(A))) for _, A in pairs])
            B, A = (f.to(group.device, torch.get_default_dtype()) for f in (B, A))
            with torch.no_grad():
                self._starts |= getattr(self, group.name).start_at(B, A)

    def skippable_blocks(self) -> list[nn.Module]:
        """The frozen blocks that need not run twice for an example."""
        trained = self.trained_heads.names
        return self.likelihood.shortcuts.skippable_blocks(self.net, self.layer_names, trained)

    def attach(self) -> None:
        """Puts the hooks on the network's layers; another adapter's would add its updates, too."""
        for name, module in self.net.named_modules():
            if adapter_of(module) is not None:
                raise ConfigurationError(
                    f"{name} is adapted already; call .unwrap() on the BayesianLoRA that holds the "
                    "network (before you copy it)."
                )
        modules = [module for group in self.groups for module in group.modules]
        self.adapters = tuple(map(Adapter, self.layer_names, modules))

    def detach(self) -> None:
        """Takes the hooks off again."""
        for adapter in self.adapters:
            adapter.remove()
        self.adapters = ()

    def updates(self) -> dict[str, LowRankUpdate]:
        """Samples the sites of every group, in single precision also under autocast."""
        device = self.groups[0].device.type
        with torch.autocast(device, enabled=False):
            return {group.name: getattr(self, group.name)() for group in self.groups}

    def check_on_network(self) -> None:
        """Raises ConfigurationError if this adapter cannot be asked; before a draw is made."""
        if not self.adapters:
            raise ConfigurationError(
                "The network has been unwrapped, and may have another adapter on: wrap it in a new "
                "BayesianLoRA, or read a saved one by from_pretrained, to go on."
            )

    @contextmanager
    def autocast(self, precision: str) -> Iterator[None]:
        """Within, the network runs in this precision; the variational part stays in single."""
        before = self._precision
        self._precision = choose_precision(precision, self.groups[0].device)
        try:
            yield
        finally:
            self._precision = before

    @contextmanager
    def applied(self, updates: Mapping[str, LowRankUpdate]) -> Iterator[nn.Module]:
        """Within, the network's layers add ``updates`` and its heads are as trained; yields it."""
        self.check_on_network()
        layers = [layer for group in self.groups for layer in updates[group.name].layers()]
        with ExitStack() as within:
            if self.enabled:
                within.enter_context(self.trained_heads.in_place())
                within.enter_context(updates_in_place(self.adapters, layers))
                kept = updates_kept_for_backward(self._checkpointable, self.adapters, layers)
                within.enter_context(kept)
            if self._precision != "float32":
                within.enter_context(torch.autocast(self.groups[0].device.type, torch.bfloat16))
            yield self.net

    def forward(self, batch: Batch | int | None = None) -> dict[str, LowRankUpdate]:
        """Samples the updates and scores the labels of ``batch``; without one, samples alone.

        Vectorized particles of an ELBO share out the examples evenly, in order. Under any other
        leading plate, such as that of ``Predictive(parallel=True)``, each sample sees all of them.
        A number stands for so many examples without data: an outline of what labels depend on.
        """
        if batch is None:
            return self.updates()
        if isinstance(batch, int):
            return self._outlined(batch)
        self.check_on_network()
        batch = to_device(batch, self.groups[0].device)
        examples = self.likelihood.examples(batch)
        updates = self.updates()
        enumerates = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
        if enumerates and any(update.is_noisy for update in updates.values()):
            raise ConfigurationError(
                "HMC, NUTS and enumeration need the same density at every call of the model, and "
                "this prior draws noise in each; use a prior with conditional='deterministic'."
            )
        particles = torch.broadcast_shapes(*(update.particle_shape for update in updates.values()))
        count = particles.numel()
        if count > 1 and ELBO_PLATE not in open_plates():
            batch = repeat_batch(batch, count)
        elif examples % count:
            divisors = [d for d in range(1, examples + 1) if examples % d == 0]
            raise ParticleError(
                f"{examples} examples cannot be shared out evenly among {count} particles. "
                f"Choose num_particles from {divisors}, drop the last incomplete batch, or use "
                "pyro_blora.fit, which sees to it."
            )
        with self.applied(updates) as net:
            self.likelihood.observe(net, batch, particles, examples)
        # without gradient: an AutoGuide keeps what its first call gave, and is copied with it
        return {name: update.detached() for name, update in updates.items()}

    def _outlined(self, examples: int) -> dict[str, LowRankUpdate]:
        """Labels of no meaning, each of which depends on every update."""
        updates = self.updates()
        factors = [f for u in updates.values() for f in (u.A, u.B, u.core) if f is not None]
        law = pyro.distributions.Normal(sum(factor.sum() for factor in factors), 1.0)
        with pyro.plate("data", examples, dim=-1):
            pyro.sample("labels", law, obs=torch.zeros(examples, device=self.groups[0].device))
        return updates


def _site(name: str, node: dict[str, Any], starts: Mapping[str, Tensor]) -> Site:
    plates = tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)
    return Site(name, node["fn"], plates, suggested=starts.get(name, node["infer"].get("start")))
