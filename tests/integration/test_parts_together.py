"""What was built apart works together: parts by group, PEFT, files, resuming and generation."""

import warnings

import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_blora import BayesianLoRA, fit
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.guides import Amortized, MatrixNormal, MeanField
from pyro_blora.models import GaussianFactors, KroneckerInducing

peft = pytest.importorskip("peft")
ROWS = tiny.examples(8)


def train(blora, steps, **options):
    options = {"collate": tiny.collate, "batch_size": 4, "progress": False, **options}
    return fit(blora, ROWS, num_steps=steps, precision="float32", **options)


def test_another_prior_of_one_group_is_another_run(tmp_path):
    net = tiny.llama()
    first, other = (
        {"q_proj": GaussianFactors(rank=2, sigma=sigma), ".*": KroneckerInducing(rank=2)}
        for sigma in (0.2, 5.0)
    )
    blora = tiny.adapted(net, prior=first)
    train(blora, 2, checkpoint_dir=tmp_path, save_every=1)
    blora = tiny.adapted(blora.unwrap(), prior=other)
    with pytest.raises(CheckpointError, match=r"prior\[q_proj\]\.sigma was 0\.2, is 5\.0"):
        train(blora, 4, checkpoint_dir=tmp_path, resume=True)


def test_a_guide_put_in_the_place_of_several_is_saved_as_it_is(tmp_path):
    blora = tiny.adapted(guide={"q_proj": MeanField(), ".*": MatrixNormal()})
    blora.guide = AutoNormal(blora.model)
    blora.guide(tiny.sequences(4))
    blora.save_pretrained(tmp_path)
    expected = blora.predict(tiny.sequences(4), 0).probs
    net = blora.unwrap()
    read = BayesianLoRA.from_pretrained(net, tmp_path)
    torch.testing.assert_close(read.predict(tiny.sequences(4), 0).probs, expected)


def test_what_cannot_be_merged_stays_adapted():
    net = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["v_proj"]))
    blora = tiny.adapted(net, target_modules=["q_proj"])
    before = blora.predict(tiny.sequences(4), 0).probs
    with pytest.raises(ConfigurationError, match="an adapter of its own"):
        blora.merge_and_unload()
    assert torch.equal(blora.predict(tiny.sequences(4), 0).probs, before)


def test_two_starts_at_a_lora_in_one_process(tmp_path):
    """With a guide for each group, and what the first left in Pyro's store."""
    exported = tiny.shaken(tiny.adapted(), 0.2)
    exported.export_peft(tmp_path)
    net, likelihood = exported.unwrap(), exported.likelihood
    guides = (None, {"q_proj": MeanField(init_scale=0.1), ".*": MatrixNormal()})
    found = []
    for guide in guides:
        base = tiny.llama()
        base.load_state_dict(net.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the store, where both go by the same names
            blora = BayesianLoRA.from_peft(base, tmp_path, guide=guide, likelihood=likelihood)
        found.append(blora.predict(tiny.sequences(4), 0).probs)
        train(blora, 2)
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_fewer_draws_leave_none_of_an_earlier_export(tmp_path):
    blora = tiny.adapted()
    blora.export_peft(tmp_path, num_samples=4)
    blora.export_peft(tmp_path, num_samples=2)
    assert tiny.written(tmp_path) == {"0", "1"}


def test_a_prompt_by_the_name_that_transformers_has():
    blora = tiny.adapted(guide=Amortized(hidden=3))
    ids = tiny.sequences(2)["input_ids"]
    options = {"max_new_tokens": 2, "do_sample": False, "num_samples": 2}
    torch.manual_seed(0)
    expected = blora.generate(ids, **options).sequences
    torch.manual_seed(0)
    assert torch.equal(blora.generate(inputs=ids, **options).sequences, expected)
