"""Guides: one variational family in each file.

The import path is ``pyro_blora.guides``.
"""

from pyro_blora.guides._site_guide import Site, SiteGuide
from pyro_blora.guides.delta import Delta
from pyro_blora.guides.matrix_normal import MatrixNormal
from pyro_blora.guides.mean_field import MeanField

__all__ = ["Delta", "MatrixNormal", "MeanField", "Site", "SiteGuide"]
