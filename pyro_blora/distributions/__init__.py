"""Distributions that neither torch nor Pyro has."""

from pyro_blora.distributions import kl as kl  # registers the divergences
from pyro_blora.distributions.matrix_normal import MatrixNormal
from pyro_blora.distributions.real_law import CoupledNormal, Members, NormalMixture, Reshaped

__all__ = ["CoupledNormal", "MatrixNormal", "Members", "NormalMixture", "Reshaped"]
