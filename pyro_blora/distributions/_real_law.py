"""What the distributions of this room have in common."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["RealLaw"]

Self = TypeVar("Self", bound="RealLaw")


class RealLaw(TorchDistribution):
    """A law over real arrays whose parameters stay as they were given when it is expanded."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's own protocol)
    has_rsample = True
    _drawn: tuple[Tensor, Tensor] | None = None

    def __init__(
        self, batch_shape: torch.Size, event_shape: torch.Size, validate_args: bool | None = False
    ) -> None:
        self._given_shape = batch_shape
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays of the event shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self: Self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """The same law at ``batch_shape``; it shares the storage of the parameters."""
        torch.empty(self.batch_shape, device="meta").expand(batch_shape)  # raises if it does not
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def as_given(self: Self) -> Self:
        """The law before it was expanded."""
        new = copy.copy(self)
        new._batch_shape = self._given_shape
        return new

    def made_of(self, noise: Tensor, value: Tensor) -> Tensor:
        """``value``, a draw of a normal law, which :meth:`of_own_draw` is to know."""
        self._drawn = noise, value
        return value

    def of_own_draw(self, value: Tensor) -> Tensor | None:
        r"""The log density of the last draw by its noise, :math:`(k - |\epsilon|^2) / 2 - H[q]`.

        Noise that is solved for has no digits left where a triangle is far from diagonal. ``None``
        of any other value, and of a draw held fixed, whose density has another gradient.
        """
        noise, drawn = self._drawn or (value, None)
        if value is not drawn or (torch.is_grad_enabled() and value.grad_fn is None):
            return None
        batch = noise.shape[: noise.dim() - len(self.event_shape)]
        squares = noise.square().reshape(*batch, -1).sum(-1)
        return (self.event_shape.numel() - squares) / 2 - self.entropy()

    def __repr__(self) -> str:
        batch, event = tuple(self.batch_shape), tuple(self.event_shape)
        return f"{type(self).__name__}(batch_shape={batch}, event_shape={event})"
