"""A normalizing flow for each layer: any chain of Pyro's transforms."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform, ReshapeTransform
from torch.func import functional_call, stack_module_state

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.guides._site_guide import Site
from pyro_blora.guides.mean_field import MeanField

Factory = Callable[[int], Any]  # makes a transform of vectors from their number of entries

FLOWS: dict[str, Factory] = {
    "affine-autoregressive": transforms.affine_autoregressive,
    # Pyro's default hidden layer, ten times the input, has millions of parameters.
    "affine-coupling": lambda size: transforms.affine_coupling(size, hidden_dims=[32]),
    "block-autoregressive": transforms.block_autoregressive,
    "householder": transforms.householder,
    "planar": transforms.planar,
    "radial": transforms.radial,
    "spline": transforms.spline,
}


class Flow(MeanField):
    r"""Noise through a chain of transforms, :math:`U = \mu + s \odot f(\epsilon)`.

    Each layer has its own parameters of :math:`f`, and the layers are computed one by one. The KL
    has no closed form, so the ELBO estimates it. A site of more than ``max_size`` entries, 4096,
    such as a factor of a LoRA, is an error.

    Args:
        flows: the transforms in order, each by name (``"affine-autoregressive"``,
            ``"affine-coupling"``, ``"householder"``, ``"planar"``, ``"radial"``, ``"spline"``,
            ``"block-autoregressive"``) or by a function of the number of entries, such as
            ``lambda k: transforms.planar(k)``. Such a transform must define its log-determinant
            (Pyro's ``sylvester`` does not) and hold its tensors as parameters and buffers.
            Default: two affine couplings with a Householder reflection between them.
        init_scale: scale of :math:`s` at the start in units of the prior's standard deviation;
            :math:`f` starts as Pyro starts it. Default: 0.01.

    Parameters, for a site of batch shape ``(n,)``: ``loc`` and ``scale``, ``(n, *event_shape)``,
    and those of the transforms, each with a first dimension ``n``. A site of one number, or outside
    the layers' plate, gets the mean-field normal.

    Reference:
        Kingma et al. 2016, on inverse autoregressive flows, arXiv:1606.04934.

    Example::

        blora = BayesianLoRA(net, guide=Flow(flows=("householder", "spline")))
    """

    max_size: ClassVar[int] = 4096

    def __init__(
        self,
        *,
        flows: tuple[str | Factory, ...] = ("affine-coupling", "householder", "affine-coupling"),
        init_scale: float = 0.01,
    ) -> None:
        super().__init__(init_scale=init_scale)
        if not flows or isinstance(flows, str):
            raise ConfigurationError(f"Flow: flows={flows!r} must be a tuple of transforms.")
        for flow in flows:
            if isinstance(flow, str) and flow not in FLOWS:
                raise ConfigurationError(f"Flow: {flow!r} is unknown; {near_miss(flow, FLOWS)}.")
        # the chain of one layer, and the attributes that hold its tensors for all layers
        self._chain: tuple[Chain, dict[str, str]] | None = None

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean, ``scale`` and the transforms' parameters."""
        self.check_size(site, "max_size", site.size)
        super().setup(site)
        if site.size == 1 or len(site.batch_shape) != 1:
            return
        chains = [make_chain(self.flows, site.size) for _ in self.loc]
        parameters, buffers = stack_module_state(list(chains))
        names = {name: "flow_" + name.replace(".", "_") for name in (*parameters, *buffers)}
        self.roles = {**self.roles, **{names[name]: "scale" for name in parameters}}  # type: ignore[misc]
        for name, tensor in parameters.items():
            setattr(self, names[name], PyroParam(tensor.detach().to(self.loc.device)))
        for name, tensor in buffers.items():  # such as masks, which every setup draws anew
            self.register_buffer(names[name], tensor.to(self.loc.device))
        self._chain = chains[0], names

    def distribution(self) -> TorchDistribution:
        """The distribution of ``U``, which can only score the value that it has just drawn."""
        if self._chain is None:
            return super().distribution()
        chain, names = self._chain
        flat = (*self.site.batch_shape, self.site.size)
        flow = _FlowOfLayers(chain, {name: getattr(self, names[name]) for name in names})
        loc, scale = self.loc.reshape(flat), self.scale.reshape(flat)
        transforms = [
            flow,
            AffineTransform(loc, scale, event_dim=1, cache_size=1),
            ReshapeTransform(torch.Size(flat[-1:]), self.site.event_shape, cache_size=1),
        ]
        noise = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        return dist.TransformedDistribution(noise, transforms)


class Chain(nn.Module):
    """A composition of Pyro's transforms, with its log-determinant."""

    def __init__(self, parts: Sequence[Transform]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.modules_ = nn.ModuleList([p for p in parts if isinstance(p, nn.Module)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``x``, ``(..., k)``, to ``y``, ``(..., k)``, and ``log |dy/dx|``, ``(...)``."""
        # Copies, because a transform keeps the graph of its last call in its cache
        chain = ComposeTransform([copy.copy(part) for part in self.parts])
        y = chain(x)
        log_det = chain.log_abs_det_jacobian(x, y)
        # one term for each entry if all parts are elementwise
        return y, log_det.sum(-1) if log_det.dim() == x.dim() else log_det


def make_chain(flows: Sequence[str | Factory], size: int) -> Chain:
    """The chain of the named or given transforms for vectors of ``size`` entries."""
    return Chain([(FLOWS[flow] if isinstance(flow, str) else flow)(size) for flow in flows])


class _FlowOfLayers(Transform):
    """A chain with another ``state`` for each layer, from ``(..., n, k)`` to ``(..., n, k)``."""

    domain = codomain = constraints.real_vector
    bijective = True
    _log_det: Tensor

    def __init__(self, chain: Chain, state: Mapping[str, Tensor]) -> None:
        super().__init__(cache_size=1)
        self.chain, self.state = chain, state

    def _call(self, x: Tensor) -> Tensor:
        layers = [
            functional_call(self.chain, {k: v[i] for k, v in self.state.items()}, (x[..., i, :],))
            for i in range(x.shape[-2])
        ]
        y, log_det = zip(*layers, strict=True)
        self._log_det = torch.stack(log_det, -1)
        return torch.stack(y, -2)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |dy/dx|``, of the shape of ``x`` without its last dimension."""
        self(x)  # does nothing if x is in the cache; not every transform has an inverse
        return self._log_det
