"""How an adapter is written, exported and read again: what ``BayesianLoRA`` inherits."""

import os
from typing import Any

from pyro.nn import PyroModule
from torch import nn
from typing_extensions import Self

from pyro_blora.checkpoints.saved import read_pretrained, save_pretrained
from pyro_blora.errors import CheckpointError
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Likelihood
from pyro_blora.models import UpdateModel
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel

__all__ = ["Keeping"]


class Keeping(PyroModule):
    """The part of ``BayesianLoRA`` that folders and files are about."""

    model: BayesianLoRAModel
    guide: Any

    @property
    def guide_family(self) -> Any:
        """The guide family as it was given."""
        raise NotImplementedError

    def unwrap(self) -> nn.Module:
        """Gives the network back as it was."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the adapter; see :func:`pyro_blora.checkpoints.save_pretrained`."""
        save_pretrained(self, self.model, self.guide_family, folder)

    @classmethod
    def from_pretrained(
        cls,
        net: nn.Module,
        folder: str | os.PathLike[str],
        *,
        prior: UpdateModel | None = None,
        guide: SiteGuide | None = None,
        likelihood: Likelihood | None = None,
        fast: bool = True,
    ) -> Self:
        """An adapter from its folder; see :func:`pyro_blora.checkpoints.read_pretrained`.

        ``fast`` is the constructor's.
        """
        parts: dict[str, Any] = {"prior": prior, "guide": guide, "likelihood": likelihood}
        saved = read_pretrained(net, folder, **parts)
        blora: Self = cls(net, **saved.options, fast=fast)
        try:
            saved.load_into(blora)
        except CheckpointError:
            blora.unwrap()
            raise
        return blora
