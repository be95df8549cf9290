"""Which items of a pool are worth a label: the acquisition of active learning."""

import torch
from torch import Tensor

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.posterior.prediction import Prediction

__all__ = ["CRITERIA", "rank"]

CRITERIA = ("mutual_information", "entropy", "random")


def rank(prediction: Prediction, by: str = "mutual_information", *, seed: int = 0) -> Tensor:
    r"""The items of a pool, the one most worth a label first.

    BALD asks for the label that tells most of the weights,

    .. math::

        \arg\max_i\, I[y_i; U] = H\Bigl[\tfrac1S \textstyle\sum_s p_{si}\Bigr]
        - \tfrac1S \textstyle\sum_s H[p_{si}],

    where entropy also asks for items that are ambiguous whatever the weights are.

    Args:
        prediction: of the pool, ``S x N x K``.
        by: ``"mutual_information"`` (BALD), ``"entropy"`` or ``"random"``.
        seed: of the random order.

    Returns:
        Indices of the items, ``(N,)``; of equal ones the earlier comes first.

    Raises:
        ConfigurationError: there is no such criterion, or a single draw, which has no mutual
            information.

    Reference:
        N. Houlsby et al. (2011), "Bayesian Active Learning for Classification and Preference
        Learning", arXiv:1112.5745.

    Example::

        >>> sure, torn, open_ = [[0.9, 0.1]] * 2, [[0.9, 0.1], [0.1, 0.9]], [[0.5, 0.5]] * 2
        >>> pool = Prediction(torch.tensor([sure, torn, open_]).transpose(0, 1))
        >>> rank(pool).tolist()  # the one on which the draws disagree
        [1, 0, 2]
        >>> rank(pool, "entropy").tolist()
        [1, 2, 0]
    """
    if by not in CRITERIA:
        raise ConfigurationError(f"There is no criterion {by!r}; {near_miss(by, CRITERIA)}.")
    if by == "random":
        return torch.randperm(len(prediction), generator=torch.Generator().manual_seed(seed))
    if by == "mutual_information" and prediction.num_samples < 2:
        raise ConfigurationError(
            "A single draw has no mutual information to rank by; predict with num_samples=2 or "
            "more, or rank by 'entropy'."
        )
    scores: Tensor = getattr(prediction, by)
    return scores.argsort(descending=True, stable=True)
