"""The contract of a prior: a Pyro model of the low-rank update of one group of layers."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.targets import LayerGroup
from pyro_blora.options import Options
from pyro_blora.updates import LowRankUpdate

# A name in CORES, or a function from a shape to a distribution of that event shape
Core = str | Callable[[tuple[int, ...]], TorchDistribution]

CORES = ("normal", "horseshoe", "ard")

_SLAB = 2.0  # standard deviation of an entry that the horseshoe does not shrink


class UpdateModel(Options, PyroModule):
    r"""A prior: :math:`p(U)`, and the update :math:`\Delta W` as a function of :math:`U`.

    A prior is made before the layers are known; :meth:`bind` copies it for each group. A subclass
    defines :meth:`setup`, which registers the trainable tensors, each a
    :class:`pyro.nn.PyroParam`, and :meth:`forward`, which samples the sites and returns the update.
    The arguments of its constructor are attributes of the same names, which checkpoints and
    ``repr`` read.

    Sites of the layers are sampled inside :meth:`plate`, those that the layers share before it.
    With ``P`` particles they are ``(P, n, *event_shape)`` and ``(P, 1, *event_shape)``, without
    particles ``(n, *event_shape)`` and ``event_shape``. So index from the right: a shared scale
    multiplies vectors as ``tau[..., None] * c``.

    Guides start a site at its prior's mean, or at ``value`` if it has ``infer={"start": value}``,
    as LoRA's random ``A`` needs. A real site in which the update is not linear, such as a log
    scale, needs ``infer={"nonlinear": True}``; the posterior mean of the update is then an average
    over draws, as for a constrained site.

    Example::

        class Plain(UpdateModel):
            roles = {"A": "direction"}

            def __init__(self, *, rank: int = 8) -> None:  # self.rank is 8
                super().__init__()

            def setup(self, group: LayerGroup) -> None:
                self.A = PyroParam(self.randn(group.n, self.rank, group.d_in) / group.d_in**0.5)

            def forward(self) -> LowRankUpdate:
                with self.plate():
                    B = pyro.sample(self.site("B"), self.normal(self.group.d_out, self.rank))
                return LowRankUpdate(A=self.A, B=B)  # A: n x r x d_in, B: [P x] n x d_out x r
    """

    #: the role of each trainable tensor in ``fit``: ``"mean"``, ``"scale"`` or ``"direction"``
    roles: ClassVar[dict[str, str]] = {}
    #: rates by role that suit the prior, where they differ from ``pyro_blora.inference.RATES``
    learning_rates: ClassVar[dict[str, float]] = {}
    #: epochs (at least 300 steps) for each bit of a label, ``log2 K`` for ``K`` classes, after
    #: which directions and heads stop learning, because no KL keeps them from memorizing
    point_epochs: ClassVar[float | None] = None
    #: why the prior cannot start at a given adapter; empty if it can
    no_start: ClassVar[str] = "it does not define start_at(B, A)"
    group: LayerGroup

    _plate: pyro.plate | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> LowRankUpdate:
        """Makes the layer plate once per call; Pyro rejects duplicate names."""
        self._plate = None
        update: LowRankUpdate = super().__call__(*args, **kwargs)
        self._plate = None
        return update

    def bind(self, group: LayerGroup) -> Self:
        """A copy of this prior for ``group``, with its parameters registered."""
        # Constructed anew, because a deep copy would keep the parameter-store mode of the original
        bound = type(self)(**copy.deepcopy(self.options()))
        bound.group = group
        bound.setup(group)
        names = {n.removesuffix("_unconstrained") for n, _ in bound.named_parameters("", False)}
        if stray := sorted(names - bound._pyro_params.keys()):
            raise ConfigurationError(
                f"{type(self).__name__}.setup registers {stray} as nn.Parameter; make each a "
                "pyro.nn.PyroParam."
            )
        return bound

    def setup(self, group: LayerGroup) -> None:
        """Registers the trainable tensors of this prior for ``group``."""
        raise NotImplementedError(f"{type(self).__name__} must define setup(group).")

    def forward(self) -> LowRankUpdate:
        """Samples the sites and returns the update. Factors are ``(..., n, rows, columns)``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward().")

    def start_at(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        r"""Moves the prior to given updates, such as a trained LoRA's.

        ``B`` is ``(n, d_out, r)``, ``A`` ``(n, r, d_in)``, padded with zeros if a layer's rank
        is smaller. Returns the values of sites, by full name, at which :math:`\Delta W = B A`.
        Guides, which are made afterwards, start there.
        """
        raise ConfigurationError(
            f"{self!r} cannot start at a given adapter: {self.no_start}. Take KroneckerInducing, "
            "FactorInducing, GaussianFactors or Subspace, with learned or fixed scales."
        )

    def widened(self, B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """``B`` and ``A`` at a larger rank; new rows of ``A`` start as in LoRA, ``B`` at zero."""
        more = rank - A.shape[-2]
        if more < 0:
            raise ConfigurationError(
                f"group {self.group.name!r}: the adapter to start at has rank {A.shape[-2]}, but "
                f"{self!r} has rank {rank}; give it rank={A.shape[-2]} or more."
            )
        A, B = pad(A, (0, 0, 0, more)), pad(B, (0, more))
        used = A.any(-1, keepdim=True)
        return B * used.mT, torch.where(used, A, self.lora_start(rank).to(A.dtype))

    def check_rank(self, rank: int | tuple[int, int], group: LayerGroup) -> None:
        """Raises an error if the rank exceeds the size of the group's layers."""
        m_r, m_c = (rank, rank) if isinstance(rank, int) else rank
        if m_r > group.d_out or m_c > group.d_in:
            raise ConfigurationError(
                f"rank={rank!r} is too large for group {group.name!r} of {group.d_out} x "
                f"{group.d_in}; lower it, or leave the group out with exclude_modules."
            )

    def check_update(self, update: object) -> None:
        """Raises an error unless ``update`` is an update of this group."""
        n, d_out, d_in = self.group.n, self.group.d_out, self.group.d_in
        got = f"a {type(update).__name__}"
        if isinstance(update, LowRankUpdate):
            A, B = tuple(update.A.shape), tuple(update.B.shape)
            core = None if update.core is None else tuple(update.core.shape)
            r_c, r_r = A[-2:-1], B[-1:]
            between = r_r == r_c if core is None else core[-3:] == (n, *r_r, *r_c)
            if between and A[-3:] == (n, *r_c, d_in) and B[-3:] == (n, d_out, *r_r):
                return
            got = f"A {A}, B {B}, core {core}"
        raise ConfigurationError(
            f"group {self.group.name!r}: {type(self).__name__}.forward must return a LowRankUpdate "
            f"of B (..., {n}, {d_out}, r), A (..., {n}, r, {d_in}) and core (..., {n}, r, r) or "
            f"None, got {got}."
        )

    def site(self, name: str) -> str:
        """The full name of a site of this group: ``"q_proj.V"``."""
        return f"{self.group.name}.{name}"

    def plate(self) -> pyro.plate:
        """The plate over the group's ``n`` layers, at dimension -1; it can be entered again."""
        if self._plate is None:
            self._plate = pyro.plate(self.site("layers"), self.group.n, dim=-1)
        return self._plate

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers on the group's device, for the start of a parameter."""
        return torch.randn(*shape, device=self.group.device)

    def lora_start(self, rank: int) -> Tensor:
        """The start of ``A`` in LoRA, ``(n, r, d_in)``: uniform with variance ``1 / (3 d_in)``."""
        uniform = 2 * torch.rand(self.group.n, rank, self.group.d_in) - 1
        return self.group.d_in**-0.5 * uniform.to(self.group.device)

    def normal(self, *event_shape: int, scale: Tensor | float = 1.0) -> pyro.distributions.Normal:
        """Independent normals of mean zero, as one event; ``scale`` broadcasts against it.

        A scale of a site is indexed from the right, ``scale=tau[..., None, None]`` for matrices.
        """
        scale = torch.as_tensor(scale, device=self.group.device)
        base = pyro.distributions.Normal(torch.zeros_like(scale), scale)
        shape = torch.broadcast_shapes(scale.shape, event_shape)
        return base.expand(shape).to_event(len(event_shape))

    def sample_core(self, core: Core, shape: tuple[int, ...]) -> Tensor:
        r"""Samples a core of shape ``(m_r, m_c)`` for each layer, within the plate.

        * ``"normal"``: standard normal entries;
        * ``"horseshoe"``: the regularized horseshoe (Piironen, Vehtari 2017, arXiv:1707.01694),
          slab 2, with half-Cauchy sites ``tau`` for each layer and ``local`` for each entry;
        * ``"ard"``: a half-Cauchy scale for each column, site ``columns``, so that the posterior
          shrinks columns that the data does not need.

        The last two learn the rank (see :func:`~pyro_blora.effective_ranks`) if directions are
        fixed, as in ``SpectralInducing``; learned directions fit noise under any core.
        """

        def half_cauchy(name: str, shape: tuple[int, ...]) -> Tensor:
            prior = pyro.distributions.HalfCauchy(torch.ones(shape, device=self.group.device))
            return pyro.sample(self.site(name), prior.to_event(len(shape)))

        if core == "horseshoe":
            width = half_cauchy("tau", ())[..., None, None] * half_cauchy("local", shape)
        elif core == "ard":
            columns = half_cauchy("columns", shape[-1:])
        V = pyro.sample(self.site("V"), core(shape) if callable(core) else self.normal(*shape))
        if core == "horseshoe":
            return V * _SLAB * width / (_SLAB**2 + width.square()).sqrt()
        return V * columns.unsqueeze(-2) if core == "ard" else V
