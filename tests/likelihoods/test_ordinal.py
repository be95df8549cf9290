"""Ordinal beside dense algebra, and in every use of an adapter."""

import json

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer

from pyro_blora import BayesianLoRA, compare, fit
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.likelihoods import ClassificationCollator, Ordinal

WORDS = ("bad", "fair", "good", "great")
ROWS = [{"text": f"film {k} was {WORDS[k % 4]}", "label": k % 4} for k in range(40)]
TOKENIZER = build_tokenizer([row["text"] for row in ROWS], bos="<s>", eos="</s>", pad="<pad>")


def adapter():
    likelihood = Ordinal(num_classes=4)
    return BayesianLoRA(tiny.scorer(len(TOKENIZER)), likelihood=likelihood, tokenizer=TOKENIZER)


class Score(torch.nn.Module):
    """A network whose one output is given."""

    def forward(self, score):
        return type("Output", (), {"logits": score})


@pytest.mark.parametrize("count", [2, 3, 6])
def test_probabilities_are_differences_of_sigmoids(count):
    likelihood = Ordinal(num_classes=count)
    even = likelihood.logits(Score(), {"score": torch.zeros(1, 1)}).exp()
    torch.testing.assert_close(even, torch.full((1, count), 1 / count))
    tiny.shaken(likelihood, 0.5)
    score = torch.linspace(-9, 9, 7).unsqueeze(-1)
    found = likelihood.logits(Score(), {"score": score}).exp()
    below = (likelihood.cuts.detach() - score).double().sigmoid()
    dense = torch.cat([torch.zeros(7, 1), below, torch.ones(7, 1)], 1).diff(dim=-1).float()
    torch.testing.assert_close(found, dense, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(-1), torch.ones(7))


def test_gradients_are_finite_in_the_tails():
    likelihood = Ordinal(num_classes=4)
    with torch.no_grad():
        likelihood.cuts_unconstrained[1] = -200.0  # two cuts that are one number
    score = torch.tensor([[-300.0], [0.0], [300.0]], requires_grad=True)
    logits = likelihood.logits(Score(), {"score": score})
    assert logits.isfinite().all()
    logits.sum().backward()
    for gradient in (score.grad, likelihood.cuts_unconstrained.grad):
        assert gradient.isfinite().all()
    assert (score.grad[[0, 2], 0] == torch.tensor([3.0, -3.0])).all()  # of the classes beyond


def test_it_learns_from_rows_on_disk_and_is_saved_and_exported(tmp_path):
    (tmp_path / "stars.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    blora, start = adapter(), Ordinal(num_classes=4).cuts
    fit(blora, tmp_path / "stars.jsonl", num_steps=60, progress=False)
    assert not torch.allclose(blora.likelihood.cuts, start)
    assert blora.evaluate(ROWS, num_samples=4).nll < 1.3
    assert blora.calibrate(ROWS) > 0
    assert blora.distill(ROWS) > 0
    blora.save_pretrained(tmp_path / "saved")
    blora.export_peft(tmp_path / "peft")
    mean, batch = blora.predict(ROWS, 0).probs, ClassificationCollator(TOKENIZER)(ROWS)
    again = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path / "saved", tokenizer=TOKENIZER)
    torch.testing.assert_close(again.predict(ROWS, 0).probs, mean)
    numbers = json.loads((tmp_path / "peft/one_pass.json").read_text())
    net = pytest.importorskip("peft").PeftModel.from_pretrained(again.unwrap(), tmp_path / "peft")
    with torch.no_grad():
        score = net.eval()(**{key: v for key, v in batch.items() if key != "labels"}).logits
    below = (torch.tensor(numbers["cuts"]) - score).sigmoid()
    probs = torch.nn.functional.pad(below, (1, 0)).diff(dim=-1, append=torch.ones(len(ROWS), 1))
    found = (probs.log() / numbers["temperature"]).softmax(-1)
    torch.testing.assert_close(found, mean, atol=1e-5, rtol=0)


def test_two_methods_are_compared():
    net, likelihood = tiny.scorer(len(TOKENIZER)), Ordinal(num_classes=4)
    methods, once = ["lora", "bayesian-lora"], {"num_steps": 8, "seeds": [0]}
    table = compare((net, TOKENIZER), ROWS, methods=methods, likelihood=likelihood, **once)
    assert [row.method for row in table.rows] == methods
    assert "ACC %" in str(table)


@pytest.mark.parametrize("label", [4, -1, 1.5, "2", True, None, float("nan")])
def test_a_row_without_a_class_is_named(label):
    with pytest.raises(DataError, match=r"must hold a whole number below 4, got .* in row 40"):
        fit(adapter(), [*ROWS, {"text": "bad", "label": label}], num_steps=1, progress=False)


def test_one_class_is_refused():
    with pytest.raises(ConfigurationError, match="num_classes must be at least 2, got 1"):
        Ordinal(num_classes=1)
