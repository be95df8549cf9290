"""Priors: Pyro models of a low-rank update, one per file.

Pass one as ``BayesianLoRA(net, prior=...)``; write one by subclassing :class:`UpdateModel`. An
option out of its range, or a rank above a layer's size, raises ``ConfigurationError``.
"""

from pyro_blora.models._update_model import UpdateModel
from pyro_blora.models.factor_inducing import FactorInducing
from pyro_blora.models.gaussian_factors import GaussianFactors
from pyro_blora.models.hierarchical import Hierarchical
from pyro_blora.models.kernel_inducing import KernelInducing
from pyro_blora.models.kronecker_inducing import KroneckerInducing
from pyro_blora.models.spectral_inducing import SpectralInducing
from pyro_blora.models.subspace import Subspace
from pyro_blora.network.targets import LayerGroup
from pyro_blora.updates import LowRankUpdate

__all__ = [
    "FactorInducing",
    "GaussianFactors",
    "Hierarchical",
    "KernelInducing",
    "KroneckerInducing",
    "LayerGroup",
    "LowRankUpdate",
    "SpectralInducing",
    "Subspace",
    "UpdateModel",
]
