"""Guide families: variational distributions over the sites of any prior, one per file.

Pass one as ``BayesianLoRA(net, guide=...)``; write one by subclassing :class:`SiteGuide`. An option
out of its range, or a site too large for a family, raises ``ConfigurationError``.
"""

from pyro_blora.guides._site_guide import Site, SiteGuide
from pyro_blora.guides.delta import Delta
from pyro_blora.guides.ensemble import Ensemble
from pyro_blora.guides.flow import Flow
from pyro_blora.guides.full_rank import FullRank
from pyro_blora.guides.laplace import Laplace
from pyro_blora.guides.matrix_normal import MatrixNormal
from pyro_blora.guides.mean_field import MeanField

__all__ = [
    "Delta",
    "Ensemble",
    "Flow",
    "FullRank",
    "Laplace",
    "MatrixNormal",
    "MeanField",
    "Site",
    "SiteGuide",
]
