"""The contract of a prior: a Pyro model of the low-rank update of one group of layers."""

import copy
import warnings
from typing import Any, ClassVar, TypeVar

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import pad

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.targets import LayerGroup
from pyro_blora.options import Options
from pyro_blora.updates.low_rank_update import LowRankUpdate

Self = TypeVar("Self", bound="UpdateModel")


class UpdateModel(Options, PyroModule):
    r"""A prior: :math:`p(U)`, and how the update :math:`\Delta W` follows from :math:`U`.

    A prior is made before it knows the layers. :class:`~pyro_blora.BayesianLoRA` then calls
    :meth:`bind` once for each group, which copies the prior and hands the copy its group.
    A subclass writes two methods:

    * :meth:`setup` registers the trainable tensors, each a :class:`pyro.nn.PyroParam`;
    * :meth:`forward` samples the sites and returns the update: a layer's own site inside
      :meth:`plate`, a shared one before it.

    Each argument of its constructor is an attribute of that name, which checkpoints and ``repr``
    read back.

    With ``P`` particles a site inside the plate is ``(P, n, *event_shape)``, a shared one
    ``(P, 1, *event_shape)``; without particles they are ``(n, *event_shape)`` and ``event_shape``.
    Index from the right: a shared scale meets vectors of the layers as ``tau[..., None] * c``.

    A prior that can start at a trained adapter writes :meth:`start_at`, too. One that inherits it
    and cannot says why in :attr:`no_start`.

    A site may say where guides start, if not at its prior's mean: ``pyro.sample(...,
    infer={"start": value})``, as LoRA's random ``A`` needs. A real site in which the update is not
    linear, such as a log scale, says ``infer={"nonlinear": True}``. The posterior mean is then
    taken over draws of the update, as for a constrained site.

    Attributes:
        roles: for each trainable tensor, the learning rate it takes in
            :func:`~pyro_blora.inference.fit`: ``"mean"``, ``"scale"`` or ``"direction"``.
        learning_rates: the rates by role that suit it and its guide, where they are not the usual
            ones, :data:`pyro_blora.inference.learning_rates.RATES`.
        point_epochs: epochs (at least 300 steps) after which the learning rate of directions and
            heads is zero, because no KL keeps them from memorizing. Default: never.
        no_start: why it cannot start at an adapter that is there already; empty if it can.

    Example::

        class Plain(UpdateModel):
            def __init__(self, *, rank: int = 8) -> None:
                super().__init__()

            def setup(self, group: LayerGroup) -> None:
                self.A = PyroParam(self.randn(group.n, self.rank, group.d_in) / group.d_in**0.5)

            def forward(self) -> LowRankUpdate:
                with self.plate():
                    B = pyro.sample(self.site("B"), self.normal(self.group.d_out, self.rank))
                return LowRankUpdate(A=self.A, B=B)  # A: n x r x d_in, B: [P x] n x d_out x r
    """

    roles: ClassVar[dict[str, str]] = {}
    learning_rates: ClassVar[dict[str, float]] = {}
    point_epochs: ClassVar[float | None] = None
    no_start: ClassVar[str] = "it does not define start_at(B, A)"
    group: LayerGroup

    _plate: tuple[pyro.plate] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> LowRankUpdate:
        """Runs :meth:`forward` with a plate of its own: a second one would repeat its site."""
        self._plate = None
        update: LowRankUpdate = super().__call__(*args, **kwargs)
        self._plate = None
        return update

    def bind(self: Self, group: LayerGroup) -> Self:
        """A copy of this prior for ``group``, with its parameters registered."""
        # Built anew, not copied whole: a copy would keep the parameter-store mode of its original
        bound = type(self)(**copy.deepcopy(self.options()))
        bound.group = group
        bound.setup(group)
        own = {name.removesuffix("_unconstrained") for name, _ in bound.named_parameters("", False)}
        if stray := sorted(own - bound._pyro_params.keys()):
            raise ConfigurationError(
                f"{type(self).__name__}.setup registers {stray} as nn.Parameter; make each a "
                "pyro.nn.PyroParam."
            )
        return bound

    @property
    def gradient_ranks(self) -> tuple[int, int] | None:
        """How many directions of its gradients a prior asks for, before training.

        They come by :meth:`inform`; a buffer ``informed`` says whether they have.
        """
        return None

    def warn_unless_informed(self) -> None:
        """Warns where this prior asks for directions and has none yet."""
        if self.gradient_ranks is not None and not self.informed:
            warnings.warn(
                f"group {self.group.name!r}: the directions of FisherInducing are random as yet. "
                "Before a loop of your own call pyro_blora.inference.inform(blora, train, "
                "collate=...), as pyro_blora.fit does. Pyro's parameter store does not hold them; "
                "save_pretrained does.",
                stacklevel=3,
            )

    def inform(self, Z_r: Tensor, Z_c: Tensor) -> None:
        """Takes the top directions of the gradients, ``(n, m_r, d_out)`` and ``(n, m_c, d_in)``.

        They are eigenvectors of the second moment, as long as their eigenvalues' roots. A common
        factor makes the mean square of a side's lengths one.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for gradients; define inform().")

    def setup(self, group: LayerGroup) -> None:
        """Registers the trainable tensors of this prior for ``group``."""
        raise NotImplementedError(f"{type(self).__name__} must define setup(group).")

    def forward(self) -> LowRankUpdate:
        """Samples the sites and returns the update. Factors are ``(..., n, rows, columns)``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward().")

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        r"""Turns to updates that are there already, such as a trained LoRA's; before the guide.

        ``B`` is ``(n, d_out, r)``, ``A`` ``(n, r, d_in)``, padded with zeros if a layer's rank
        is smaller. Returns the value of each site, by its full name, at which :math:`\Delta W =
        B A`. Guides start there; a site that is not named starts as ever.
        """
        raise ConfigurationError(
            f"{self!r} cannot start at a given adapter: {self.no_start}. Take KroneckerInducing, "
            "FactorInducing, GaussianFactors or Subspace, with learned or fixed scales."
        )

    def widened(self, B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """``B A`` by factors of ``rank``; new rows of ``A`` start as LoRA's, with ``B`` zero."""
        more = rank - A.shape[-2]
        if more < 0:
            raise ConfigurationError(
                f"group {self.group.name!r}: the adapter to start at has rank {A.shape[-2]}, and "
                f"{self!r} holds {rank}; give it rank={A.shape[-2]} or more."
            )
        A, B = pad(A, (0, 0, 0, more)), pad(B, (0, more))
        used = A.any(-1, keepdim=True)
        return B * used.mT, torch.where(used, A, self.lora_start(rank).to(A.dtype))

    def check_rank(self, rank: int | tuple[int, int], group: LayerGroup) -> None:
        """A rank may not exceed the size of the group's layers."""
        m_r, m_c = (rank, rank) if isinstance(rank, int) else rank
        if m_r > group.d_out or m_c > group.d_in:
            raise ConfigurationError(
                f"rank={rank!r} is too large for group {group.name!r}, whose layers are "
                f"{group.d_out} x {group.d_in}; choose at most {min(group.d_out, group.d_in)}, or "
                "leave the layer out with exclude_modules."
            )

    def check_update(self, update: object) -> None:
        """Whether :meth:`forward` returns an update of the group; asked once, before training."""
        n, d_out, d_in = self.group.n, self.group.d_out, self.group.d_in
        given = f"a {type(update).__name__}"
        if isinstance(update, LowRankUpdate):
            A, B = tuple(update.A.shape), tuple(update.B.shape)
            core = None if update.core is None else tuple(update.core.shape)
            r_c, r_r = A[-2:-1], B[-1:]
            between = r_r == r_c if core is None else core[-3:] == (n, *r_r, *r_c)
            if between and A[-3:] == (n, *r_c, d_in) and B[-3:] == (n, d_out, *r_r):
                return
            given = f"A {A}, B {B}, core {core}"
        raise ConfigurationError(
            f"group {self.group.name!r}: {type(self).__name__}.forward must return a LowRankUpdate "
            f"of B (..., {n}, {d_out}, r), A (..., {n}, r, {d_in}) and core (..., {n}, r, r) or "
            f"None, got {given}."
        )

    def site(self, name: str) -> str:
        """The full name of a site of this group: ``"q_proj.V"``."""
        return f"{self.group.name}.{name}"

    def plate(self) -> pyro.plate:
        """The plate over the group's ``n`` layers, at dimension -1; any number of times."""
        if self._plate is None:
            self._plate = (pyro.plate(self.site("layers"), self.group.n, dim=-1),)
        return self._plate[0]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers on the group's device, to start a parameter with."""
        return torch.randn(*shape, device=self.group.device)

    def lora_start(self, rank: int) -> Tensor:
        """Where LoRA starts ``A``: uniform with variance ``1 / (3 d_in)``, ``(n, r, d_in)``."""
        uniform = 2 * torch.rand(self.group.n, rank, self.group.d_in) - 1
        return self.group.d_in**-0.5 * uniform.to(self.group.device)

    def normal(self, *event_shape: int, scale: Tensor | float = 1.0) -> pyro.distributions.Normal:
        """Independent normals of mean zero and the given scale, as one event."""
        scale = torch.as_tensor(scale, device=self.group.device)
        base = pyro.distributions.Normal(torch.zeros_like(scale), scale)
        return base.expand(event_shape).to_event(len(event_shape))
