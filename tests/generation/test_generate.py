"""Generation under the posterior against plain full passes of merged networks (average_net.py)."""

import copy
import string

import pytest
import tiny
import torch
from average_net import AverageNet, merged
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from pyro_blora import likelihoods
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.metrics import threshold_for

S, NEW = 3, 5


def adapter(net=None, width=0.4, **options):
    options |= {"likelihood": likelihoods.CausalLM(num_data=3), "target_modules": None}
    blora = tiny.adapted(net, **options)
    tiny.shaken(blora.guide, width)
    return blora


@pytest.fixture(scope="module", params=[tiny.llama, tiny.gpt2])
def blora(request):
    torch.manual_seed(0)
    return adapter(request.param())


def prompts(rows=2, padded=0):
    ids = torch.randint(3, tiny.VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(blora, batch, **options):
    options = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 2, **options}
    torch.manual_seed(3)
    found = blora.generate(**batch, num_samples=S, **options)
    torch.manual_seed(3)  # for the same draws, and those of sampling that follow them
    judge = AverageNet(merged(blora, S))
    options.pop("cache_implementation", None)
    return found, judge.generate(**batch, **{**options, "use_cache": False}), judge


DECODING = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "warped": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "num_return_sequences": 3},
    "a configuration": {"generation_config": GenerationConfig(do_sample=True, top_k=4)},
    "processed": {"repetition_penalty": 1.4, "min_new_tokens": 3, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True, "use_cache": False},
}


