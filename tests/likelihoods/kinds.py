"""Rows, a network and an adapter for each likelihood of a head but that of one class."""

from functools import partial

import tiny
from own_tokenizer import build_tokenizer
from pyro.distributions import Poisson

from pyro_blora import BayesianLoRA
from pyro_blora.likelihoods import Likelihood, NumberCollator, Ordinal, Preference
from pyro_blora.likelihoods.reading import head_logits

NAMES = ("warm", "cold", "wet")  # not sorted
SETS = [[name for k, name in enumerate(NAMES) if n >> k & 1] for n in range(48)]
STARS = ("bad", "fair", "good", "great")
GOOD, BAD = "a warm and funny film", "a dull and endless film"
TAGS = ("B-key", "I-key", "O")
WORDS = ["a", "warm", "film", "Question:", "\u200b", "unhearable", ""]
PARTS = [range(k % 3, k % 3 + 1 + (5 * k) % 4) for k in range(24)]
ROWS = {
    "labels": [{"text": f"{' and '.join(s)} {n}", "label": s} for n, s in enumerate(SETS)],
    "order": [{"text": f"film {k} was {STARS[k % 4]}", "label": k % 4} for k in range(40)],
    "pairs": [
        {"prompt": f"film {k}: ", "chosen": GOOD, "rejected": f"{BAD} {k}"} for k in range(40)
    ],
    "tags": [{"tokens": [WORDS[w] for w in p], "tags": [TAGS[w % 3] for w in p]} for p in PARTS],
    "numbers": [
        {"text": f"it was {STARS[k % 4]} and {k % 3}", "label": 100 + 7.5 * (k % 4)}
        for k in range(48)
    ],
}
TOKENIZER = build_tokenizer(
    [*NAMES, GOOD, BAD, *(row["text"] for row in ROWS["order"] + ROWS["numbers"])],
    bos="<s>",
    eos="</s>",
    pad="<pad>",
)
_SIZES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 64}
NETS = dict.fromkeys(ROWS, partial(tiny.bert, num_labels=1, **_SIZES))
NETS["labels"] = partial(tiny.bert, problem_type="multi_label_classification", **_SIZES)
NETS["tags"] = partial(tiny.bert, task="TokenClassification", **_SIZES)
PASSED = {"order": partial(Ordinal, num_classes=4), "pairs": Preference}  # likelihoods
FEW = {"num_steps": 4, "progress": False}


def adapter(kind, *, net=None, **options):
    """An adapter on a new network of a kind, or on another one."""
    usual = {"likelihood": PASSED.get(kind, lambda: None)(), "tokenizer": TOKENIZER}
    return BayesianLoRA(net or NETS[kind](), **{**usual, **options})


def outputs(net, rows):
    """What a network gives for the texts of rows."""
    return net(**NumberCollator(TOKENIZER)([{"text": row["text"]} for row in rows])).logits


class Rates(Likelihood):
    """Counts, for which nobody has said what a temperature does."""

    new_head = True
    usual_collator = NumberCollator

    def logits(self, net, batch):
        return head_logits(net, batch).squeeze(-1)

    def distribution(self, logits, labels):
        return Poisson(logits.exp())

    def check_labels(self, labels, logits):
        """Any label will do."""
