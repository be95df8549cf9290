"""One pass that stands for the draws: its temperature, who has it, and what PEFT makes of it."""

import json
import math

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer
from torch.utils.data import DataLoader, default_collate

from pyro_blora import BayesianLoRA, fit, guides
from pyro_blora.data import Template
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import (
    CausalLM,
    LabelTokens,
    LabelTokensCollator,
    MultipleChoice,
    MultipleChoiceCollator,
    SequenceClassification,
)
from pyro_blora.posterior.guide import draws_apart
from pyro_blora.posterior.temperature import best_temperature

PROMPT = "Question: {q}\nAnswer"
KINDS = {
    "options": (tiny.llama, MultipleChoice, lambda: tiny.choices(6)),
    "tokens": (tiny.llama, lambda **o: LabelTokens(token_ids=tiny.ANSWERS, **o), tiny.sequences),
    "classifier": (tiny.bert, SequenceClassification, tiny.sequences),
    "text": (tiny.llama, CausalLM, tiny.texts),
}


def adapter(kind, **options):
    net, likelihood, batch = KINDS[kind]
    targets = ["query", "value"] if kind == "classifier" else ["q_proj", "v_proj"]
    likelihood = likelihood(num_data=12)
    blora = tiny.adapted(net(), likelihood=likelihood, target_modules=targets, **options)
    with torch.no_grad():
        for name, parameter in blora.named_parameters():
            if name.endswith("loc"):
                parameter.normal_(std=0.5)
            elif "scale" in name:
                parameter.add_(1.5)  # draws that differ
    return blora, batch()


def rows_of(batch):
    """The batch as a ``DataLoader`` of one, without classes to read."""
    kept = batch["labels"].dim() > 1
    return DataLoader([{k: v for k, v in batch.items() if kept or k != "labels"}], batch_size=None)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_nearest_to_the_draws(kind):
    blora, batch = adapter(kind)
    with torch.no_grad():
        mean = next(blora.posterior.logits(batch, 0, tempered=False))[0]
    found = blora.distill(rows_of(batch), num_samples=32)
    with draws_apart(blora.guide, torch.device("cpu")), torch.no_grad():
        next(iter(rows_of(batch)))  # a DataLoader draws a seed
        blora.posterior.draws(32)  # and it makes sure that draws differ
        draws = torch.cat(list(blora.posterior.logits(batch, 32, tempered=False)))
    p = draws.double().softmax(-1).mean(0)

    def divergence(temperature):
        q = (mean.double() / temperature).log_softmax(-1)
        return float((torch.special.xlogy(p, p) - torch.where(p > 0, p * q, 0.0)).sum())

    grid = [0.01 * 1.01**k for k in range(926)]
    best = min(grid, key=divergence)
    assert 0.02 < best < 99
    assert found == pytest.approx(best, rel=0.01)
    assert abs(math.log(found)) > 0.02
    if kind != "text":
        torch.testing.assert_close(blora.predict(batch, 0).probs, (mean / found).softmax(-1))
    assert f"temperatures: of the draws 1, of the mean {found:.3g}" in repr(blora)


def test_a_known_answer():
    """Of two classes with the logit 2 and a target of 3/4: 2 / log 3."""
    logits, target = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.75, 0.25]])
    excess = logits.double() - (logits * target).sum(-1, keepdim=True)
    assert best_temperature(excess) == pytest.approx(2 / math.log(3), rel=1e-6)
    assert best_temperature(torch.zeros(3, 4)) == 1


def test_it_is_saved_and_a_further_training_begins_again(tmp_path):
    blora, batch = adapter("tokens")
    state = torch.get_rng_state()
    found = blora.distill(rows_of(batch))
    assert torch.equal(torch.get_rng_state(), state)
    # from the mean itself, and with the same draws
    assert blora.distill(rows_of(batch)) == pytest.approx(found, rel=1e-5)
    expected = blora.predict(batch, 0).probs
    blora.save_pretrained(tmp_path)
    other = CausalLM(num_data=12)  # whose scores are others
    read = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path, likelihood=other)
    assert read.model.mean_temperature == 1
    read = BayesianLoRA.from_pretrained(read.unwrap(), tmp_path)
    assert float(read.model.mean_temperature) == pytest.approx(found)
    assert torch.equal(read.predict(batch, 0).probs, expected)
    fit(read, tiny.examples(12), collate=tiny.collate, num_steps=1, progress=False)
    assert read.model.mean_temperature == 1


def test_it_is_of_one_pass_of_the_adapter_and_of_what_was_distilled():
    blora, batch = adapter("tokens")
    prompt = {"input_ids": torch.tensor([[9, 10]]), "num_samples": 0, "max_new_tokens": 1}
    with blora.disable_adapter():
        base = blora.predict(batch, 0).probs
    torch.manual_seed(3)
    draws, written = blora.predict(batch, 4).probs, blora.generate(**prompt).entropy
    blora.distill(rows_of(batch))
    with blora.disable_adapter():
        assert torch.equal(blora.predict(batch, 0).probs, base)
    torch.manual_seed(3)
    assert torch.equal(blora.predict(batch, 4).probs, draws)
    assert torch.equal(blora.generate(**prompt).entropy, written)  # not of the answers alone


