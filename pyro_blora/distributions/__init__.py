"""Distributions that neither torch nor Pyro has."""

from pyro_blora.distributions import kl as kl  # registers the divergences
from pyro_blora.distributions.coupled_normal import CoupledNormal
from pyro_blora.distributions.matrix_normal import MatrixNormal
from pyro_blora.distributions.members import Members
from pyro_blora.distributions.normal_mixture import NormalMixture
from pyro_blora.distributions.reshaped import Reshaped

__all__ = ["CoupledNormal", "MatrixNormal", "Members", "NormalMixture", "Reshaped"]
