"""Text from the average of posterior draws, with the uncertainty of each token."""

from pyro_blora.generation.generate import Generation, generate

__all__ = ["Generation", "generate"]
