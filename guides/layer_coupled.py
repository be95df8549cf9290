"""A normal that correlates the layers of a group."""

from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch.distributions import constraints

from pyro_blora.distributions import CoupledNormal
from pyro_blora.guides._site_guide import Site
from pyro_blora.guides.mean_field import MeanField


class LayerCoupled(MeanField):
    r"""A normal over all layers of a group at once, with a Kronecker factor over layers.

    .. math::

        q(U_1, \dots, U_n) = \mathcal{N}\left(\mu, L L^\top \otimes \mathrm{diag}(s)^2\right),
        \qquad L \in \mathbb{R}^{n \times n}.

    The same entry of two layers is correlated by :math:`L L^\top`; within a layer entries are
    independent. The layers share :math:`s`, and differ in scale by the rows of :math:`L`. A site
    outside the layers' plate (a scale common to all layers) gets the mean-field normal.

    Args:
        init_scale: standard deviation at the start in units of the prior's. Default: 0.01.

    Parameters, for a site of batch shape ``(n,)``: ``loc``, ``(n, *event_shape)``, ``scale``,
    ``event_shape``, and ``layer_scale_tril``, ``(n, n)``.

    Example::

        blora = BayesianLoRA(net, guide=LayerCoupled())
    """

    roles: ClassVar[dict[str, str]] = {**MeanField.roles, "layer_scale_tril": "scale"}
    symmetric: ClassVar[bool] = True

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean, ``scale`` and a diagonal ``layer_scale_tril``."""
        super().setup(site)
        if len(site.batch_shape) != 1:
            return
        # the best fit to the prior's scales by a product over layers and entries
        root = self.scale.detach().log()
        layers = root.reshape(len(root), -1).mean(-1)
        self.scale = PyroParam((root.mean(0) - layers.mean()).exp(), constraints.positive)
        factor = torch.diag_embed(layers.exp())
        self.layer_scale_tril = PyroParam(factor, constraints.lower_cholesky)

    def distribution(self) -> TorchDistribution:
        """The normal, with the layers as its batch dimension."""
        if len(self.site.batch_shape) != 1:
            return super().distribution()
        return CoupledNormal(self.loc, self.scale, self.layer_scale_tril)
