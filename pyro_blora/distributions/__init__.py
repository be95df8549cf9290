"""Distributions that neither torch nor Pyro has."""

from pyro_blora.distributions import kl as kl  # registers the divergences
from pyro_blora.distributions.matrix_normal import MatrixNormal

__all__ = ["MatrixNormal"]
