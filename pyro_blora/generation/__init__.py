"""Text from the average of posterior draws, and what the draws do not agree on in it."""

from pyro_blora.generation.generate import Generation, generate

__all__ = ["Generation", "generate"]
