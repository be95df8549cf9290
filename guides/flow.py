"""A normalizing flow for each layer: any chain of Pyro's transforms."""

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch.distributions.transforms import AffineTransform, ReshapeTransform

from pyro_blora.distributions.stacked_flow import FLOWS, Factory, Stack, StackedFlow, make_chain
from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.guides._site_guide import Site
from pyro_blora.guides.mean_field import MeanField

__all__ = ["Flow"]


class Flow(MeanField):
    r"""Noise through a chain of transforms, :math:`U = \mu + s \odot f(\epsilon)`.

    Each layer has parameters of its own in :math:`f`; all layers run in one call, but for splines
    and block autoregressive transforms, whose layers run in turn. The KL has no closed form, so the
    ELBO estimates it.

    Args:
        flows: the transforms in order, each a name of
            :data:`~pyro_blora.distributions.stacked_flow.FLOWS` (``"affine-autoregressive"``,
            ``"affine-coupling"``, ``"householder"``, ``"planar"``, ``"radial"``, ``"spline"``,
            ``"block-autoregressive"``) or a function that makes one for a number
            of entries, such as ``lambda k: transforms.planar(k)``. Default: two affine
            couplings, turned against each other by a Householder reflection.
        init_scale: scale of :math:`s` at the start in units of the prior's standard deviation;
            :math:`f` starts as Pyro starts it. Default: 0.01.
        max_size: the largest number of entries for which transforms are made; larger sites (the
            factors of a LoRA, say) raise an error. Default: 4096.

    Parameters, for a site of batch shape ``(n,)``: ``loc`` and ``scale``, ``(n, *event_shape)``,
    and those of the transforms, each with a first dimension ``n``. A site of one number, or outside
    of the layers' plate, gets the mean-field normal.

    Raises:
        ConfigurationError: there are no transforms, a name is unknown, or a site has more than
            ``max_size`` numbers for each layer.

    Reference:
        Kingma et al. 2016, "Improving variational inference with inverse autoregressive flow",
        arXiv:1606.04934.

    Example::

        blora = BayesianLoRA(net, guide=Flow(flows=("householder", "spline")))
    """

    def __init__(
        self,
        *,
        flows: tuple[str | Factory, ...] = ("affine-coupling", "householder", "affine-coupling"),
        init_scale: float = 0.01,
        max_size: int = 4096,
    ) -> None:
        super().__init__(init_scale=init_scale)
        if not flows or isinstance(flows, str):
            raise ConfigurationError(f"Flow: flows={flows!r} must be a tuple of transforms.")
        for flow in flows:
            if isinstance(flow, str) and flow not in FLOWS:
                raise ConfigurationError(f"Flow: {flow!r} is unknown; {near_miss(flow, FLOWS)}.")
        self.flows = flows
        self.max_size = max_size
        self._stack: tuple[Stack, dict[str, str]] | None = None  # with the names of its state here

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean, ``scale`` and the transforms' parameters."""
        self.check_size(site, "max_size", site.size)
        super().setup(site)
        if site.size == 1 or len(site.batch_shape) != 1:
            return
        stack = Stack.of([make_chain(self.flows, site.size) for _ in self.loc], site.size)
        names = {name: "flow_" + name.replace(".", "_") for name in stack.state}
        trained = dict(stack.chain.named_parameters())
        self.roles = {**self.roles, **{names[name]: "scale" for name in trained}}  # type: ignore[misc]
        for name, attribute in names.items():
            tensor = stack.state[name].to(self.loc.device).clone()
            if name in trained:
                setattr(self, attribute, PyroParam(tensor))
            else:  # masks, which are drawn anew at every setup
                self.register_buffer(attribute, tensor)
        self._stack = stack, names

    def distribution(self) -> TorchDistribution:
        """The law of ``U``; only values that it has just drawn can be scored."""
        if self._stack is None:
            return super().distribution()
        stack, names = self._stack
        flat = (*self.site.batch_shape, self.site.size)
        flow = StackedFlow(stack, {name: getattr(self, names[name]) for name in names})
        loc, scale = self.loc.reshape(flat), self.scale.reshape(flat)
        transforms = [
            flow,
            AffineTransform(loc, scale, event_dim=1, cache_size=1),
            ReshapeTransform(torch.Size(flat[-1:]), self.site.event_shape, cache_size=1),
        ]
        noise = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        return dist.TransformedDistribution(noise, transforms)
