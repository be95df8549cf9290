"""What follows training for the guides that find their width afterwards."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.guides.isotropic import Isotropic
from pyro_blora.guides.laplace import Laplace
from pyro_blora.inference.curvature import fit_laplace
from pyro_blora.inference.loop import Collate
from pyro_blora.inference.widest import fit_isotropic
from pyro_blora.likelihoods import Batch
from pyro_blora.network.modes import in_mode
from pyro_blora.network.precision import choose_precision
from pyro_blora.posterior.bayesian_lora_model import to_device
from pyro_blora.posterior.structured_guide import StructuredGuide

__all__ = ["finish", "is_post_hoc"]


def is_post_hoc(guide: object) -> bool:
    """Whether the guide finds its width after training (``Laplace``, ``Isotropic``)."""
    if not isinstance(guide, StructuredGuide):
        return False
    return any(isinstance(f, Laplace | Isotropic) for f in guide.families().values())


def finish(
    blora: BayesianLoRA,
    data: Sequence[Any] | DataLoader[Any],
    *,
    collate: Collate | None = None,
    length: Callable[[Any], int] | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
) -> dict[str, float]:
    """Gives a post-hoc guide (``Laplace``, ``Isotropic``) its width; ``fit`` calls it at its end.

    Args:
        blora: the trained adapter.
        data: the training set for ``Laplace``, whose curvature is scaled to ``num_data``; the
            anchor set for ``Isotropic``.
            Or a ``DataLoader`` of batches.
        collate: makes a batch of a list of examples.
        length: the length of an example; batches of like lengths waste no padding.
        batch_size: examples at once.
        precision: of the network, as in ``fit``.
        progress: whether to show a progress bar; ``None`` shows it on a terminal.

    Returns:
        For ``Laplace`` the prior precision of each site, for ``Isotropic`` the width.

    Raises:
        ConfigurationError: the guide is not one of these, or ``collate`` is missing.
        BatchError: there is no data.
    """
    if not is_post_hoc(blora.guide):
        raise ConfigurationError(
            f"finish is for the guides Laplace and Isotropic, not for {blora.guide_family[0]!r}."
        )
    if not isinstance(data, DataLoader) and not len(data):
        raise BatchError("There is nothing to finish with: the data set is empty.")
    assert isinstance(blora.guide, StructuredGuide)
    device = blora.model.groups[0].device
    hide = None if progress is None else not progress
    cut = data if isinstance(data, DataLoader) else _cut(data, collate, length, batch_size)

    def batches() -> Iterator[Batch]:
        for batch in tqdm(cut, desc="finish", disable=hide, unit="batch"):
            yield to_device(batch, device)

    was_precision = blora.model.precision
    blora.model.precision = choose_precision(precision, device)
    try:
        with in_mode(blora.net, training=False), pyro.validation_enabled(False):
            if any(isinstance(f, Laplace) for f in blora.guide.families().values()):
                return fit_laplace(blora, batches())
            return {"width": fit_isotropic(blora, list(batches()))}
    finally:
        blora.model.precision = was_precision


def _cut(
    data: Sequence[Any],
    collate: Collate | None,
    length: Callable[[Any], int] | None,
    batch_size: int,
) -> list[Batch]:
    if collate is None:
        raise ConfigurationError("finish needs collate=, which makes batches of examples.")
    ordered = list(data) if length is None else sorted(data, key=length)
    starts = range(0, len(ordered), batch_size)
    return [collate(ordered[start : start + batch_size]) for start in starts]
