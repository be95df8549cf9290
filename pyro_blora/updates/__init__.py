"""The low-rank update that a prior returns, its Kronecker algebra and its conditional noise."""
