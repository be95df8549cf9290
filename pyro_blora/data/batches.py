"""Batches: collated from examples, of similar lengths, and streamed without end."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import RandomSampler, WeightedRandomSampler
from tqdm.auto import tqdm

from pyro_blora.data.tables import check_sized
from pyro_blora.errors import BatchError, ConfigurationError, check_count
from pyro_blora.labels import Item, parts_of
from pyro_blora.likelihoods import Batch, Collate
from pyro_blora.network.pretrained import choose_precision, usual_device
from pyro_blora.posterior.bayesian_lora_model import to_device
from pyro_blora.prediction import Prediction

T = TypeVar("T")
# which draw from the whole data set in the course of the epochs, however few in each
_OF_ALL = (RandomSampler, WeightedRandomSampler, DistributedSampler)
# not the label, because the length of its text would sort examples by class
_TEXTS = ("text", "text_pair", "prompt", "completion", "question", "chosen", "rejected")


def collator(data: Sequence[Any] | DataLoader[Any], collate: Collate | None) -> Collate:
    """The function that collates examples: as passed, or torch's if it can do so."""
    if not isinstance(data, DataLoader):
        check_sized(data)
    if collate or isinstance(data, DataLoader):
        return collate or default_collate
    if len(data) and not isinstance(data[0], Mapping):
        raise ConfigurationError(
            f"Examples of type {type(data[0]).__name__} need collate=, which makes a batch of them."
        )
    return default_collate


def size_of(data: Any) -> int | None:
    """The number of examples that training reads from data or a ``DataLoader``, if it is known."""
    if not isinstance(data, DataLoader):
        with suppress(TypeError):  # as of a chain of streams
            return len(data)
        return None
    whole = size_of(data.dataset)
    if whole is None or (data.batch_size is None and data.batch_sampler is None):
        return None  # the data set makes the batches
    batches = data.batch_sampler
    sampler: Any = data.sampler if batches is None else getattr(batches, "sampler", None)
    if isinstance(sampler, _OF_ALL):
        return whole
    return min(whole, len(sampler)) if hasattr(sampler, "__len__") else None


def lengths_of(data: Any) -> list[int]:
    """The examples' lengths, for batches of similar ones; all 0 if the data set reads lazily."""
    is_read = all(map(_is_read, parts_of(data)))
    return [_length(row) for row in data] if is_read else [0] * len(data)


def _is_read(whole: Any) -> bool:
    kind = getattr(whole, "format", {}).get("type") if hasattr(whole, "features") else "custom"
    return isinstance(whole, list | tuple) or kind != "custom"  # of `datasets`, untransformed


def by_length(data: Any) -> list[int]:
    """The places of the examples in the order of their lengths."""
    return sorted(range(len(data)), key=lengths_of(data).__getitem__)


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
    for lists in (row.get("choices"), row.get("tokens")):
        texts += lists if isinstance(lists, list | tuple) else ()
    return sum(map(len, texts))


def batches_of(
    data: Any, collate: Collate | None, size: int, order: Sequence[int] | None = None
) -> Iterator[Batch]:
    """The examples in an order, by default of their lengths, or a ``DataLoader``'s batches."""
    if isinstance(data, DataLoader):
        batches: Any = data
    else:
        to_batch = collator(data, collate)
        order = by_length(data) if order is None else order
        starts = range(0, len(order), size)
        batches = (to_batch([data[i] for i in order[s : s + size]]) for s in starts)
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise BatchError("The data set is empty; check the file, the split or the DataLoader.")


def shown(description: str, batches: Any, progress: bool | None, total: int | None = None) -> Any:
    """The batches with a progress bar, by default on a terminal."""
    hide = None if progress is None else not progress
    return tqdm(batches, desc=description, total=total, disable=hide, unit="batch")


@dataclass
class _Bucketed:
    """Batches of similar lengths: shuffled, sorted within windows of eight batches, reshuffled."""

    lengths: list[int]
    size: int
    random: random.Random

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        self.random.shuffle(order)
        # cut off before the sorting, so that the incomplete batch does not hold the longest ones
        whole = len(order) - len(order) % self.size
        cut = [order[whole:]] if order[whole:] else []
        for start in range(0, whole, 8 * self.size):
            near = order[start : min(start + 8 * self.size, whole)]
            near.sort(key=self.lengths.__getitem__)
            cut += [near[i : i + self.size] for i in range(0, len(near), self.size)]
        self.random.shuffle(cut)
        return iter(cut)


