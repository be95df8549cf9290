"""PEFT's habits by PEFT's names: what ``BayesianLoRA`` inherits for those who come from there."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from pyro_blora.checkpoints.keeping import Keeping
from pyro_blora.checkpoints.peft_export import export_peft, lora, merged
from pyro_blora.checkpoints.peft_import import read_peft
from pyro_blora.checkpoints.peft_source import unloaded
from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Likelihood
from pyro_blora.methods import Method
from pyro_blora.models import UpdateModel
from pyro_blora.network.adapter import Frozen
from pyro_blora.posterior.sample_updates import mean_updates

__all__ = ["PeftHabits"]

# What transformers asks of a network besides, a pipeline for one
_OF_NETWORK = (
    "dtype",
    "generation_config",
    "can_generate",
    "input_modalities",
    "output_modalities",
)


class PeftHabits(Keeping):
    """The part of ``BayesianLoRA`` that has PEFT's names."""

    _frozen: Frozen
    _shared: dict[str, Self]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name) if name in _OF_NETWORK else super().__getattr__(name)

    @classmethod
    def from_peft(
        cls,
        net: nn.Module | str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        method: str | Method | None = None,
        prior: UpdateModel | Mapping[str, UpdateModel] | None = None,
        guide: SiteGuide | Mapping[str, SiteGuide] | None = None,
        likelihood: Likelihood | None = None,
        fast: bool = True,
    ) -> Self:
        r"""An adapter whose posterior mean is a trained LoRA, to go on from.

        :math:`\mathbb{E}_q[\Delta W] = s B A` exactly, with PEFT's scaling :math:`s`, on the layers
        and with the heads that PEFT trained. A layer of a rank below the prior's has its further
        directions at zero. LoRA's dropout is not taken over.

        Args:
            net: the base network. Default: loaded by the name that the adapter has for it.
            folder: what PEFT wrote, or a hub id. Either stands alone, ``from_peft("my_lora")``, and
                so does a ``peft.PeftModel``, ``from_peft(peft_model)``, which is unloaded.
            method: as in the constructor.
            prior: one that can start there: ``KroneckerInducing``, ``FactorInducing``,
                ``GaussianFactors`` or ``Subspace``, of the adapter's rank or more. Default: the
                method's, of the adapter's rank.
            guide: a family whose mean is a parameter. Its width at the start is ``init_scale`` of
                the prior's. Default: the method's.
            likelihood: as in the constructor. Default: by PEFT's task type.
            fast: the constructor's.

        Raises:
            CheckpointError: a file is missing or corrupt, or ``net`` is another base.
            ConfigurationError: the adapter is no plain LoRA (another tuner, DoRA, biases, ...), or
                the prior or the guide cannot start there.

        Example::

            likelihood = MultipleChoice(num_data=len(train))
            blora = BayesianLoRA.from_peft("my_lora", likelihood=likelihood)
            fit(blora, train, collate=collate, num_steps=100)
        """
        place: AbstractContextManager[nn.Module]
        if folder is None and isinstance(net, nn.Module):
            adapter, place = read_peft(net), unloaded(net)
        else:
            base, source = (None, net) if folder is None else (net, folder)
            if not isinstance(source, str | os.PathLike) or not isinstance(base, nn.Module | None):
                raise ConfigurationError(
                    "from_peft must get a network and a folder or hub id, got "
                    f"{type(net).__name__} and {type(folder).__name__}; write from_peft(net, "
                    "'my_lora'), or an adapter alone: from_peft('my_lora'), from_peft(peft_model)."
                )
            adapter = read_peft(source)
            place = nullcontext(adapter.load_base() if base is None else base)
        with place as base:
            options = adapter.options(base, method, prior, guide, likelihood)
            blora = cls(base, **options, fast=fast)
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
            ConfigurationError: peft, which does it, is not installed, or has an adapter of its own
                in the network.
        """
        self.model.check_on_network()
        if hasattr(self.net, "peft_config"):
            raise ConfigurationError(
                f"{type(self.net).__name__} is PEFT's, with an adapter of its own; merge that one "
                "first, and adapt the base."
            )
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
        trained: int = self.trainable_parameters
        both = trained + sum(p.numel() for p in self.net.parameters())
        print(
            f"trainable params: {trained:,d} || all params: {both:,d} || "
            f"trainable%: {100 * trained / both:.4f}"
        )

    @property
    def active_adapter(self) -> str | None:
        """Which adapter the network has on; ``None`` where :meth:`unwrap` took it off."""
        return next((name for name, each in self._on_net().items() if each.model.adapters), None)

    def add_adapter(self, name: str, **options: Any) -> Self:
        """A second adapter for the same network, which :meth:`set_adapter` puts on in turn.

        Args:
            name: what it is called; the one that was there first is ``"default"``.
            options: the constructor's.

        Returns:
            The second one, with a prior, a guide and files of its own. Until it is set, this one
            stays on the network.

        Raises:
            ConfigurationError: the name is taken, or an option is wrong; nothing is changed then.

        Example::

            other = blora.add_adapter("other", likelihood=MultipleChoice(num_data=len(train)))
            blora.set_adapter("other")
            fit(other, train, collate=collate, num_steps=100)
            blora.set_adapter("default")  # and blora predicts again
        """
        return self._add(name, lambda: type(self)(self.net, **options))

    def load_adapter(self, folder: str | os.PathLike[str], name: str, **options: Any) -> Self:
        """As :meth:`add_adapter`, of a saved one; ``options`` are those of ``from_pretrained``."""
        return self._add(name, lambda: type(self).from_pretrained(self.net, folder, **options))

    def set_adapter(self, name: str) -> Self:
        """Puts the adapter of that name on the network, and the one that is there off.

        Returns:
            It; the other one cannot be asked until it is set again.

        Raises:
            ConfigurationError: there is none of that name.
        """
        chosen = self._known(name)
        for each in self._on_net().values():
            each.model.detach()
        chosen.model.attach()
        return chosen

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter that is not on the network.

        Raises:
            ConfigurationError: there is none of that name, or it is active.
        """
        if self._known(name).model.adapters:
            raise ConfigurationError(
                f"adapter {name!r} is active; make another one so first, set_adapter(...), or "
                "take it off by unwrap()."
            )
        del self._on_net()[name]

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

    def _on_net(self) -> dict[str, Self]:
        """All adapters for the network by name, shared by them; this one alone at first."""
        if "_shared" not in vars(self):
            self._shared = {"default": self}
        return self._shared

    def _known(self, name: str) -> Self:
        known = self._on_net()
        if name not in known:
            raise ConfigurationError(f"adapter {name!r} is unknown; {near_miss(name, known)}.")
        return known[name]

    def _add(self, name: str, make: Callable[[], Self]) -> Self:
        known, active = self._on_net(), self.active_adapter
        if active is None:
            raise ConfigurationError("The network has been unwrapped; wrap it anew to go on.")
        if name in known:
            raise ConfigurationError(f"adapter {name!r} is there already; choose another name.")
        known[active].model.detach()
        try:
            other = make()
            other.model.detach()
        finally:
            known[active].model.attach()
        # what the network was before any of them
        other._frozen, other._shared, known[name] = self._frozen, known, other
        return other
