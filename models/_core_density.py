"""Exchangeable densities of a whitened core, by name or as a function of the shape."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_blora.models._update_model import UpdateModel

# A name in CORES, or a function from a shape to a distribution of that event shape
Core = str | Callable[[tuple[int, ...]], TorchDistribution]

CORES = ("normal", "horseshoe", "ard")

_SLAB = 2.0  # standard deviation of an entry that the horseshoe does not shrink


def sample_core(model: UpdateModel, core: Core, shape: tuple[int, ...]) -> Tensor:
    r"""Samples a core of shape ``(m_r, m_c)`` for each layer of ``model``, within its plate.

    * ``"normal"``: standard normal entries;
    * ``"horseshoe"``: the regularized horseshoe (Piironen, Vehtari 2017, arXiv:1707.01694), slab 2,
      with half-Cauchy sites ``tau`` for each layer and ``local`` for each entry;
    * ``"ard"``: a half-Cauchy scale for each column, site ``columns``, so that the posterior
      shrinks columns that the data does not need.

    The last two learn the rank (see :func:`~pyro_blora.effective_ranks`) between fixed directions,
    such as those of ``SpectralInducing``; learned directions can fit noise under any density.
    """

    def half_cauchy(name: str, shape: tuple[int, ...]) -> Tensor:
        law = dist.HalfCauchy(torch.ones(shape, device=model.group.device))
        return pyro.sample(model.site(name), law.to_event(len(shape)))

    def entries() -> Tensor:
        law = core(shape) if callable(core) else model.normal(*shape)
        return pyro.sample(model.site("V"), law)

    if core == "horseshoe":
        width = half_cauchy("tau", ())[..., None, None] * half_cauchy("local", shape)
        return entries() * _SLAB * width / (_SLAB**2 + width.square()).sqrt()
    if core == "ard":
        columns = half_cauchy("columns", shape[-1:])
        return entries() * columns.unsqueeze(-2)
    return entries()
