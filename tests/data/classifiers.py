"""Tiny classifiers whose classes have names, and rows for them."""

import datasets
import tiny

from pyro_blora import BayesianLoRA, fit

NAMES = ("zero", "half", "all")  # not alphabetical
ROWS = [{"text": f"a film {k}", "label": NAMES[k % 3]} for k in range(12)]
NUMBERS = [{**row, "label": k % 3} for k, row in enumerate(ROWS)]

NEG_POS, POS_NEG = ("neg", "pos"), ("pos", "neg")
IN_ORDER, TURNED = [0, 1] * 6, [1, 0] * 6  # the labels of the forms by these classes


def relabeled(data, names):
    return data.cast_column("label", datasets.ClassLabel(names=list(names)))


def classifier(tokenizer, names=None, num_labels=3):
    """A network, of these classes if there are any."""
    options = {"num_labels": num_labels}
    if names is not None:
        options = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    net = tiny.bert(**options)
    net.resize_token_embeddings(len(tokenizer))
    return net


def adapter(tokenizer, names=None, train=None, *, num_labels=3, collate=None, **options):
    """An adapter of such a network, after one step on the rows if there are any."""
    blora = BayesianLoRA(classifier(tokenizer, names, num_labels), tokenizer=tokenizer, **options)
    if train is not None:
        fit(blora, train, collate=collate, num_steps=1, progress=False)
    return blora


def labels_of(blora, rows, collate=None):
    return blora.predict_dataset(rows, collate, progress=False)[1].tolist()
