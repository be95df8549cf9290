"""Batches: collated from examples, moved to a device, repeated, and streamed without end."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import RandomSampler, WeightedRandomSampler
from typing_extensions import Self

from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.items import Item
from pyro_blora.labels import without_subsets
from pyro_blora.likelihoods import Batch, Collate

# which draw from the whole data set in the course of the epochs, however few in each
_OF_ALL = (RandomSampler, WeightedRandomSampler, DistributedSampler)
# not the label, because the length of its text would sort examples by class
_TEXTS = ("text", "text_pair", "prompt", "completion", "question")


def repeat_batch(batch: Batch, times: int) -> dict[str, Any]:
    """The batch repeated ``times`` times, so that each particle or draw sees all its examples."""
    return {
        key: value.repeat(times, *(1,) * (value.dim() - 1)) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch on ``device``, with its lists and arrays of numbers as tensors."""
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"A batch must be a mapping of tensors by name, got a {type(batch).__name__}; make one "
            "from examples with a collator, such as task.collator(tokenizer)(items)."
        )
    return {key: _on_device(value, device) for key, value in batch.items()}


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | np.ndarray):
        arrays = isinstance(value, list) and any(isinstance(row, np.ndarray) for row in value)
        with suppress(TypeError, ValueError, RuntimeError):  # of texts or ragged rows
            value = torch.tensor(np.asarray(value) if arrays else value)
    return value.to(device) if isinstance(value, Tensor) else value


def collator(data: Sequence[Any] | DataLoader[Any], collate: Collate | None) -> Collate:
    """The function that collates examples: as passed, or torch's if it can do so."""
    if collate or isinstance(data, DataLoader):
        return collate or default_collate
    if len(data) and not isinstance(data[0], Mapping):
        raise ConfigurationError(
            f"An example is a {type(data[0]).__name__}: pass collate=, which makes a batch from a "
            "list of examples, such as task.collator(tokenizer)."
        )
    return default_collate


def size_of(data: Any) -> int | None:
    """The number of examples that training reads from data or a ``DataLoader``, if it is known."""
    if not isinstance(data, DataLoader):
        return len(data) if hasattr(data, "__len__") else None
    whole = size_of(data.dataset)
    if whole is None or (data.batch_size is None and data.batch_sampler is None):
        return None  # the data set makes the batches
    sampler: Any = getattr(data.batch_sampler, "sampler", data.sampler)
    if isinstance(sampler, _OF_ALL) or not hasattr(sampler, "__len__"):
        return whole
    return min(whole, len(sampler))


def lengths_of(data: Any) -> list[int]:
    """The examples' lengths, for batches of similar ones; all 0 if the data set reads lazily."""
    whole = without_subsets(data)
    kind = getattr(whole, "format", {}).get("type") if hasattr(whole, "features") else "custom"
    is_read = isinstance(whole, list | tuple) or kind != "custom"  # of `datasets`, untransformed
    return [_length(row) for row in data] if is_read else [0] * len(data)


def _length(row: Any) -> int:
    if isinstance(row, Item):
        return len(row.question) + sum(map(len, row.choices))
    if not isinstance(row, Mapping):
        return 0
    if "input_ids" in row:
        ids = row["input_ids"]  # of one row, or of each option
        nested = len(ids) > 0 and (isinstance(ids[0], list) or getattr(ids[0], "ndim", 0) > 0)
        return max(map(len, ids)) if nested else len(ids)
    texts = [row[key] for key in _TEXTS if isinstance(row.get(key), str)]
    choices = row.get("choices")
    return sum(map(len, [*texts, *(choices if isinstance(choices, list | tuple) else ())]))


def batches_of(
    data: Any, collate: Collate | None, size: int, order: Sequence[int] | None = None
) -> Iterator[Batch]:
    """The examples in an order, by default of their lengths, or a ``DataLoader``'s batches."""
    if isinstance(data, DataLoader):
        batches: Any = data
    else:
        made = collator(data, collate)
        if order is None:
            order = sorted(range(len(data)), key=lengths_of(data).__getitem__)
        starts = range(0, len(order), size)
        batches = (made([data[i] for i in order[s : s + size]]) for s in starts)
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise BatchError("The data set is empty; check the file, the split or the DataLoader.")


@dataclass
class _Bucketed:
    """Batches of similar lengths: shuffled, sorted within windows of eight batches, reshuffled.

    The incomplete batch, whose examples weigh more, is cut off before the sorting, so that it does
    not always hold the longest examples.
    """

    lengths: list[int]
    size: int
    random: random.Random

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        self.random.shuffle(order)
        whole = len(order) - len(order) % self.size
        cut = [order[whole:]] if order[whole:] else []
        for start in range(0, whole, 8 * self.size):
            near = order[start : min(start + 8 * self.size, whole)]
            near.sort(key=self.lengths.__getitem__)
            cut += [near[i : i + self.size] for i in range(0, len(near), self.size)]
        self.random.shuffle(cut)
        return iter(cut)


class Batches:
    """Endless batches, in a new order each epoch."""

    def __init__(
        self,
        data: Sequence[Any] | DataLoader[Any],
        collate: Collate | None = None,
        *,
        batch_size: int = 8,
        seed: int | None = 0,
    ) -> None:
        if isinstance(data, DataLoader):
            self._loader = data
        else:
            made = collator(data, collate)
            order = _Bucketed(lengths_of(data), batch_size, random.Random(seed))
            places: Any = range(len(data))
            self._loader = DataLoader(
                places, batch_sampler=order, collate_fn=lambda at: made([data[i] for i in at])
            )
        self._epoch: Iterator[Any] = iter(())
        self._held: list[Batch] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self._held.pop() if self._held else self._drawn()

    def peek(self) -> Batch:
        """The next batch, without taking it."""
        self._held = self._held or [self._drawn()]
        return self._held[0]

    def _drawn(self) -> Batch:
        drawn: Batch | None = next(self._epoch, None)
        if drawn is None:
            self._epoch = iter(self._loader)
            drawn = next(self._epoch, None)
        if drawn is None:
            raise BatchError(
                "The training set is empty; check the DataLoader, the file or the split."
            )
        return drawn
