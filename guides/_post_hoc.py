"""What guide families share that widen a point estimate after training."""

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor

from pyro_blora.guides._site_guide import Site, SiteGuide

__all__ = ["PostHoc"]


class PostHoc(SiteGuide):
    """A point mass while it trains; :func:`pyro_blora.inference.finish` then gives it a width.

    ``fit`` calls ``finish`` by itself when the training is over.

    Attributes:
        finished: whether the width is there.
    """

    roles: ClassVar[dict[str, str]] = {"loc": "mean"}
    _finished: Tensor

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean."""
        self.loc = PyroParam(site.start()[0])
        self.register_buffer("_finished", torch.zeros((), dtype=torch.bool, device=self.loc.device))

    @property
    def finished(self) -> bool:
        """Whether the width is there."""
        return bool(self._finished)

    def reopen(self) -> None:
        """Takes the width away again, for more training."""
        self._finished.fill_(False)

    def distribution(self) -> TorchDistribution:
        """The point mass at ``loc``, or what :meth:`widened` says."""
        if self.finished:
            return self.widened()
        return dist.Delta(self.loc, event_dim=self.site.event_dim)

    def widened(self) -> TorchDistribution:
        """The law around ``loc`` once it is finished."""
        raise NotImplementedError(f"{type(self).__name__} must define widened().")

    def center(self) -> Tensor:
        """The image of ``loc``."""
        return self.loc if self.site.is_real else self.site.transform(self.loc)
