"""Ordinal beside dense algebra."""

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset
from kinds import FEW, ROWS, TOKENIZER, adapter
from torch.utils.data import DataLoader

from pyro_blora import BayesianLoRA, fit
from pyro_blora.errors import DataError
from pyro_blora.likelihoods import ClassificationCollator, Ordinal


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


def test_numbers_keep_the_names_that_they_had_in_training(tmp_path):
    def named(names):
        rows = Dataset.from_list(ROWS["order"])
        return rows.cast_column("label", ClassLabel(names=names))

    grades = ["poor", "fair", "good", "great"]
    rows, others = named(grades), named(grades[::-1])
    fit(blora := adapter("order"), rows, **FEW)
    blora.save_pretrained(tmp_path)
    again = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path, tokenizer=TOKENIZER)
    again.evaluate(rows, num_samples=2)
    again.evaluate(ROWS["order"], num_samples=2)  # whose numbers have no names
    for data in (others, DataLoader(others, 4, collate_fn=ClassificationCollator(TOKENIZER))):
        with pytest.raises(DataError, match=r"must number the classes as .*'poor', 'fair'"):
            again.evaluate(data, num_samples=2)
    options = {"data_collator": None, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    tiny.trainer(tmp_path, adapter("order"), rows, **options).train()
    trainer = tiny.trainer(tmp_path, adapter("order"), others, **options)
    with pytest.raises(DataError, match="must number the classes as"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_alphabet_is_no_order():
    names = ["high", "low", "medium", "top"]
    rows = Dataset.from_list(ROWS["order"]).cast_column("label", ClassLabel(names=names))
    with pytest.warns(UserWarning, match="in alphabetical order"):
        fit(adapter("order"), rows, **FEW)