@pytest.mark.parametrize("decoding", DECODING)
def test_tokens_are_those_of_the_average(blora, decoding):
    found, expected, _ = both(blora, prompts(padded=2), **DECODING[decoding])
    assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_each_token_has_the_numbers_of_its_own_row(blora, decoding):
    """Those of the final sequence, run again from its start: of beams, whichever they were in."""
    batch, options = prompts(padded=2), DECODING[decoding]
    found, _, judge = both(blora, batch, **options, eos_token_id=None)
    mask = torch.ones_like(found.sequences)
    mask[:, :6] = batch["attention_mask"].repeat_interleave(len(mask) // 2, 0)
    judge.seen.clear()
    for end in range(6, 6 + NEW):
        judge(found.sequences[:, :end], mask[:, :end])
    p = torch.stack(judge.seen, 2)  # S x N x T x V
    mean = p.mean(0)
    log_probs = mean.gather(-1, found.sequences[:, 6:, None])[..., 0].log()
    entropy, own = (-torch.special.xlogy(q, q).sum(-1) for q in (mean, p))
    differ = (p.argmax(-1) != mean.argmax(-1)).double().mean(0)
    numbers = torch.stack([log_probs, entropy, entropy - own.mean(0), differ])
    names = ("log_probs", "entropy", "mutual_information", "disagreement")
    given = torch.stack([found[name] for name in names]).double()
    torch.testing.assert_close(given, numbers, atol=2e-5, rtol=1e-4)
    assert given[2].amax(-1).min() > 1e-4  # the draws do differ
    whole = torch.stack([found[f"mean_{n}"] for n in ("log_prob", "entropy")] + [found.epistemic])
    torch.testing.assert_close(whole.double(), numbers[:3].mean(-1), atol=2e-5, rtol=1e-4)


def at(token):
    return [lambda input_ids, scores, **options: input_ids[:, -1] == token]


def words(end):
    """A configuration that stops at a letter, and a tokenizer of one letter for each token."""
    letters = {letter: i for i, letter in enumerate(string.ascii_letters[: tiny.VOCABULARY])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    config = GenerationConfig(stop_strings=[string.ascii_letters[end]], **ENDLESS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return {"generation_config": config, "tokenizer": tokenizer}


ENDLESS = {"max_new_tokens": NEW, "eos_token_id": 31, "pad_token_id": 0}
# Ways to end rows with a token; no row ever picks the end of a text, if that is another
ENDS = {
    "an end of text": lambda end: {"eos_token_id": end},
    "an end of text that fills, too": lambda end: {"eos_token_id": end, "pad_token_id": end},
    "words of a configuration": words,
    "a criterion": lambda end: {"stopping_criteria": at(end)},
    "a criterion, and no end": lambda end: {"stopping_criteria": at(end), "eos_token_id": None},
}
SURE = {"do_sample": True, "top_k": 1}  # samples, and yet gives the same in any batch
BEAMS = {"num_beams": 2}
FINISHED = [(ends, {}) for ends in ENDS]
FINISHED += [("an end of text", SURE), ("an end of text", BEAMS), ("a criterion", BEAMS)]


@pytest.mark.parametrize(("ends", "decoding"), FINISHED)
def test_a_row_that_has_ended_has_no_numbers(ends, decoding):
    """Each row has those that the network alone gives to it as far as it goes on alone."""
    blora, batch = adapter(), prompts(4)
    with blora.posterior() as net:
        free = net.generate(**batch, **ENDLESS)[:, 6:]
    options = ENDS[ends](int(free[0, 1]))
    if "generation_config" not in options:
        options = {**ENDLESS, **options}
    batch["inputs"] = batch.pop("input_ids")
    found = blora.generate(**batch, num_samples=0, **decoding, **options)
    lengths = []
    for row, prompt in enumerate(batch["inputs"]):
        with blora.posterior() as net:
            alone = net.generate(prompt[None], **decoding, **options)
            log_probs = net(alone[:, :-1]).logits[:, 5:].log_softmax(-1)
        log_probs = log_probs.gather(-1, alone[:, 6:, None])[0, :, 0]
        lengths.append(length := len(log_probs))
        assert torch.equal(found.sequences[row, : 6 + length], alone[0])
        torch.testing.assert_close(found.log_probs[row, :length], log_probs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.mean_log_prob[row], log_probs.mean(), atol=1e-5, rtol=0)
        assert found.entropy[row, length:].isnan().all()
    assert min(lengths) < max(lengths)


@pytest.mark.parametrize(
    ("by", "score"), [("mutual_information", "epistemic"), ("entropy", "mean_entropy")]
)
def test_a_sequence_abstains_above_the_threshold(by, score):
    blora = adapter(width=1.0)
    options = {**prompts(), "num_samples": S, "max_new_tokens": NEW}
    torch.manual_seed(0)
    free = blora.generate(**options)
    assert not free.abstained.any()
    torch.testing.assert_close(free[score], free[by].nanmean(-1))
    right = free[score] < free[score].mean()
    threshold = threshold_for(free, right, risk=0.5, confidence=0.4, by=by)
    assert threshold == float(free[score].min())  # of the one that is right, which is kept
    torch.manual_seed(0)
    out = blora.generate(**options, abstain_above=threshold, by=by)
    assert out.abstained.equal(~right)
    assert out.abstained.sum() == 1
    assert out.sequences.equal(free.sequences)


def test_the_network_is_left_as_it_was(blora):
    net = blora.net.train()
    before = copy.copy(net._forward_hooks), copy.copy(net._forward_pre_hooks)
    blora.generate(**prompts(), num_samples=S, max_new_tokens=1)
    with pytest.raises(ValueError, match="no_such_option"):
        blora.generate(**prompts(), num_samples=S, no_such_option=1)
    assert (net._forward_hooks, net._forward_pre_hooks) == before
    assert net.training
    assert all(adapter.update is None for adapter in blora.model.adapters)


def test_a_compiled_network_gives_the_same():
    blora, options = adapter(), {**prompts(), "num_samples": S, "max_new_tokens": NEW}
    torch.manual_seed(2)
    expected = blora.generate(**options).sequences
    blora.net.compile(backend="eager")
    with blora.posterior() as net:
        net(prompts()["input_ids"][:, :1])  # a graph of it, without hooks
    torch.manual_seed(2)
    assert blora.generate(**options).sequences.equal(expected)


REFUSED = [{"abstain_above": 0.1, "num_samples": 1}, {"by": "doubt"}, {"cache": ()}]
REFUSED += [{"prompt_lookup_num_tokens": 3}, {"guidance_scale": 2.0}, {"assistant_early_exit": 1}]
REFUSED += [{"token_healing": True}]
REFUSED += [{"num_beams": 2, "cache_implementation": "static"}]


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_what_would_give_other_numbers_is_refused(options):
    with pytest.raises(ConfigurationError):
        adapter().generate(**prompts(), **options)
