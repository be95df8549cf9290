"""Priors: one Pyro model of a low-rank update in each file.

The import path is ``pyro_blora.models``.
"""

from pyro_blora.models._update_model import UpdateModel
from pyro_blora.models.kronecker_inducing import KroneckerInducing

__all__ = ["KroneckerInducing", "UpdateModel"]
