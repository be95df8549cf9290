"""Rows padded on the left: some networks count positions from the first real token, others not."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_blora.errors import BatchError
from pyro_blora.network import fast_path

__all__ = ["positions_of"]


def positions_of(net: nn.Module, mask: Tensor | None) -> dict[str, Tensor]:
    """The ``position_ids`` that a network wants with rows of which some are padded on the left.

    It is asked, once, by a row that is padded and the same row that is not: whether it gives the
    same logits by itself, as RoBERTa does, or with positions that are counted for it, as GPT-2.

    Args:
        net: the network.
        mask: the rows' attention mask, ``(R, T)``; others have no padding to be seen.

    Returns:
        ``position_ids``, ``(R, T)``, or nothing.

    Raises:
        BatchError: it gives other logits either way (its positions, windows or state are the
            row's own places).
    """
    if mask is None or mask.dim() != 2 or not bool((mask[:, 0] == 0).any()):
        return {}
    ids = fast_path.tokens_for(net, 1)
    if fast_path.is_sharded(net) or ids is None:
        return _counted(mask)  # it cannot be asked
    for given in ({}, _counted(mask)):
        question = partial(_ask, net, ids[:, :5], bool(given))
        if fast_path.holds(net, "", question, "left padding", bool(given)):
            return given
    raise BatchError(
        f"Rows are padded on the left, and {type(net).__name__} gives other logits then than "
        "without padding; set tokenizer.padding_side = 'right'."
    )


def _counted(mask: Tensor) -> dict[str, Tensor]:
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def _ask(net: nn.Module, ids: Tensor, counts: bool) -> bool:
    real = torch.ones_like(ids)
    padded = functional.pad(ids, (3, 0), value=fast_path.padding_of(net))
    mask = functional.pad(real, (3, 0))
    positions = _counted(mask) if counts else {}
    expected = fast_path.logits_of(net, input_ids=ids, attention_mask=real)
    found = fast_path.logits_of(net, input_ids=padded, attention_mask=mask, **positions)
    return fast_path.agree(found, expected)
