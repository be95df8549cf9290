"""The Pyro model: priors over the updates, the wrapped network, the likelihood.

All sites are sampled before the network runs, as activation checkpointing and compilation require.
"""

import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from pyro.poutine.runtime import get_plates
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_blora.debts import ELBO_PLATE, is_enumerating
from pyro_blora.errors import BatchError, ConfigurationError, ParticleError, check_kind
from pyro_blora.guides._site_guide import Site
from pyro_blora.likelihoods import Batch, Likelihood
from pyro_blora.likelihoods._likelihood import Prepared
from pyro_blora.models import LowRankUpdate, UpdateModel
from pyro_blora.network.adapter import (
    Frozen,
    LayerHook,
    TrainedHeads,
    layer_hook_of,
    updates_in_place,
    updates_kept_for_backward,
)
from pyro_blora.network.pretrained import choose_precision
from pyro_blora.network.probes import keeps_rows, logits_of_ids
from pyro_blora.network.targets import LayerGroup, by_group

# Pyro's handlers and its store belong to the process, so only one thread may run a model or a guide
LOCK = threading.RLock()
P = ParamSpec("P")
T = TypeVar("T")


def _remove(adapters: Sequence[LayerHook]) -> None:
    for adapter in adapters:
        adapter.remove()


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Makes ``function`` wait for other threads."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        with LOCK:
            return function(*args, **options)

    return run


def _mark_by_numbers(model: nn.Module, keys: Any) -> None:
    """A state has no names of classes, so that their numbers stay numbers."""
    if not (keys.missing_keys or keys.unexpected_keys):  # which may be refused
        cast(BayesianLoRAModel, model).likelihood.by_numbers = True


