"""Items from the Hugging Face hub, by the name of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pyro_blora.data import records
from pyro_blora.data.items import DataError, Item

__all__ = ["hub_splits", "hub_tasks", "read_hub"]

_PARQUET = "refs/convert/parquet"  # the hub's own copy of a set that has a loading script


@dataclass(frozen=True)
class _Source:
    """Where a task is on the hub.

    ``splits`` maps our split names to the hub's; a labelled validation split serves as the test
    split where the hub's own test split has no labels.
    """

    path: str
    convert: Callable[[Mapping[str, Any]], records.Parts]
    configs: tuple[str | None, ...] = (None,)
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )
    revision: str | None = None


_TEST_IS_VALIDATION = {"train": "train", "test": "validation"}
_TEST_ONLY = {"dev": "dev", "test": "test"}


def _winogrande(size: str) -> _Source:
    return _Source(
        "allenai/winogrande", records.winogrande, (f"winogrande_{size}",), _TEST_IS_VALIDATION
    )


def _mmlu(subject: str) -> _Source:
    configs = (f"college_{subject}", f"high_school_{subject}")
    return _Source("cais/mmlu", records.mmlu, configs, _TEST_ONLY)


_SOURCES = {
    "arc_easy": _Source("allenai/ai2_arc", records.arc, ("ARC-Easy",)),
    "arc_challenge": _Source("allenai/ai2_arc", records.arc, ("ARC-Challenge",)),
    "openbookqa": _Source("allenai/openbookqa", records.openbookqa, ("main",)),
    "boolq": _Source("google/boolq", records.boolq, splits=_TEST_IS_VALIDATION),
    "winogrande_xs": _winogrande("xs"),
    "winogrande_s": _winogrande("s"),
    "winogrande_m": _winogrande("m"),
    "piqa": _Source("ybisk/piqa", records.piqa, splits=_TEST_IS_VALIDATION, revision=_PARQUET),
    "social_iqa": _Source(
        "allenai/social_i_qa", records.social_iqa, splits=_TEST_IS_VALIDATION, revision=_PARQUET
    ),
    "mmlu_chemistry": _mmlu("chemistry"),
    "mmlu_physics": _mmlu("physics"),
    "sst2": _Source("stanfordnlp/sst2", records.sst2, splits=_TEST_IS_VALIDATION),
    "ag_news": _Source(
        "fancyzhx/ag_news", records.ag_news, splits={"train": "train", "test": "test"}
    ),
}


def hub_tasks() -> tuple[str, ...]:
    """Return the names that :func:`read_hub` knows, sorted."""
    return tuple(sorted(_SOURCES))


def hub_splits(task: str) -> tuple[str, ...]:
    """Return the splits that a task has on the hub, such as ``("test", "train")``.

    Raises:
        DataError: the task is unknown.
    """
    return tuple(sorted(_source(task).splits))


def read_hub(task: str, split: str) -> list[Item]:
    """Read one split of a public data set from the Hugging Face hub.

    Needs the ``datasets`` package and, at the first call, a network. Where the hub's test split
    has no labels (BoolQ, WinoGrande, PIQA, Social IQa, SST-2), ``"test"`` is the validation split
    and there is no ``"validation"``.

    Args:
        task: one of :func:`hub_tasks`.
        split: one of :func:`hub_splits`.

    Returns:
        The items in the set's order, named ``TASK-SPLIT-NUMBER``.

    Raises:
        DataError: the task or split is unknown, ``datasets`` is missing, the set cannot be fetched,
            or a record does not have the expected form.

    Example::

        items = read_hub("arc_easy", "train")
    """
    source = _source(task)
    if split not in source.splits:
        near = get_close_matches(split, source.splits, n=1)
        fix = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{task} has no split {split!r} on the hub: {fix}choose one of "
            f"{', '.join(sorted(source.splits))}"
        )
    items: list[Item] = []
    for config in source.configs:
        for record in _load(source, config, source.splits[split]):
            name = f"{task}-{split}-{len(items)}"
            try:
                question, choices, label = source.convert(record)
                items.append(Item(name, question, choices, label))
            except (KeyError, TypeError, ValueError) as error:
                problem = f"no key {error}" if isinstance(error, KeyError) else error
                raise DataError(
                    f"record {name} of {source.path} is not as expected ({problem}): "
                    "write the set as JSON lines and pass --data-dir"
                ) from error
    return items


def _source(task: str) -> _Source:
    """Return where a task is."""
    if task not in _SOURCES:
        near = get_close_matches(task, _SOURCES, n=3)
        fix = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(_SOURCES)}"
        raise DataError(
            f"no task {task!r} on the hub; {fix} (own JSON lines are read with --data-dir)"
        )
    return _SOURCES[task]


def _load(source: _Source, config: str | None, split: str) -> Any:
    """Return the records of one configuration."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"reading {source.path} from the hub needs the package datasets: "
            "pip install 'pyro-blora[datasets]', or pass --data-dir with JSON lines"
        ) from None
    try:
        return load_dataset(source.path, config, split=split, revision=source.revision)
    except Exception as error:  # datasets and its transport raise many kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"{source.path} could not be fetched from the hub ({reason[:160]}): "
            "check the network, or pass --data-dir with JSON lines"
        ) from error
