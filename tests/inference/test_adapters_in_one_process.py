"""Each adapter is its own, whatever other adapters there are, were, and have answered."""

import copy
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pyro
import pytest
import tiny
import torch
from own_classes import Sloped
from pyro.infer import SVI, Predictive
from pyro.optim import ClippedAdam
from safetensors.torch import load_file

from pyro_blora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import CausalLM, LabelTokens, SequenceClassification

BATCH = tiny.sequences()


WITH = {"likelihood": LabelTokens(token_ids=tiny.ANSWERS, num_data=10)}


def net():
    torch.manual_seed(0)
    return tiny.llama()


def trained_on(blora, steps):
    tiny.train(blora, num_steps=steps, precision="float32")
    return blora


def adapted(seed, base):
    torch.manual_seed(seed)
    return trained_on(tiny.adapted(base, **WITH), 5)


def alone(folder):
    return {
        "trained": lambda: adapted(1, net()),
        "loaded": lambda: BayesianLoRA.from_pretrained(net(), folder / "saved"),
        "peft": lambda: trained_on(BayesianLoRA.from_peft(net(), folder / "lora", **WITH), 2),
        "copied": lambda: trained_on(adapted(1, net()), 3),
        "added": lambda: adapted(2, net()),
    }


def together(folder):
    made = {kind: alone(folder)[kind]() for kind in ("trained", "loaded", "peft")}
    made["copied"] = trained_on(copy.deepcopy(made["trained"]), 3)
    made["trained"].model.detach()
    made["added"] = adapted(2, made["trained"].net)
    return made


def drawn(blora, _):
    torch.manual_seed(3)
    return blora.predict(BATCH, 4).samples


def exported(blora, folder):
    blora.export_peft(folder / "export")
    tensors = load_file(folder / "export" / "adapter_model.safetensors")
    return sum(t.double().square().sum() for t in tensors.values())


# The first two need no network, the others need theirs
QUESTIONS = {
    "kl": lambda blora, folder: blora.kl(),
    "export": exported,
    "mean": lambda blora, folder: blora.predict(BATCH, 0).samples,
    "draws": drawn,
}


def answer(blora, question, folder):
    return QUESTIONS[question](blora, folder).double().flatten().tolist()


def test_five_adapters_answer_as_they_do_alone(tmp_path):
    maker, expected = adapted(4, net()), {}
    maker.save_pretrained(tmp_path / "saved")
    maker.export_peft(tmp_path / "lora")
    for kind, make in alone(tmp_path).items():
        pyro.clear_param_store()
        blora = make()
        expected[kind] = {question: answer(blora, question, tmp_path) for question in QUESTIONS}
    pyro.clear_param_store()
    made = together(tmp_path)
    for first, then, question in itertools.product(made, made, QUESTIONS):
        for kind in (first, then):
            if kind in ("trained", "added") and question not in ("kl", "export"):
                for name in ("trained", "added"):
                    made[name].model.detach()
                made[kind].model.attach()
            found, right = answer(made[kind], question, tmp_path), expected[kind][question]
            assert found == pytest.approx(right, rel=1e-5, abs=1e-6), (first, then, question)


@pytest.mark.parametrize("local", [False, True])
def test_two_loops_take_turns_in_either_store(local):
    """With rates by name, which Pyro's optimizers look up in the global store."""
    names = set()

    def loop(seed):
        torch.manual_seed(seed)
        blora = tiny.adapted(num_data=10)
        rates = lambda name: names.add(name) or {"lr": 1e-3 if ".Z_" in name else 1e-1}  # noqa: E731
        return blora, SVI(blora.model, blora.guide, ClippedAdam(rates), tiny.elbo(4))

    def steps(*loops):
        for turn, (_, svi) in itertools.product(range(3), loops):
            torch.manual_seed(turn)
            svi.step(tiny.sequences(8))
        return tiny.trained(loops[0][0])

    with pyro.settings.context(module_local_params=local):
        alone = steps(loop(0))
        assert names == {name.removesuffix("_unconstrained") for name in alone}
        assert tiny.equal(steps(loop(0), loop(1)), alone)