def endless_batches(
    data: Sequence[Any] | DataLoader[Any],
    collate: Collate | None,
    *,
    batch_size: int,
    seed: int | None,
) -> Iterator[Batch]:
    """Batches without end, in a new order each epoch."""
    if isinstance(data, DataLoader):
        loader = data
    else:
        to_batch = collator(data, collate)
        order = _Bucketed(lengths_of(data), batch_size, random.Random(seed))
        places: Any = range(len(data))
        loader = DataLoader(
            places, batch_sampler=order, collate_fn=lambda at: to_batch([data[i] for i in at])
        )
    epochs = (batches_of(loader, None, batch_size) for _ in itertools.count())
    return itertools.chain.from_iterable(epochs)


def predict_dataset(
    predict: Callable[[Batch], Prediction],
    data: Any,
    collate: Collate | None = None,
    *,
    device: torch.device | str | None = None,
    labels_of: Callable[[Batch], Tensor | None] | None = None,
    **options: Any,
) -> tuple[Prediction, Tensor | None]:
    """The predictive distribution of every example, none dropped, in the order of ``data``.

    Args:
        predict: the prediction of one batch, such as ``blora.predict``.
        data: the examples, or a ``DataLoader``, whose order is kept.
        collate: makes a batch from a list of examples; torch's by default.
        device: the device of the network. Default: the adapter's, if ``predict`` is a method of
            one; otherwise the accelerator if there is one, or the CPU.
        labels_of: the labels of a batch. Default: its ``labels``.
        options: ``batch_size``, by default 16; ``precision`` as in ``fit``; ``progress``, by
            default on a terminal, and its ``description``.

    Returns:
        The prediction, such as ``S x N x K``, and the labels, ``N``, or ``None`` if the examples
        have none. If examples differ in their number of labels, -100 stands for the missing ones.
    """
    usual: Any = usual_device()
    adapter = getattr(predict, "__self__", None)
    predictions, labels, back = over_dataset(
        lambda batch: (predict(batch), labels_of(batch) if labels_of else batch.get("labels")),
        data,
        collate,
        torch.device(device or getattr(adapter, "device", usual)),
        **options,
    )
    whole = Prediction.cat(predictions)
    return replace(whole, samples=in_order(whole.samples.cpu(), back, 1)), labels


def over_dataset(
    of_batch: Callable[[Batch], tuple[T, Tensor | None]],
    data: Any,
    collate: Collate | None,
    device: torch.device,
    *,
    batch_size: int = 16,
    precision: str = "auto",
    progress: bool | None = None,
    description: str = "predict",
) -> tuple[list[T], Tensor | None, Tensor | None]:
    """Results of ``of_batch`` by batch, its tensors in the data's order, and the index for that."""
    check_count("batch_size", batch_size)
    autocast = choose_precision(precision, device) == "bfloat16"
    order, total, back = None, None, None
    if not isinstance(data, DataLoader):
        check_sized(data)
        order = by_length(data)
        total, back = -(-len(order) // batch_size), torch.tensor(order).argsort()
    elif size_of(data):
        total = len(data)
    results, tensors = list[T](), list[Tensor]()
    batches = batches_of(data, collate, batch_size, order)
    for batch in shown(description, batches, progress, total):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            result, tensor = of_batch(to_device(batch, device))
        results.append(result)
        tensors += [] if tensor is None else [tensor.cpu()]
    if 0 < len(tensors) < len(results):
        raise BatchError("All batches must have labels, or none, got both; add the missing ones.")
    widths = {tensor.shape[1] for tensor in tensors if tensor.dim() == 2}
    if len(widths) > 1:
        tensors = [pad(each, (0, max(widths) - each.shape[1]), value=-100) for each in tensors]
    return results, in_order(torch.cat(tensors), back) if tensors else None, back


def in_order(values: Tensor, back: Tensor | None, dim: int = 0) -> Tensor:
    """Values of all examples in the order of the data, by the index of :func:`over_dataset`."""
    if back is None:  # the order of a loader
        return values
    if values.shape[dim] != len(back):
        raise BatchError(
            f"collate= must make one row of each example, got {values.shape[dim]} of {len(back)}; "
            "pass a DataLoader, whose rows are kept as they are."
        )
    return values.index_select(dim, back)
