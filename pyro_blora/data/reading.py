"""Examples and their collator, from whatever is passed as data."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase, default_data_collator

from pyro_blora.data.tables import check_sized, read_table
from pyro_blora.errors import ConfigurationError
from pyro_blora.labels import Item
from pyro_blora.likelihoods import Likelihood
from pyro_blora.likelihoods._likelihood import Collate
from pyro_blora.likelihoods._prompts import is_from


def reading(
    data: Any,
    collate: Collate | None,
    net: nn.Module,
    likelihood: Likelihood,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    labeled: bool = True,
    training: bool = True,
) -> tuple[Any, Collate | None]:
    """The examples in ``data``, and ``collate`` or the likelihood's function that batches them.

    For transformers' own collators, rows of token ids lose the columns that neither the network
    nor the likelihood takes, as in its ``Trainer``. For the other arguments see
    :meth:`Likelihood.read <pyro_blora.likelihoods.Likelihood.read>`.
    """
    if isinstance(data, DataLoader | IterableDataset):
        rows, batched_by = getattr(data, "dataset", data), getattr(data, "collate_fn", collate)
        likelihood.check_loader(rows, batched_by, net, training=training)
        return data, collate
    rows = read_table(data)
    check_sized(rows)
    if not len(rows):
        return rows, collate
    encoded = isinstance(rows[0], Mapping) and "input_ids" in rows[0]
    if collate is None:
        collate = _usual(likelihood, tokenizer, rows[0], encoded)
    collate_labels = likelihood.read(rows, collate, net, labeled=labeled, training=training)
    if not encoded or collate_labels is None or not is_from(collate, "transformers."):
        return rows, collate_labels
    known = {*inspect.signature(net.forward).parameters, *likelihood.keys}
    known |= {"labels", "label", "label_ids"}
    return rows, lambda part: collate_labels(
        [{name: row[name] for name in row if name in known} for row in part]
    )


def _usual(
    likelihood: Likelihood, tokenizer: PreTrainedTokenizerBase | None, row: Any, encoded: bool
) -> Collate | None:
    """The collator of rows such as ``row``, or ``None`` for tensors, which torch collates."""
    if encoded:
        one_row_each = tokenizer is not None and likelihood.row_dims == 2
        return likelihood.padding(tokenizer) if one_row_each else default_data_collator
    is_text = isinstance(row, Item) or (
        isinstance(row, Mapping) and any(isinstance(value, str) for value in row.values())
    )
    if isinstance(row, Mapping | Item) and tokenizer is not None:
        return likelihood.collator(tokenizer, row)
    if not is_text:
        return None
    raise ConfigurationError(
        "Rows of text must have a tokenizer, got none; set blora.tokenizer, or pass collate=."
    )
