"""PEFT's habits by PEFT's names: what ``BayesianLoRA`` inherits for those who come from there."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import nn
from typing_extensions import Self

from pyro_blora.checkpoints.peft_export import export_peft, lora, merged
from pyro_blora.checkpoints.peft_import import read_peft
from pyro_blora.checkpoints.peft_source import unloaded
from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Likelihood
from pyro_blora.models import UpdateModel
from pyro_blora.network import fast_path
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.param_store import leave_store
from pyro_blora.posterior.sample_updates import mean_updates

__all__ = ["PeftHabits"]

_PARTS = ("model", "guide", "_given")  # what makes one adapter of a network another
# What transformers asks of a network besides, a pipeline for one
_OF_NETWORK = ("dtype", "generation_config", "can_generate", "input_modalities", "output_modalities")


class PeftHabits(PyroModule):
    """The part of ``BayesianLoRA`` that has PEFT's names."""

    model: BayesianLoRAModel
    guide: Any
    net: nn.Module
    posterior: Callable[..., Any]
    unwrap: Callable[[], nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self._active = "default"
        self._others: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name) if name in _OF_NETWORK else super().__getattr__(name)

    @classmethod
    def from_peft(
        cls,
        source: str | os.PathLike[str] | nn.Module,
        net: nn.Module | None = None,
        *,
        prior: UpdateModel | None = None,
        guide: SiteGuide | None = None,
        likelihood: Likelihood | None = None,
        fast: bool = True,
    ) -> Self:
        r"""An adapter whose posterior mean is a trained LoRA, to go on from.

        :math:`\mathbb{E}_q[\Delta W] = s B A` exactly, with PEFT's scaling :math:`s`, on the layers
        and with the heads that PEFT trained. A layer of a rank below the prior's has its further
        directions at zero. LoRA's dropout is not taken over.

        Args:
            source: a ``peft.PeftModel``, which is unloaded; or a folder that PEFT wrote, or a hub
                id.
            net: the base network, for a folder or a hub id. Default: loaded by the name that the
                adapter has for it.
            prior: one that can start there: ``KroneckerInducing``, ``FactorInducing``,
                ``GaussianFactors`` or ``Subspace``, of the adapter's rank or more. Default:
                ``KroneckerInducing`` of its rank.
            guide: a family whose mean is a parameter. Its width at the start is ``init_scale`` of
                the prior's. Default: ``MatrixNormal(init_scale=0.05)``.
            likelihood: as in the constructor. Default: by PEFT's task type.
            fast: the constructor's.

        Raises:
            CheckpointError: a file is missing or corrupt, or ``net`` is another base.
            ConfigurationError: the adapter is no plain LoRA (another tuner, DoRA, biases, ...), or
                the prior or the guide cannot start there.

        Example::

            blora = BayesianLoRA.from_peft("my_lora", likelihood=MultipleChoice(num_data=len(train)))
            fit(blora, train, collate=collate, num_steps=100)
        """
        adapter, in_memory = read_peft(source), isinstance(source, nn.Module)
        if in_memory and net is not None:
            raise ConfigurationError("A PeftModel has its base in it; leave net out.")
        with unloaded(source) if in_memory else nullcontext(net or adapter.load_base()) as base:
            blora = cls(base, **adapter.options(base, prior, guide, likelihood), fast=fast)
            try:
                adapter.load_into(blora.model, blora.guide)
            except ConfigurationError:
                blora.unwrap()
                raise
        return blora

    def export_peft(self, folder: str | os.PathLike[str], num_samples: int = 0) -> None:
        """Writes E[dW], or draws, for PEFT; see :func:`pyro_blora.checkpoints.export_peft`."""
        export_peft(self.model, self.guide, folder, num_samples)

    def merge_and_unload(self) -> nn.Module:
        """The network with E[dW] and the trained heads in its weights; the posterior is gone.

        Raises:
            ConfigurationError: peft, which does it, is not installed.
        """
        config, tensors = lora(self.model, mean_updates(self.model, self.guide))
        return merged(self.unwrap(), config, tensors)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, all that runs the network runs it as it was, its own heads in place."""
        model = self.model
        before, model.enabled = model.enabled, False
        try:
            yield
        finally:
            model.enabled = before

    def print_trainable_parameters(self) -> None:
        """Prints how many numbers are trained, in PEFT's words."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        both = trained + sum(p.numel() for p in self.net.parameters())
        print(
            f"trainable params: {trained:,d} || all params: {both:,d} || "
            f"trainable%: {100 * trained / both:.4f}"
        )

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that trains, predicts and is saved; at first ``"default"``."""
        return self._active

    def add_adapter(self, name: str, **options: Any) -> None:
        """Puts a second adapter on the network, which :meth:`set_adapter` makes the active one.

        Args:
            name: what it is called.
            options: the constructor's.

        Raises:
            ConfigurationError: the name is taken, or an option is wrong; nothing is changed then.

        Example::

            blora.add_adapter("other", prior=Subspace(rank=4), likelihood=likelihood)
            blora.set_adapter("other")
            fit(blora, train, collate=collate, num_steps=100)
            blora.set_adapter("default")  # the first one again
        """
        self._add(name, lambda: type(self)(self.net, **options))

    def load_adapter(self, folder: str | os.PathLike[str], name: str, **options: Any) -> None:
        """As :meth:`add_adapter`, of a saved one; ``options`` are those of ``from_pretrained``."""
        self._add(name, lambda: type(self).from_pretrained(self.net, folder, **options))  # type: ignore[attr-defined]

    def set_adapter(self, name: str) -> None:
        """Makes an adapter of that name the active one: ``blora.model`` and ``blora.guide``.

        Raises:
            ConfigurationError: there is none.
        """
        if name == self._active:
            return
        self._check_known(name)
        self._step_aside()
        parts, self._others[self._active] = self._others.pop(name), self._parts()
        for part, value in parts.items():
            setattr(self, part, value)
        self._active = name
        self.model.attach()

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter that is not active.

        Raises:
            ConfigurationError: there is none of that name, or it is active.
        """
        if name == self._active:
            raise ConfigurationError(
                f"adapter {name!r} is active; make another one so first, set_adapter(...), or "
                "take all off by unwrap()."
            )
        self._check_known(name)
        del self._others[name]

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.net.config

    @property
    def device(self) -> torch.device:
        """Where the network's adapted layers compute."""
        return self.model.groups[0].device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network puts out under the posterior mean."""
        with self.posterior() as net:
            return net(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the network generates under the posterior mean; as its own ``generate``."""
        with self.posterior() as net:
            return net.generate(*args, **kwargs)

    def _parts(self) -> dict[str, Any]:
        return {part: getattr(self, part) for part in _PARTS}

    def _step_aside(self) -> None:
        self.model.detach()
        leave_store({"model": self.model, "guide": self.guide})

    def _add(self, name: str, make: Callable[[], "PeftHabits"]) -> None:
        if name in (self._active, *self._others):
            raise ConfigurationError(f"adapter {name!r} is there already; choose another name.")
        fast = fast_path.is_on(self.net)
        self._step_aside()
        try:
            other = make()
            other._step_aside()
            self._others[name] = other._parts()
        finally:
            fast_path.put(self.net, on=fast)
            self.model.attach()

    def _check_known(self, name: str) -> None:
        if name not in self._others:
            known = near_miss(name, [self._active, *self._others])
            raise ConfigurationError(f"adapter {name!r} is unknown; {known}.")