def test_one_that_is_off_is_refused_and_leaves_the_network_alone():
    blora, ids = tiny.adapted(num_data=10), BATCH["input_ids"]
    net = blora.unwrap()
    newer = tiny.adapted(net, num_data=10, fast=False)
    expected = newer.predict(BATCH, 0).probs
    before = tiny.trained(blora)
    for ask in (
        lambda: blora.predict(BATCH, 2),
        lambda: blora.predict(BATCH, 2, linearized=True),
        lambda: blora.log_predictive(BATCH, 2),
        lambda: blora.generate(ids, max_new_tokens=1),
        lambda: blora.model(BATCH),
        lambda: blora(ids),
        lambda: tiny.train(blora),
        blora.merge_and_unload,
    ):
        with pytest.raises(ConfigurationError, match="must be on its network"):
            ask()
    assert tiny.equal(tiny.trained(blora), before)
    blora.half().train()
    blora.unwrap()
    assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.float32, False)}
    assert not net.training
    assert torch.equal(newer.predict(BATCH, 0).probs, expected)


def test_a_likelihood_is_a_template_as_prior_and_guide_are():
    likelihood = Sloped(num_data=10)
    blora = tiny.adapted(likelihood=likelihood)
    rows = [tiny.choices(10, seed=3)] * 10
    tiny.train(blora, rows, collate=lambda rows: rows[0])
    assert blora.likelihood.slope != 1
    assert likelihood.slope == 1
    assert tiny.adapted(likelihood=likelihood).likelihood.slope == 1
    other = tiny.adapted(likelihood=blora.likelihood)  # from where it is
    assert other.likelihood.slope == blora.likelihood.slope
    assert other.likelihood is not blora.likelihood


# Threads of a server ask two adapters, and get what one thread alone gets
TEXT = tiny.unlabeled(tiny.texts())
INPUTS = tiny.unlabeled(BATCH)


def adapters():
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
    drawn = {a: Predictive(a.guide, num_samples=3)(BATCH) for a in (text, classes)}
    made = {"max_new_tokens": 2, "do_sample": False, "num_samples": 0}
    return [
        lambda: classes.predict(BATCH, samples=drawn[classes]).samples,
        lambda: classes.log_predictive(BATCH, 0),
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
    order = [k % len(ask) for k in range(64)]
    pairs = list(zip(both, (tiny.texts(), BATCH), strict=True))
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask[k]) for k in order]
        drawn = [pool.submit(a.log_predictive, row, 2) for a, row in pairs * 8]
        found = [future.result() for future in waiting]
        assert all(future.result().isfinite().all() for future in drawn)
    for k, answer in zip(order, found, strict=True):
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
            waiting = [pool.submit(text.log_predictive, tiny.texts(), 3) for _ in range(others)]
            losses = [figures["loss"] for figures in training.result().history]
            assert all(future.result().isfinite().all() for future in waiting)
        return losses

    assert trained(12) == trained(0)


def test_an_adapter_that_is_gone_leaves_its_network_free():
    """One that was local to a function cannot be unwrapped any more; one that trains stays."""
    base = net()
    expected = base(BATCH["input_ids"]).logits
    tiny.adapted(base).predict(BATCH)
    again = tiny.adapted(base)
    model, guide = again.model, again.guide
    del again
    with pytest.raises(ConfigurationError, match="already adapted"):
        tiny.adapted(base)
    SVI(model, guide, ClippedAdam({"lr": 0.1}), tiny.elbo(4)).step(BATCH)
    base.lm_head.requires_grad_(True)
    del model, guide
    gc.collect()
    assert [n for n, p in base.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert not any(module._forward_hooks for module in base.modules())
    assert torch.equal(base(BATCH["input_ids"]).logits, expected)
