"""Exchangeable densities of a whitened core, by name or as a function of the shape."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.models._update_model import UpdateModel

# A name in CORES, or shape -> distribution of batch shape () and that event shape
Core = str | Callable[[tuple[int, ...]], TorchDistribution]

_SLAB = 2.0  # standard deviation of the entries that the horseshoe leaves alone


def _normal(model: UpdateModel, shape: tuple[int, ...]) -> Tensor:
    return _draw(model, "V", shape, lambda one: dist.Normal(0 * one, 1.0))


def _horseshoe(model: UpdateModel, shape: tuple[int, ...]) -> Tensor:
    tau = _draw(model, "tau", (), dist.HalfCauchy)[..., None, None]
    width = tau * _draw(model, "local", shape, dist.HalfCauchy)
    return _normal(model, shape) * _SLAB * width / (_SLAB**2 + width.square()).sqrt()


def _ard(model: UpdateModel, shape: tuple[int, ...]) -> Tensor:
    columns = _draw(model, "columns", shape[-1:], dist.HalfCauchy)
    return _normal(model, shape) * columns.unsqueeze(-2)


def _draw(
    model: UpdateModel,
    name: str,
    shape: tuple[int, ...],
    law: Callable[[Tensor], TorchDistribution],  # of entries of scale one, from a tensor of ones
) -> Tensor:
    fn = law(torch.ones(shape, device=model.group.device))
    return pyro.sample(model.site(name), fn.to_event(len(shape)))


CORES: dict[str, Callable[[UpdateModel, tuple[int, ...]], Tensor]] = {
    "normal": _normal,
    "horseshoe": _horseshoe,
    "ard": _ard,
}


def check_core(core: Core) -> None:
    """A core is a name in ``CORES``, or a function."""
    if not callable(core) and core not in CORES:
        raise ConfigurationError(
            f"core={core!r} is unknown; {near_miss(core, CORES)}. Or give a function shape -> "
            "distribution."
        )


def sample_core(model: UpdateModel, core: Core, shape: tuple[int, ...]) -> Tensor:
    r"""Samples a core of shape ``(m_r, m_c)`` for each layer of ``model``, inside of its plate.

    * ``"normal"``: standard normal entries;
    * ``"horseshoe"``: the regularized horseshoe (Piironen, Vehtari 2017, arXiv:1707.01694), slab 2,
      with half-Cauchy sites ``tau`` for each layer and ``local`` for each entry;
    * ``"ard"``: a half-Cauchy scale for each column, site ``columns``, so that the posterior
      shrinks the columns it can do without.

    The last two learn the rank (see :func:`~pyro_blora.effective_ranks`) between fixed directions,
    as ``SpectralInducing`` has them; no density keeps learned directions from fitting noise.
    """
    if isinstance(core, str):
        return CORES[core](model, shape)
    return pyro.sample(model.site("V"), core(shape))
