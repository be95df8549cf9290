"""The order of the data: batches without end, from a place that can be told and found again."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate
from typing_extensions import Self

from pyro_blora.errors import BatchError
from pyro_blora.inference.loop import Collate, LoopOptions
from pyro_blora.likelihoods import Batch

__all__ = ["Batches"]


@dataclass
class _Bucketed:
    """Batches of like lengths: shuffled, sorted within windows of a few batches, shuffled again.

    The incomplete batch, each of whose examples weighs more, is no window's longest rows but a
    random few of all, so that in expectation every example counts once.
    """

    lengths: list[int]
    size: int
    random: random.Random
    skipped: int = 0  # batches to leave out of the next epoch

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
        batches, self.skipped = cut[self.skipped :], 0
        return iter(batches)


class Batches:
    """Batches without end, each epoch in a new order, no example dropped.

    Args:
        data: examples, or a ``DataLoader``, which is taken as it is.
        collate: makes a batch of a list of examples. Default: torch's.
        options: batch size and seed.
        length: the length of an example; batches are then made of like lengths.

    Raises:
        BatchError: the data set is empty; at the first batch.
    """

    def __init__(
        self,
        data: Sequence[Any] | DataLoader[Any],
        collate: Collate | None,
        options: LoopOptions,
        length: Callable[[Any], int] | None = None,
    ) -> None:
        self._order: _Bucketed | None = None
        if isinstance(data, DataLoader):
            self._loader, sampler = data, getattr(data, "sampler", None)
            self._generator = data.generator or getattr(sampler, "generator", None)
        else:
            lengths = [0] * len(data) if length is None else [length(x) for x in data]
            order = random.Random(options.seed)
            self._order = _Bucketed(lengths, options.batch_size, order)

            def made(indices: list[int]) -> Batch:
                return (collate or default_collate)([data[i] for i in indices])

            places: Any = range(len(data))
            self._loader = DataLoader(places, batch_sampler=self._order, collate_fn=made)
            self._generator = None
        self._epoch: Iterator[Any] = iter(())
        self._begun: dict[str, Any] = {}
        self._taken = 0
        self._held: list[Batch] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        found = self._held.pop() if self._held else self._drawn()
        self._taken += 1
        return found

    def peek(self) -> Batch:
        """The batch that comes next, which still comes next."""
        self._held = self._held or [self._drawn()]
        return self._held[0]

    def place(self) -> dict[str, Any]:
        """Where this is: the random numbers when the epoch began, and the batches taken since."""
        return {**self._begun, "taken": self._taken}

    def go_to(self, place: dict[str, Any]) -> None:
        """Goes to a place that :meth:`place` told. Torch's global generator is used up to there.

        A ``DataLoader`` reads its batches up to there once more.
        """
        torch.set_rng_state(place["torch"])
        taken = int(place["taken"])
        if self._generator is not None:
            self._generator.set_state(place["generator"])
        if self._order is not None:
            version, numbers, spare = place["order"]
            self._order.random.setstate((version, tuple(numbers), spare))
            self._order.skipped = taken
        self._begin()
        self._held, self._taken = [], taken
        for _ in islice(self._epoch, taken if self._order is None else 0):
            pass

    def _drawn(self) -> Batch:
        drawn: Batch | None = next(self._epoch, None)
        if drawn is None:
            self._begin()
            drawn = next(self._epoch, None)
        if drawn is None:
            raise BatchError(
                "The training set is empty; check the DataLoader, the file, the split or max_train."
            )
        return drawn

    def _begin(self) -> None:
        self._begun, self._taken = {"torch": torch.get_rng_state()}, 0
        if self._generator is not None:
            self._begun["generator"] = self._generator.get_state()
        if self._order is not None:
            self._begun["order"] = self._order.random.getstate()
        self._epoch = iter(self._loader)