def repeat_batch(batch: Batch, times: int) -> dict[str, Any]:
    """The batch repeated ``times`` times, so that each particle or draw sees all its examples."""
    return {
        key: value.repeat(times, *(1,) * (value.dim() - 1)) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def row_of(batch: Prepared, k: int) -> dict[str, Any]:
    """The batch's example ``k``, in a batch of its own."""

    def cut(value: Any) -> Any:
        is_tuple = isinstance(value, tuple)  # CausalLM counts the tokens of each row
        sizes = (len(value),) if is_tuple else getattr(value, "shape", ())[:1]
        return value[k : k + 1] if sizes == (batch.examples,) else value

    return {name: cut(value) for name, value in batch.items()}


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch on ``device``, with its lists and arrays of numbers as tensors."""
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"A batch must be a mapping of tensors by name, got a {type(batch).__name__}; make one "
            "from examples with a collator, such as task.collator(tokenizer)(items)."
        )
    return {key: _on_device(value, device) for key, value in batch.items()}


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | np.ndarray):
        arrays = isinstance(value, list) and any(isinstance(row, np.ndarray) for row in value)
        with suppress(TypeError, ValueError, RuntimeError):  # of texts or ragged rows
            value = torch.tensor(np.asarray(value) if arrays else value)
    return value.to(device) if isinstance(value, Tensor) else value


class BayesianLoRAModel(PyroModule):
    """p(labels, U | batch), an ordinary Pyro model of one argument, the batch.

    Its latent sites are the sites of each group's prior, such as ``"q_proj.V"``; the observed site
    is ``"labels"``. The frozen network is not registered as a submodule, so that ``state_dict``
    holds the adapter alone. While ``enabled`` is false, the network runs without updates.
    """

    temperature: Tensor
    mean_temperature: Tensor

    def __init__(
        self,
        net: nn.Module,
        groups: list[LayerGroup],
        prior: UpdateModel | Mapping[str, UpdateModel],
        likelihood: Likelihood,
        heads: Sequence[str] = (),
        *,
        fast: bool = True,
    ) -> None:
        super().__init__()
        priors: dict[str, UpdateModel] = by_group("prior", prior, groups)
        for each in priors.values():
            check_kind("prior", each, UpdateModel)
        self._net = (net,)  # in a tuple, so that it is not registered
        self._starts: dict[str, Tensor] = {}
        # collected once, because a network has thousands of modules
        self._checkpointable = [m for m in net.modules() if hasattr(m, "gradient_checkpointing")]
        self.groups = tuple(groups)
        self.enabled = True
        self._precision = "float32"
        bound = {group.name: priors[group.name].bind(group) for group in groups}
        self.likelihood = likelihood.bind(self.groups[0].device, fast=fast)
        for name, update_model in bound.items():
            if hasattr(self, name):
                raise ConfigurationError(
                    f"Layers must not be called {name!r}, the name of a part of the model; leave "
                    "them out with exclude_modules, or rename them in the network."
                )
            setattr(self, name, update_model)
        self.trained_heads = TrainedHeads(net, heads)
        # divisors of scores of draws, and of the mean: calibrate() sets both, distill() the second
        self.register_buffer("temperature", torch.ones((), device=self.groups[0].device))
        self.register_buffer("mean_temperature", torch.ones((), device=self.groups[0].device))
        self.adapters: tuple[LayerHook, ...] = ()
        self._keeps_rows: bool | None = None
        self.register_load_state_dict_post_hook(_mark_by_numbers)
        self.layer_names = [name for group in groups for name in group.module_names]

    @property
    def net(self) -> nn.Module:
        """The wrapped network."""
        return self._net[0]

    @cached_property
    def _traced(self) -> tuple[list[Site], int]:
        """Sites and nesting, traced lazily, after the adapter owns this module."""
        with torch.no_grad():
            trace = pyro.poutine.trace(InitMessenger(self._start)(self.updates)).get_trace()
        for group in self.groups:
            getattr(self, group.name).check_update(trace.nodes["_RETURN"]["value"][group.name])
        frames = [f for s in trace.nodes.values() for f in s.get("cond_indep_stack", ())]
        names = prune_subsample_sites(trace).stochastic_nodes
        sites = [self._site(trace.nodes[name]) for name in names]
        return sites, max([1, *(-f.dim for f in frames if f.vectorized)])

    def _site(self, node: Mapping[str, Any]) -> Site:
        plates = tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)
        start = self._starts.get(node["name"], node["infer"].get("start"))
        return Site(node["name"], node["fn"], plates, suggested=start)

    def _start(self, node: Mapping[str, Any]) -> Tensor:
        """Where guides start, so that the prior of a site that depends on this one is no draw."""
        drawn: Tensor = node["fn"]()
        if node["fn"].support.is_discrete:  # which guides of one's own may enumerate
            return drawn
        site = self._site(node)
        value: Tensor = site.transform(site.start()[0])
        return value

    def keeps_rows(self, batch: Prepared | None = None) -> bool:
        """Whether draws can share a pass of the network, because its layers keep the rows apart.

        This is found once, by the first example of a batch, or by token ids if there is none, or if
        that example does not show it.
        """
        if self._keeps_rows is None:
            runs: list[Callable[[int], Tensor | None]] = [partial(logits_of_ids, self.net)]
            if batch is not None:
                runs.insert(0, partial(self._first_row, batch))
            with LOCK:
                found = (keeps_rows(self.net, self.adapters, run) for run in runs)
                self._keeps_rows = next((kept for kept in found if kept is not None), None)
            if self._keeps_rows is False:
                warnings.warn(
                    f"An adapted layer of {type(self.net).__name__} does not have the rows of a "
                    "batch in its first dimension, so each draw takes a pass, and a training has "
                    "one draw for a batch; other target_modules may be faster.",
                    stacklevel=2,
                )
        return self._keeps_rows is not False

    def _first_row(self, batch: Prepared, count: int) -> Tensor:
        """The logits of a batch's first example, so many times."""
        return self.likelihood.logits(self.net, repeat_batch(row_of(batch, 0), count))

    @property
    def sites(self) -> list[Site]:
        """The latent sites of the prior; finding them checks the prior's update, too."""
        return self._traced[0]

    @property
    def max_plate_nesting(self) -> int:
        """The number of dimensions of the prior's plates; the particles' dimension is next."""
        return self._traced[1]

    def start_at(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Starts the priors at ``B A`` by the layers' names, before the guide is made."""
        self.likelihood.trained_head.fill_(True)
        for group in self.groups:
            pairs = [factors[name] for name in group.module_names]
            rank = max(len(A) for _, A in pairs)
            B = torch.stack([pad(B, (0, rank - len(A))) for B, A in pairs])
            A = torch.stack([pad(A, (0, 0, 0, rank - len(A))) for _, A in pairs])
            B, A = (f.to(group.device, torch.get_default_dtype()) for f in (B, A))
            with torch.no_grad():
                self._starts |= getattr(self, group.name).start_at(B, A)

    def attach(self) -> None:
        """Freezes the network and hooks its layers, unless another adapter has hooks there."""
        if self._adapted_layer() is not None:
            gc.collect()  # as its adapter may be unreachable and not yet collected
        if (name := self._adapted_layer()) is not None:
            raise ConfigurationError(
                f"{name} is already adapted; call .unwrap() on the BayesianLoRA that wraps the "
                "network, and do so before you copy it."
            )
        modules = [module for group in self.groups for module in group.modules]
        self.adapters = tuple(map(LayerHook, self.layer_names, modules))
        self._frozen = Frozen(self.net)
        # nobody can unwrap an adapter that is gone, such as one that was local to a function; its
        # network stays frozen, because it is collected at any time
        self._release = weakref.finalize(self, _remove, self.adapters)
        self._release.atexit = False

    def _adapted_layer(self) -> str | None:
        hooked = (name for name, m in self.net.named_modules() if layer_hook_of(m) is not None)
        return next(hooked, None)

    def detach(self) -> None:
        """Removes the hooks, and lets the network's parameters be trained as before."""
        self._release.detach()
        _remove(self.adapters)
        self._frozen.thaw()
        self.adapters = ()

    def updates(self) -> dict[str, LowRankUpdate]:
        """Samples the sites of every group, in single precision even under autocast."""
        device = self.groups[0].device.type
        with torch.autocast(device, enabled=False):
            return {group.name: getattr(self, group.name)() for group in self.groups}

    def check_attached(self) -> None:
        """Raises ConfigurationError if the network has been unwrapped."""
        if not self.adapters:
            raise ConfigurationError(
                "The adapter must be on its network, got one that was unwrapped; wrap the network "
                "in a new BayesianLoRA, or read a saved adapter with from_pretrained."
            )

    def prepared(self, batch: Batch) -> Prepared:
        """The batch on the adapter's device, after the likelihood has checked it."""
        if isinstance(batch, Prepared):
            return batch
        return self.likelihood.prepare(to_device(batch, self.groups[0].device))

    @contextmanager
    def autocast(self, precision: str) -> Iterator[None]:
        """Within the context, the network runs in this precision; the rest stays in float32."""
        before = self._precision
        self._precision = choose_precision(precision, self.groups[0].device)
        try:
            yield
        finally:
            self._precision = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Runs the network without updates and with its own heads within the context."""
        if any(hook.update is not None for hook in self.adapters):
            raise ConfigurationError("disable_adapter() must be called outside of posterior().")
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def applied(
        self, updates: Mapping[str, LowRankUpdate], batch: Prepared | None = None
    ) -> Iterator[nn.Module]:
        """Yields the network with ``updates`` and the trained heads in place, to run on a batch."""
        self.check_attached()
        layers = [layer for group in self.groups for layer in updates[group.name].layers()]
        with ExitStack() as within:
            if self.enabled:
                if any(
                    u.particle_shape.numel() > 1 for u in updates.values()
                ) and not self.keeps_rows(batch):
                    raise ParticleError(
                        f"{type(self.net).__name__} must run under one draw in a pass, because an "
                        "adapted layer does not have the rows of the batch in its first dimension, "
                        "got several; pass num_particles=1 or num_samples=1, and average."
                    )
                within.enter_context(self.trained_heads.in_place())
                within.enter_context(updates_in_place(self.adapters, layers))
                kept = updates_kept_for_backward(self._checkpointable, self.adapters, layers)
                within.enter_context(kept)
            if self._precision != "float32":
                within.enter_context(torch.autocast(self.groups[0].device.type, torch.bfloat16))
            yield self.net

    def forward(self, batch: Batch | None = None) -> dict[str, LowRankUpdate]:
        """Samples the updates and scores the labels of ``batch``, or gives the :meth:`outline`.

        Vectorized particles of an ELBO have equal shares of the examples, in order. Under any other
        leading plate, as of ``Predictive(parallel=True)``, each sample sees all examples.
        """
        if batch is None:
            return self.outline()
        self.check_attached()
        batch = self.prepared(batch)
        examples = batch.examples
        if "labels" in batch:
            self.likelihood.by_numbers = True  # as far as it is a loop of the user's
        updates = self.updates()
        if is_enumerating() and any(update.is_noisy for update in updates.values()):
            raise ConfigurationError(
                "HMC, NUTS and enumeration must have a prior whose density is the same at every "
                "call, got one that draws noise in each; pass conditional='deterministic'."
            )
        particles = torch.broadcast_shapes(*(update.particle_shape for update in updates.values()))
        count = particles.numel()
        rows: Batch = batch
        if count > 1 and ELBO_PLATE not in {plate.name for plate in get_plates()}:
            rows = repeat_batch(batch, count)
        elif examples % count:
            divisors = [d for d in range(1, examples + 1) if examples % d == 0]
            raise ParticleError(
                f"{examples} examples cannot be divided evenly among {count} particles. "
                f"Choose num_particles from {divisors}, or drop the last incomplete batch."
            )
        with self.applied(updates, batch) as net:
            self.likelihood.observe(net, rows, particles, examples)
        # detached, because an AutoGuide keeps the result of its first call, and may be copied
        return {name: update.detached() for name, update in updates.items()}

    def outline(self) -> dict[str, LowRankUpdate]:
        """Samples the updates, and observes labels without meaning, for AutoGuides to read."""
        # as many labels as latent numbers, because AutoGaussian has a direction for each label
        updates = self.updates()
        factors = [factor for update in updates.values() for factor in update.factors]
        normal = pyro.distributions.Normal(sum(factor.sum() for factor in factors), 1.0)
        size = sum(site.shape.numel() for site in self.sites)
        with pyro.plate("data", size, dim=-1):
            pyro.sample("labels", normal, obs=torch.zeros(size, device=self.groups[0].device))
        return updates
