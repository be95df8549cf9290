"""How many directions an update uses."""

import torch
from torch import Tensor

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.updates.low_rank_update import LowRankUpdate


def effective_rank(update: LowRankUpdate) -> Tensor:
    r"""The effective rank of each layer's update.

    .. math::

        \exp H(p), \qquad p_i = s_i^2 / \textstyle\sum_j s_j^2,

    with the singular values :math:`s` of :math:`\Delta W` and the entropy :math:`H` in nats: ``k``
    for ``k`` equal singular values, and 0 for no update.

    Args:
        update: of ``n`` layers.

    Returns:
        ``(..., n)``.

    Reference:
        Roy, Vetterli 2007, "The effective rank: a measure of effective dimensionality".

    Example::

        >>> A, B = torch.eye(3, 5)[None], torch.eye(4, 3)[None]
        >>> effective_rank(LowRankUpdate(A=A, B=B)).round()
        tensor([3.])
    """
    B = update.B if update.core is None else update.B @ update.core
    # the singular values of B A are those of the product of the triangular factors of both
    R_b, R_a = torch.linalg.qr(B).R, torch.linalg.qr(update.A.mT).R
    square = torch.linalg.svdvals(R_b @ R_a.mT).square()
    total = square.sum(-1, keepdim=True)
    p = square / total.clamp_min(torch.finfo(square.dtype).tiny)
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total.squeeze(-1) > 0, rank, torch.zeros_like(rank))


@torch.no_grad()
def effective_ranks(blora: BayesianLoRA) -> dict[str, float]:
    """The effective rank of every adapted layer's posterior mean, by the layer's full name.

    Args:
        blora: the adapter.
    """
    updates = blora.sample_updates(0)
    return {
        name: float(rank)
        for group in blora.model.groups
        for name, rank in zip(group.module_names, effective_rank(updates[group.name]), strict=True)
    }
