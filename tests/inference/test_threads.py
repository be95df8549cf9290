"""Threads of a server ask two adapters, and get what one thread alone gets."""

from concurrent.futures import ThreadPoolExecutor

import tiny
import torch
from pyro.infer import Predictive

from pyro_blora.likelihoods import CausalLM, SequenceClassification

TEXT = {key: value for key, value in tiny.texts().items() if key != "labels"}
CLASSES = tiny.sequences()
INPUTS = {key: value for key, value in CLASSES.items() if key != "labels"}


def adapters():
    """Of text, and of classes by a head that is trained."""
    torch.manual_seed(0)
    text = tiny.adapted(likelihood=CausalLM(num_data=10))
    options = {"target_modules": None, "likelihood": SequenceClassification(num_data=10)}
    return [tiny.shaken(a, 0.2) for a in (text, tiny.adapted(tiny.bert(), **options))]


def under_the_mean(blora):
    with blora.posterior() as net:
        return net(**INPUTS).logits


def questions(text, classes):
    """What is drawn is given, so that each answer is one number for number."""
    torch.manual_seed(1)
    drawn = {a: Predictive(a.guide, num_samples=3)(CLASSES) for a in (text, classes)}
    made = {"max_new_tokens": 2, "do_sample": False, "num_samples": 0}
    return [
        lambda: classes.predict(CLASSES, samples=drawn[classes]).samples,
        lambda: classes.log_predictive(CLASSES, 0),
        lambda: classes(**INPUTS).logits,
        lambda: under_the_mean(classes),
        lambda: text.log_predictive(tiny.texts(), samples=drawn[text]),
        lambda: text.generate(**TEXT, **made).log_probs.nan_to_num(),
        lambda: text.kl(),
    ]


def test_eight_threads_get_what_one_gets_and_leave_the_network_as_it_was():
    both = adapters()
    before = [{n: t.clone() for n, t in a.net.state_dict().items()} for a in both]
    ask = questions(*both)
    expected = [question() for question in ask]
    asked = [k % len(ask) for k in range(64)]
    pairs = list(zip(both, (tiny.texts(), CLASSES), strict=True))
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask[k]) for k in asked]
        drawn = [pool.submit(a.log_predictive, row, 2) for a, row in pairs * 8]
        found = [future.result() for future in waiting]
        assert all(future.result().isfinite().all() for future in drawn)
    for k, answer in zip(asked, found, strict=True):
        assert torch.equal(answer, expected[k]), k
    for blora, state in zip(both, before, strict=True):
        net = blora.unwrap()
        assert tiny.equal(net.state_dict(), state)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert not [name for name in vars(net) if "blora" in name]


def test_a_training_is_as_alone_while_others_ask():
    def trained(others):
        text, classes = adapters()
        torch.manual_seed(2)
        with ThreadPoolExecutor(4) as pool:
            training = pool.submit(tiny.train, classes)
            asked = [pool.submit(text.log_predictive, tiny.texts(), 3) for _ in range(others)]
            losses = [figures["loss"] for figures in training.result().history]
            assert all(future.result().isfinite().all() for future in asked)
        return losses

    assert trained(12) == trained(0)
