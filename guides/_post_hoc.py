"""What guide families share that widen a point estimate after training."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_blora.guides._site_guide import Site
from pyro_blora.guides.delta import Delta


@dataclass(frozen=True)
class Evidence:
    r"""What the data says about the posterior around the trained point; read as it is needed.

    ``scores`` runs over the data and gives for each batch, by site, :math:`g_{bc} = \sqrt{p_{bc}}
    (J_{bc} - \sum_k p_{bk} J_{bk})`, ``(B, C, n, *event_shape)``, with the Jacobian ``J`` of the
    logits in unconstrained coordinates; ``sum g g^T`` is the Gauss-Newton matrix. ``loss`` is the
    mean negative log-likelihood of so many draws, in nats, under the same noise every time.
    """

    scores: Callable[[], Iterator[dict[str, Tensor]]]
    loss: Callable[[int], float]
    num_data: int | None = None


class PostHoc(Delta):
    """A point mass while it trains; :func:`pyro_blora.inference.finish` then gives it a width."""

    is_point: ClassVar[bool] = False  # once it is finished
    _finished: Tensor
    _known: tuple[Tensor, int, bool] | None = None

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean."""
        super().setup(site)
        self.register_buffer("_finished", torch.zeros((), dtype=torch.bool, device=self.loc.device))

    @property
    def finished(self) -> bool:
        """Whether the width is there."""
        now = self._finished
        if now.is_inference():  # without a version
            return bool(now)
        # reading a CUDA bool synchronizes the device, so it is cached until the buffer changes
        if self._known is None or self._known[0] is not now or self._known[1] != now._version:
            self._known = now, now._version, bool(now)
        return self._known[2]

    def reopen(self) -> None:
        """Takes the width away again, for more training."""
        self._finished.fill_(False)

    def distribution(self) -> TorchDistribution:
        """The point mass at ``loc``, or what :meth:`widened` says."""
        return self.widened() if self.finished else super().distribution()

    @classmethod
    def finish(cls, families: Mapping[str, Any], evidence: Evidence) -> dict[str, float]:
        """Gives the families of all sites, by the sites' names, their width; returns figures."""
        raise NotImplementedError

    def settle(self) -> None:
        """Notes that the width is there."""
        self._finished.fill_(True)

    def widened(self) -> TorchDistribution:
        """The law around ``loc`` once it is finished."""
        raise NotImplementedError

    def center(self, context: Tensor | None = None) -> Tensor:
        """The image of ``loc``."""
        return self.loc if self.site.is_real else self.site.transform(self.loc)
