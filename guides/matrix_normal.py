"""A matrix normal: correlations between rows and between columns of the inducing matrix."""

from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch.distributions import constraints

import pyro_blora.distributions as distributions
from pyro_blora.guides._site_guide import Site
from pyro_blora.guides.mean_field import MeanField


class MatrixNormal(MeanField):
    r"""A matrix normal, :math:`q(U) = \mathcal{MN}(M, L_r L_r^\top, L_c L_c^\top)`.

    Rows share one covariance and columns another: ``m_r^2 + m_c^2`` numbers, not ``m_r^2 m_c^2``.
    A site whose event is not a matrix, such as a scale, gets the mean-field normal. A side longer
    than ``max_side``, 1024, such as of a LoRA's factor, is an error.

    Args:
        init_scale: standard deviation at the start in units of the prior's. Default: 0.01.

    Parameters, for a site of batch shape ``(n,)``: ``loc`` (n, m_r, m_c), ``row_scale_tril``
    (n, m_r, m_r) and ``col_scale_tril`` (n, m_c, m_c). Other sites have ``loc`` and ``scale``.

    Example::

        blora = BayesianLoRA(net, guide=MatrixNormal())
    """

    roles: ClassVar[dict[str, str]] = {
        **MeanField.roles,
        "row_scale_tril": "scale",
        "col_scale_tril": "scale",
    }
    symmetric: ClassVar[bool] = True
    max_side: ClassVar[int] = 1024

    def setup(self, site: Site) -> None:
        """Registers ``loc`` at the prior's mean and both factors, diagonal."""
        if site.event_dim != 2:
            super().setup(site)
            return
        loc, scale = site.start()
        self.loc = PyroParam(loc)
        self.check_size(site, "max_side", max(site.event_shape))
        # the best fit to the prior's standard deviations by a product over rows and columns
        root = (self.init_scale * scale).log()
        half = root.mean((-1, -2)).unsqueeze(-1) / 2
        row, col = root.mean(-1) - half, root.mean(-2) - half
        factor = constraints.lower_cholesky
        self.row_scale_tril = PyroParam(torch.diag_embed(row.exp()), factor)
        self.col_scale_tril = PyroParam(torch.diag_embed(col.exp()), factor)

    def distribution(self) -> TorchDistribution:
        """The matrix normal, whose Cholesky factors are the parameters themselves."""
        if self.site.event_dim != 2:
            return super().distribution()
        return distributions.MatrixNormal(self.loc, self.row_scale_tril, self.col_scale_tril)
