"""The Pyro model: priors over the updates, the wrapped network, the likelihood.

One direction, no back and forth: every site of every group is sampled up-front, the layers receive
their factors, the transformer runs, the likelihood scores the labels. Sampling before the forward
is what lets activation checkpointing and compilation work.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError, ParticleError
from pyro_blora.guides._site_guide import Site
from pyro_blora.likelihoods import Batch, Likelihood
from pyro_blora.models import UpdateModel
from pyro_blora.network.adapter import (
    Adapter,
    checkpointable,
    updates_in_place,
    updates_kept_for_backward,
)
from pyro_blora.network.fast_path import rows_come_first
from pyro_blora.network.frozen_prefix import frozen_blocks, skippable_blocks
from pyro_blora.network.quantised import refuse_packed
from pyro_blora.network.targets import LayerGroup
from pyro_blora.network.trained_heads import TrainedHeads
from pyro_blora.posterior.amortised_context import ELBO_PLATE
from pyro_blora.updates.low_rank_update import LowRankUpdate

__all__ = [
    "BayesianLoRAModel",
    "latent_sites",
    "repeat_batch",
    "to_device",
]


def repeat_batch(batch: Batch, times: int) -> dict[str, Any]:
    """The whole batch ``times`` over, so that each particle sees every example.

    Args:
        batch: tensors of ``B`` rows.
        times: number of repetitions ``S``.

    Returns:
        Tensors of ``S B`` rows; rows ``s B`` to ``(s + 1) B`` are the ``s``-th repetition.
    """
    return {
        key: value.repeat(times, *(1,) * (value.dim() - 1)) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


class BayesianLoRAModel(PyroModule):
    """p(labels, U | batch), an ordinary Pyro model of one argument, the batch.

    The frozen network is held where module tracking does not see it, so that Pyro cannot turn its
    weights into parameters, and ``state_dict`` has the adapter alone.

    Attributes:
        kl_weight: the weight ``w`` of the KL against the log-likelihood; 1 is the ELBO. The
            likelihood is scaled by ``1 / w``, so that it holds for every guide: with any ELBO the
            loss is ``-E[log p(y | U)] / w + KL``, a ``w``-th of the tempered one.
        precision: ``"float32"``, or ``"bfloat16"`` to run the network, and it alone, under
            autocast.
        nll: negative log-likelihood per example of the last batch, a tensor without gradient.
        layer_names: full names of the adapted layers.
    """

    def __init__(
        self,
        net: nn.Module,
        groups: list[LayerGroup],
        prior: UpdateModel,
        likelihood: Likelihood,
        heads: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._net, self._prior = (net,), (prior,)  # in tuples, so that they are no children
        self._checkpointable = checkpointable(net)  # once: a network has thousands of modules
        self.groups = tuple(groups)
        self.likelihood = likelihood
        self.kl_weight = 1.0
        self.precision = "float32"
        self.nll: Tensor | None = None
        for group in groups:
            setattr(self, group.name, prior.bind(group))
        self.trained_heads = TrainedHeads(net, heads)
        self.adapters: tuple[Adapter, ...] = ()
        self.layer_names = [name for group in groups for name in group.module_names]
        frozen = {m for block in frozen_blocks(net, self.layer_names) for m in block.modules()}
        self._four_bit = [
            (name, module)
            for name, module in net.named_modules()
            if hasattr(getattr(module, "weight", None), "quant_state") and module not in frozen
        ]

    @property
    def net(self) -> nn.Module:
        """The wrapped network."""
        return self._net[0]

    @property
    def prior(self) -> UpdateModel:
        """The prior as it was given, before it knew the layers."""
        return self._prior[0]

    @cached_property
    def _traced(self) -> tuple[list[Site], int]:
        """Sites and nesting; not before Pyro knows whose part this module is."""
        with torch.no_grad():
            trace = pyro.poutine.trace(self.updates).get_trace()
        for group in self.groups:
            getattr(self, group.name).check_update(trace.nodes["_RETURN"]["value"][group.name])
        frames = [f for s in trace.nodes.values() for f in s.get("cond_indep_stack", ())]
        return latent_sites(trace), max([1, *(-f.dim for f in frames if f.vectorized)])

    @property
    def sites(self) -> list[Site]:
        """The latent sites of the prior.

        Raises:
            ConfigurationError: the prior returns no update of the layers' shapes.
        """
        return self._traced[0]

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions the prior's plates take; the particles' stands just outside."""
        return self._traced[1]

    def skippable_blocks(self) -> list[nn.Module]:
        """The frozen blocks that need not run twice for an example."""
        return skippable_blocks(self.net, self.layer_names, self.trained_heads.names)

    def attach(self) -> None:
        """Puts the hooks on the network's layers, on all of them or on none."""
        try:
            for group in self.groups:
                for name, module in zip(group.module_names, group.modules, strict=True):
                    self.adapters += (Adapter(name, module),)
        except ConfigurationError:
            self.detach()
            raise

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

    @contextmanager
    def applied(self, updates: Mapping[str, LowRankUpdate]) -> Iterator[nn.Module]:
        """Within, the network's layers add ``updates`` and its heads are as trained; yields it.

        Raises:
            ConfigurationError: the network has been unwrapped.
            ParticleError: there are several particles, and rows are not what its layers' first
                dimension is.
        """
        if not self.adapters:
            raise ConfigurationError(
                "The network has been unwrapped; wrap it in a new BayesianLoRA to go on."
            )
        if torch.is_grad_enabled():
            refuse_packed(self._four_bit)
        layers = [layer for group in self.groups for layer in updates[group.name].layers()]
        if any(update.particle_shape.numel() > 1 for update in updates.values()):
            self._check_rows()
        with (
            self.trained_heads.in_place(),
            updates_in_place(self.adapters, layers),
            updates_kept_for_backward(self._checkpointable, self.adapters, layers),
            self._autocast(),
        ):
            yield self.net

    def _check_rows(self) -> None:
        if not rows_come_first(self.net, self.groups[0].modules[0]):
            raise ParticleError(
                f"{type(self.net).__name__} has the rows of a batch in the second dimension of its "
                "hidden states, so they cannot be shared out among several particles. Take one at "
                "a time: num_particles=1 in training, max_rows=1 in a prediction."
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.groups[0].device.type, torch.bfloat16)

    def forward(self, batch: Batch) -> dict[str, LowRankUpdate]:
        """Samples the updates and scores the labels of ``batch``.

        The examples are shared out evenly among the vectorised particles of an ELBO, in order.
        Under any other leading plate, such as that of ``Predictive(parallel=True)``, each sample
        sees the whole batch.

        Returns:
            The sampled updates by group.

        Raises:
            ParticleError: the number of particles does not divide the batch.
            BatchError: the batch is not what the likelihood takes.
            ConfigurationError: HMC or NUTS runs the model, and the conditional is noisy.
        """
        examples = self.likelihood.examples(batch)
        updates = self.updates()
        if any(u.is_noisy for u in updates.values()) and _runs_under(EnumMessenger):
            raise ConfigurationError(
                "HMC, NUTS and enumeration need the same density at every call of the model, and a "
                "conditional that is not deterministic draws noise in each; use "
                "conditional='deterministic'."
            )
        particles = torch.broadcast_shapes(*(update.particle_shape for update in updates.values()))
        count = particles.numel()
        if count > 1:
            if not _runs_under(IndepMessenger, ELBO_PLATE):
                batch = repeat_batch(batch, count)
            elif examples % count:
                raise ParticleError(
                    f"{examples} examples cannot be shared out evenly among {count} particles. "
                    f"Choose num_particles from {_divisors(examples)}, drop the last incomplete "
                    "batch, or use pyro_blora.fit, which sees to it."
                )
        with self.applied(updates) as net, pyro.poutine.scale(scale=1 / self.kl_weight):
            self.nll = self.likelihood.observe(net, batch, particles, examples)
        return updates


def _runs_under(kind: type, name: str | None = None) -> bool:
    handlers = [handler for handler in _PYRO_STACK if isinstance(handler, kind)]
    return any(name is None or getattr(handler, "name", None) == name for handler in handlers)


def latent_sites(trace: Trace) -> list[Site]:
    """The latent sites of a trace of the prior, in order."""
    return [
        Site(
            name,
            node["fn"],
            tuple(f for f in node["cond_indep_stack"] if f.vectorized),
            suggested=node["infer"].get("start"),
        )
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and type(node["fn"]).__name__ != "_Subsample"
    ]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
