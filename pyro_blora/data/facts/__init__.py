"""The embedded commonsense set ``facts``: hand-written facts as questions, a file a split."""

from difflib import get_close_matches
from functools import cache
from importlib.resources import as_file, files

from pyro_blora.data.items import DataError, Item
from pyro_blora.data.json_lines import read_json_lines

__all__ = ["SPLITS", "facts_items"]

SPLITS = ("train", "validation", "test")


def facts_items(split: str) -> list[Item]:
    """Return one split of the embedded commonsense set.

    Short English questions about sizes, materials, uses, animals, places, time, causes and more,
    with four choices of which exactly one is right. No fact of a relation is in two splits, right
    labels are balanced, and about half of the test items use a wording that no other split has. An
    id such as ``"facts-test-0042-uses.2"`` names the relation and the number of its wording.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        The items, in a fixed mixed order.

    Raises:
        DataError: there is no such split.

    Example::

        >>> item = facts_items("test")[0]
        >>> len(item.choices), item.id[:15]
        (4, 'facts-test-0000')
    """
    if split not in SPLITS:
        near = get_close_matches(split, SPLITS, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SPLITS)}"
        raise DataError(f"the set facts has no split {split!r}; {fix}")
    return list(_items(split))


@cache
def _items(split: str) -> tuple[Item, ...]:
    with as_file(files(__package__).joinpath(f"{split}.jsonl")) as path:
        return tuple(read_json_lines(path))