def test_logits_that_are_no_numbers_are_refused():
    blora, batch = adapter("tokens")
    with torch.no_grad():
        blora.net.lm_head.weight[:] = torch.nan
    with pytest.raises(ValueError, match="look for NaN"):
        blora.distill(rows_of(batch))


def test_items_of_several_sizes_and_a_few_of_many():
    blora, _ = adapter("options")
    items = [{k: v[0] for k, v in tiny.choices(1, n, seed=n).items()} for n in (2, 3, 3, 2)] * 30
    seen = []

    def collate(rows):
        seen.extend(rows)
        return default_collate(rows)

    blora.distill(items, collate, batch_size=1, max_examples=10, progress=False)
    assert len(seen) == 10


def test_a_point_is_refused():
    blora, batch = adapter("tokens", guide=guides.Delta())
    with pytest.raises(ConfigurationError, match="got a posterior whose draws are all alike"):
        blora.distill(rows_of(batch))


@pytest.mark.parametrize("kind", ["classifier", "text"])
def test_an_export_has_it(kind, tmp_path):
    peft = pytest.importorskip("peft")
    blora, batch = adapter(kind)
    temperature = blora.distill(rows_of(batch))
    with torch.no_grad():
        expected = next(blora.posterior.logits(batch, 0, tempered=False))[0] / temperature
        expected = expected.softmax(-1)
    prompt = {"input_ids": torch.tensor([[9, 10, 11]]), "attention_mask": torch.ones(1, 3).long()}
    if kind == "text":
        likely = blora.generate(**prompt, num_samples=0, max_new_tokens=4, do_sample=False)
    blora.export_peft(tmp_path)
    net = peft.PeftModel.from_pretrained(blora.unwrap(), tmp_path).eval()
    files = tiny.written(tmp_path) - {"adapter_config.json"}
    files -= {"adapter_model.safetensors"}
    with torch.no_grad():
        if kind == "classifier":
            assert files == {"one_pass.json"}
            found = net(**{k: v for k, v in batch.items() if k != "labels"}).logits.softmax(-1)
        else:
            assert files == {"generation_config.json", "one_pass.json"}
            from transformers import GenerationConfig

            config = GenerationConfig.from_pretrained(tmp_path)
            assert (config.temperature, config.do_sample, config.top_k) == (temperature, True, 0)
            torch.manual_seed(0)
            options = {"max_new_tokens": 4, "output_scores": True, "pad_token_id": 0}
            output = net.generate(
                **prompt, **options, return_dict_in_generate=True, generation_config=config
            )
            assert output.sequences.shape == likely.sequences.shape
            found = output.scores[0].softmax(-1).max()
            expected = likely.log_probs[0, 0].exp()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sum", "mean", "labels", "classifier"])
def test_the_numbers_of_an_export_make_probabilities_of_its_logits(kind, tmp_path):
    peft = pytest.importorskip("peft")
    tokenizer = build_tokenizer(["Question: no yes " * 9], "<s>", pad="<p>")
    item = {"question": "Does it melt?", "choices": ["no", "yes"], "label": 0}
    net, options = tiny.llama(vocab_size=400, max_position_embeddings=128), {}
    if kind == "labels":
        collate = LabelTokensCollator(tokenizer, Template(PROMPT, "labels", (":", "?")))
        batch, likelihood = collate([item]), LabelTokens(token_ids=collate.token_ids)
    elif kind == "classifier":
        batch, likelihood = {**tiny.sequences(1), "labels": torch.tensor([0])}, None
        net, options = tiny.llama_classifier(), {"modules_to_save": []}
    else:
        item["choices"].append("ice melts")
        batch = MultipleChoiceCollator(tokenizer, Template(PROMPT, "options"))([item])
        likelihood = MultipleChoice(score=kind)
    blora = tiny.shaken(BayesianLoRA(net, rank=2, likelihood=likelihood, **options), 0.1)
    temperature = blora.distill(rows_of(batch))
    expected = blora.predict(batch, 0).probs[0]
    blora.export_peft(tmp_path)
    net = peft.PeftModel.from_pretrained(blora.unwrap(), tmp_path).eval()
    numbers = json.loads((tmp_path / "one_pass.json").read_text())
    assert numbers["temperature"] == temperature
    ids, mask = (batch[name].flatten(0, -2) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        scores = net(input_ids=ids, attention_mask=mask).logits
    if kind == "labels":
        scores = scores[0, -1, numbers["token_ids"]]
    elif kind != "classifier":
        logp = scores[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        parts = zip(logp, batch["option_mask"][0, :, 1:], strict=True)
        scores = torch.stack([getattr(row[at], numbers["score"])() for row, at in parts])
    torch.testing.assert_close((scores / temperature).softmax(-1).flatten(), expected)
