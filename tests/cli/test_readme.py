import re
from pathlib import Path

import pyro
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyro_blora
from pyro_blora.guides import MeanField

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def tiny(monkeypatch, model_dir):
    """The README's program, with a tiny network in place of SmolLM2."""
    net = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    monkeypatch.setattr(pyro_blora, "load_pretrained", lambda name: (net, tokenizer))
    return net


@pytest.mark.parametrize("local", [False, True])
def test_the_first_program_runs_as_it_stands(tiny, local):
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    names: dict[str, object] = {}
    with pyro.settings.context(module_local_params=local):
        exec(BLOCKS[0], names)
        blora, batch = names["blora"], names["batch"]
        prediction = blora.predict(batch, num_samples=10)
    assert prediction.samples.shape == (10, *batch["option_mask"].shape[:2])
    assert prediction.mutual_information.shape == batch["labels"].shape
    before = torch.zeros(())
    for group in blora.model.groups:
        guide = getattr(blora.guide, f"{group.name}_V")
        before = before + guide.loc.abs().sum()
    assert before > 0  # started at zero


def test_free_text_and_generation(tiny, model_dir):
    names: dict[str, object] = {"net": tiny}
    names["tokenizer"] = AutoTokenizer.from_pretrained(model_dir)
    exec(BLOCKS[1], names)
    names["blora"].unwrap()


def test_the_prior_of_a_reader_takes_any_guide(tiny):
    names: dict[str, object] = {"net": tiny, "MeanField": MeanField}
    exec("import pyro.infer.autoguide\nfrom pyro_blora import BayesianLoRA\n", names)
    source, uses = BLOCKS[2].split("\n\nblora", 1)
    assert len([line for line in source.splitlines() if line.strip()]) <= 15
    exec(source, names)
    for use in ("blora" + uses).strip().splitlines():
        if use.startswith("#"):
            continue
        exec(use, names)
        ids = torch.arange(12).reshape(2, 6)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        blora = names["blora"]
        with pytest.warns(UserWarning, match="num_data"):
            loss = pyro.infer.Trace_ELBO().differentiable_loss(blora.model, blora.guide, batch)
        loss.backward()
        assert loss.isfinite()
        blora.unwrap()
        pyro.clear_param_store()


def test_the_programs_run_one_after_the_other(tiny, tmp_path):
    """On one network, the adapter before taken off; a warning would be an error here."""
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    names["blora"].save_pretrained(tmp_path)
    names["blora"].unwrap()
    pyro_blora.BayesianLoRA.from_pretrained(tiny, tmp_path).unwrap()
    exec(BLOCKS[1], names)
    names["blora"].unwrap()
    exec("import pyro.infer.autoguide", names)
    for part in BLOCKS[2].split("# or, after blora.unwrap():\n"):
        exec(part, names)
        names["blora"].unwrap()
