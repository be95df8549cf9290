"""Multiple-choice batches written out token by token."""

import torch


def batch_of(items):
    """A right-padded batch of ``(question, options, label)``; an option of None is absent."""
    rows = [[(question, option) for option in options] for question, options, _ in items]
    length = max(len(q) + len(o or ()) for row in rows for q, o in row)
    shape = (len(rows), len(rows[0]), length)
    ids, real, scored = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        for k, (question, option) in enumerate(row):
            if option is None:
                continue
            tokens = [*question, *option]
            ids[i, k, : len(tokens)] = torch.tensor(tokens)
            real[i, k, : len(tokens)] = 1
            scored[i, k, len(question) : len(tokens)] = 1
    labels = torch.tensor([label for _, _, label in items])
    return {
        "input_ids": ids,
        "attention_mask": real,
        "option_mask": scored.bool(),
        "labels": labels,
    }


Q, LONG = (3, 9, 4), (8, 3, 9, 11, 4, 27)

BATCHES = {
    "differing lengths": [
        (Q, [(5, 6, 7, 8), (9,), (10, 11)], 0),
        (LONG, [(12,), (13, 14, 15), (16, 17)], 1),
    ],
    "one token each": [(Q, [(5,), (6,), (7,)], 2), (LONG, [(8,), (9,), (10,)], 0)],
    "equal first tokens": [
        (Q, [(5, 6, 7), (5, 6, 8), (5, 6)], 1),
        (LONG, [(9, 10), (9, 11), (9, 10, 12)], 2),
    ],
    "an option that begins another": [(Q, [(5,), (5, 6), (5, 6, 7)], 0)],
    "equal options": [(Q, [(5, 6), (5, 6), (7,)], 0)],
    "absent options": [
        (Q, [(5, 6), None, (7,)], 0),
        (LONG, [None, (8,), (9, 10)], 1),  # the first, from which the others are told apart
        (Q, [(11,), (12,), None], 1),
    ],
    "one option left": [(Q, [None, (5, 6), None], 1), (LONG, [(8,), None, None], 0)],
    "a question of one token": [((4,), [(5, 6), (7,)], 1), ((9,), [(5,), (5, 8)], 0)],
}


def premises():
    """Options that each have a premise of their own, and one with a real but unscored text."""
    batch = batch_of([(Q, [(5, 6), (7, 8, 9), (10,)], 0)])
    batch["input_ids"][0, 1, 0] = 20  # differs at the first token
    batch["option_mask"][0, 2] = False
    return batch
