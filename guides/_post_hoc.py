"""The base of guide families that give a point estimate its width after training."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_blora.guides.delta import Delta


@dataclass(frozen=True)
class Evidence:
    r"""Functions of the data that describe the posterior around the trained point.

    ``scores()`` yields for each batch, by site, :math:`g_{bc} = \sqrt{p_{bc}} (J_{bc} - \sum_k
    p_{bk} J_{bk})`, ``(B, C, n, *event_shape)``, with the Jacobian ``J`` of the logits in
    unconstrained coordinates; ``sum g g^T`` is the Gauss-Newton matrix. ``loss(num_samples)`` is
    the mean negative log-likelihood of draws, in nats, with the same noise in every call.
    """

    scores: Callable[[], Iterator[dict[str, Tensor]]]
    loss: Callable[[int], float]
    num_data: int | None = None


class PostHoc(Delta):
    """A point mass while it trains; :func:`pyro_blora.inference.finish` then gives it a width."""

    is_point: ClassVar[bool] = False
    finished = False  # whether the width is known; a plain bool, so that no device is synchronized

    def get_extra_state(self) -> Tensor:
        """``finished`` as a tensor of the state dict."""
        return torch.tensor(self.finished)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores ``finished`` from a state dict."""
        self.finished = bool(state)

    def reopen(self) -> None:
        """Makes the guide a point again, for more training."""
        self.finished = False

    def distribution(self) -> TorchDistribution:
        """The point mass at ``loc``, or :meth:`widened` once the width is known."""
        return self.widened() if self.finished else super().distribution()

    @classmethod
    def finish(cls, families: Mapping[str, Any], evidence: Evidence) -> dict[str, float]:
        """Finds the widths of the families of all sites, given by site; returns figures to log."""
        raise NotImplementedError

    def settle(self) -> None:
        """Marks the width as known."""
        self.finished = True

    def widened(self) -> TorchDistribution:
        """The law around ``loc``."""
        raise NotImplementedError

    def center(self, context: Tensor | None = None) -> Tensor:
        """The image of ``loc``."""
        return self.loc if self.site.is_real else self.site.transform(self.loc)
