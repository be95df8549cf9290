"""A file of each format that was ever written is still read as what it was."""

import json
from pathlib import Path

import peft
import pyro
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from pyro_blora import BayesianLoRA, checkpoints
from pyro_blora.checkpoints import CONFIG, WEIGHTS, read_config

FORMATS = Path(__file__).parent / "formats"
# 1-first as it was at first, 1-last with a likelihood's parameters
PREDICTING = ["1-first", "1-last", "2"]


def batch(name):
    if name != "1-first":
        return tiny.choices(2)
    ids = torch.arange(8, 32).reshape(4, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def base():
    return LlamaForCausalLM.from_pretrained(FORMATS / "base").eval()


@pytest.mark.parametrize("name", PREDICTING)
def test_it_predicts_as_when_it_was_written(name):
    blora = BayesianLoRA.from_pretrained(base(), FORMATS / name)
    expected = torch.tensor(json.loads((FORMATS / name / "expected.json").read_text()))
    torch.testing.assert_close(blora.predict(batch(name), 0).probs, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_names_of_a_peft_model_in_format_1(wrapped):
    """They stood in the file; its head is found in the base alone, and in a ``PeftModel``."""
    tensors = load_file(FORMATS / "1-peft" / WEIGHTS)
    net = tiny.bert(1)
    if wrapped:
        net = peft.get_peft_model(net, peft.LoraConfig(task_type="SEQ_CLS", r=2))
    blora = BayesianLoRA.from_pretrained(net, FORMATS / "1-peft")
    own = blora.state_dict()
    assert len(own) == len(tensors) == 10
    for name, tensor in tensors.items():
        name = name.replace("base_model_model_", "").replace("_modules_to_save_default", "")
        assert torch.equal(own[name], tensor)


def test_every_format_is_here():
    formats = {read_config(FORMATS / name)["format"] for name in PREDICTING}
    assert formats == set(range(1, checkpoints.files.FORMAT + 1))
    assert all((FORMATS / name / CONFIG).exists() for name in PREDICTING)


def write():
    """Makes the file of the newest format anew, where a format was added."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    blora = BayesianLoRA.from_pretrained(base(), FORMATS / "1-last")
    folder = FORMATS / str(checkpoints.files.FORMAT)
    blora.save_pretrained(folder)
    probs = blora.predict(batch("2"), 0).probs.tolist()
    rounded = [[round(p, 6) for p in row] for row in probs]
    (folder / "expected.json").write_text(json.dumps(rounded) + "\n")
