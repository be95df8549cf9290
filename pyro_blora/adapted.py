"""What summaries and checkpoints need of a ``BayesianLoRA``, so that they need not import it."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from pyro_blora.likelihoods import Likelihood
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.updates.low_rank_update import LowRankUpdate

__all__ = ["Adapted"]


class Adapted(Protocol):
    """A network with its prior, guide and likelihood; see ``bayesian_lora.py``."""

    model: BayesianLoRAModel
    guide: nn.Module
    prior_family: tuple[Any]
    guide_family: tuple[Any]

    @property
    def net(self) -> nn.Module:
        """The wrapped network."""

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood."""

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""

    def sample_updates(
        self, num_samples: int, batch: Mapping[str, Any] | None = None
    ) -> dict[str, LowRankUpdate]:
        """Posterior draws of the updates by group."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """The trained tensors."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any:
        """Takes trained tensors."""
