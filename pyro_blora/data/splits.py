"""Splits by text: repeated texts and twins stay together, also when rows are added or reordered."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pyro_blora.labels import Item, listed

_TEXTS = ("text", "text_pair", "prompt", "completion", "tokens")
_LABELS = ("label", "labels", "id", "idx")  # which do not tell whether two rows are of one text


def keys_of(rows: Any) -> list[str]:
    """For each row, what it shares with the rows that give away its label.

    That is its text, its token ids, its question, or if it has none of these columns all of its
    texts and tensors, unless most rows share them. A few questions with the same choices are twins,
    such as the sentences of a WinoGrande pair. Pairs of texts share their prompt, which may have
    several, and rows of options their question, unless it has more than an eighth of them.
    """
    contents = [_content(rows[k]) for k in range(len(rows))]
    if len(rows) and isinstance(rows[0], Mapping) and "chosen" in rows[0]:
        prompts = Counter(prompt for _, prompt in filter(None, contents))
        for k, each in enumerate(contents):  # a prompt of many would hold out most rows, or none
            if each and 8 * prompts[each[1]] > len(rows):
                contents[k] = (each[0], f"{each[1]}\n{each[0]}")
        return [each[1] if each else f"row {k}" for k, each in enumerate(contents)]
    others = [text for question, text in filter(None, contents) if not question]
    if 2 * len(set(others)) < len(others):  # classes or constants, which do not tell rows apart
        contents = [each if each and each[0] else None for each in contents]
    different = {*filter(None, contents)}
    asked, offered = (Counter(each[part] for each in different) for part in (0, 1))
    keys, few = [], max(2, len(contents) // 20)
    for k, each in enumerate(contents):
        twins = each is not None and len(offered) > 1 and offered[each[1]] <= few
        # classes, which many rows share, are no part of a key: a new one would move all rows
        keys.append(f"row {k}" if each is None else each[1] if twins else each[0] or each[1])
    # not at the top, so that a command's help starts at once
    from scipy.cluster.hierarchy import DisjointSet

    together, of_question = DisjointSet(keys), dict[str, str]()
    for each, key in zip(contents, keys, strict=True):
        if each and each[0] and asked[each[0]] <= max(2, len(contents) // 8):
            together.merge(key, of_question.setdefault(each[0], key))
    names = {key: min(part) for part in together.subsets() for key in part}
    return [names[key] for key in keys]


def _content(row: Any) -> tuple[str, str] | None:
    """A row's question and its choices, or its text twice, or nothing and its other columns."""
    read = vars(row) if isinstance(row, Item) else row if isinstance(row, Mapping) else {}
    if "choices" in read and "question" in read:
        return _plain(read["question"]), str(sorted(map(_plain, read["choices"])))
    if "chosen" in read:
        pair = str(sorted(_plain(read.get(name)) for name in ("chosen", "rejected")))
        prompt = read.get("prompt")  # in a data frame, one that is missing is a NaN
        return pair, (_plain(prompt) if isinstance(prompt, str) else "") or pair
    if "input_ids" in read:
        ids, mask = listed(read["input_ids"]), listed(read.get("attention_mask"))
        seen = [True] * len(ids) if mask is None else mask
        # copies of a text may differ in padding; options, each with a mask of its own, keep theirs
        text = str([listed(part) for part, m in zip(ids, seen, strict=True) if listed(m)])
    elif {"text", "prompt", "tokens"} & set(read):
        texts = [listed(read.get(name)) for name in _TEXTS]  # where None and a NaN are no texts
        text = "\n".join(_plain(each) for each in texts if isinstance(each, str | list | tuple))
    else:
        values = [*row] if isinstance(row, tuple | list) else []
        values += [value for name, value in read.items() if name not in _LABELS]
        parts = [listed(value) for value in values]
        text = "\n".join(_plain(part) for part in parts if isinstance(part, str | list | tuple))
        return ("", text) if text else None
    return (text, text) if text else None


def _plain(text: Any) -> str:
    return " ".join(str(text).split())


def _draw(key: str, salt: str) -> float:
    """A number in [0, 1) that depends on the texts alone."""
    digest = hashlib.blake2b(f"{salt}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def chosen(rows: Any, share: float, salt: str, *, exact: bool = False) -> list[int]:
    """The places of about a share of the rows, by their texts; none if the share is below a row.

    A row stays on its side of the split when others are added, unless the share is ``exact``.
    Different salts make independent choices.
    """
    count = int(share * len(rows))
    if count == 0:
        return []
    draws = [_draw(key, salt) for key in keys_of(rows)]
    limit = max(sorted(draws)[count] if exact else share, min(draws) * (1 + 1e-12))
    places = [k for k, draw in enumerate(draws) if draw < limit]
    return places if len(places) < len(draws) else []


def first(rows: Sequence[Any], count: int | None) -> list[Any]:
    """At most ``count`` of the rows, in their order: a fixed choice, as files may be sorted."""
    if count is None or count >= len(rows):
        return list(rows)
    draws = [_draw(key, "first") for key in keys_of(rows)]
    kept = sorted(range(len(rows)), key=draws.__getitem__)[:count]
    return [rows[k] for k in sorted(kept)]


def hold_out(train: Any, share: float) -> tuple[Any, Any]:
    """Splits examples into those to train on and those to calibrate with, by their texts."""
    held = chosen(train, share, "held out", exact=True) if share else []
    if not held:
        return train, ()
    others = sorted({*range(len(train))} - {*held})
    # a data set of `datasets` keeps its columns, which a Trainer may sort by
    from torch.utils.data import Subset  # not at the top, so that a command starts without torch

    part = getattr(train, "select", None) or partial(Subset, train)
    return part(others), part(held)
