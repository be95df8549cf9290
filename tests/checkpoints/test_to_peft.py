"""What PEFT loads of an export; and PEFT's habits by PEFT's names."""

import copy
import subprocess
import sys
from collections import OrderedDict

import own_classes
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import MambaConfig, MambaForCausalLM, TorchAoConfig

from pyro_blora import BayesianLoRA, models
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.likelihoods import SequenceClassification

peft = pytest.importorskip("peft")
from peft_adapters import BATCH, logits, mean_logits  # noqa: E402


def moved(net, **options):
    if not hasattr(net, "lm_head"):
        options.setdefault("likelihood", SequenceClassification(num_data=12))
    blora = tiny.adapted(net, **{"target_modules": None, **options})
    return tiny.shaken(blora, 0.2)


HEAD = {"target_modules": ["q_proj", "lm_head"]}
EXPORTS = {
    "gpt2": (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "qwen2": (tiny.qwen2, {"target_modules": "all-linear"}),
    "tied": (lambda: tiny.llama(tied=True), HEAD),
    "bert": (tiny.bert, {}),
    "score": (tiny.llama_classifier, {}),
}
OF_A_SHAPE = {"c_proj_16x16": models.KroneckerInducing(rank=(3, 5)), ".*": models.Subspace(rank=2)}
# Besides: layers of different ranks, quantized weights, a head that is adapted
MORE = {"ranks": (tiny.gpt2, {"target_modules": ["c_proj"], "prior": OF_A_SHAPE})}
MORE |= {"int8": (tiny.llama, {})}
MORE["target"] = (tiny.bert, {"target_modules": ["query", "classifier"]})
TASKS = dict.fromkeys(["bert", "score"], "SEQ_CLS") | {"target": None}


def answers(logits):
    """Probabilities of the classes, or of the answers at the last real token."""
    return (tiny.answers(logits, BATCH) if logits.dim() == 3 else logits).softmax(-1)


ELSEWHERE = """
import sys, peft, torch, transformers
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
net = transformers.AutoModelForSequenceClassification.from_pretrained(folder + "/net")
model = peft.PeftModel.from_pretrained(net, folder + "/mean").eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(folder + "/batch")).logits}, folder + "/found")
"""


@pytest.mark.slow
def test_an_export_loads_in_a_process_without_this_library(tmp_path):
    blora = moved(tiny.bert())
    assert blora.distill(DataLoader([BATCH], batch_size=None)) != 1
    blora.net.save_pretrained(tmp_path / "net")
    blora.export_peft(tmp_path / "mean")
    save_file(BATCH, tmp_path / "batch")
    command = [sys.executable, "-I", "-W", "ignore", "-c", ELSEWHERE, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    found = load_file(tmp_path / "found")["logits"].softmax(-1)
    torch.testing.assert_close(found, blora.predict(BATCH, 0).probs, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter")
@pytest.mark.parametrize("name", EXPORTS | MORE)
def test_exports_load_in_peft(name, tmp_path):
    build, options = (EXPORTS | MORE)[name]
    net, quantized = build(), {}
    net.save_pretrained(tmp_path / "net")
    if name == "int8":
        torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
        quantized["quantization_config"] = TorchAoConfig(torchao.Int8WeightOnlyConfig())
        net = type(net).from_pretrained(tmp_path / "net", **quantized)
    kind = type(net)
    blora = moved(net.eval(), **options)
    blora.export_peft(tmp_path / "mean")
    torch.manual_seed(1)
    blora.export_peft(tmp_path / "draws", num_samples=4)
    torch.manual_seed(1)  # the same draws again
    expected = blora.predict(BATCH, 4, max_rows=99).probs

    def loaded(folder, **options):
        base = kind.from_pretrained(tmp_path / "net", **quantized)
        return peft.PeftModel.from_pretrained(base, tmp_path / folder, **options).eval()

    found = logits(loaded("mean"))
    torch.testing.assert_close(found, mean_logits(blora), atol=1e-5, rtol=0)
    model, drawn = loaded("draws/0", adapter_name="0"), []
    for k in "0123":
        if k != "0":
            model.load_adapter(tmp_path / "draws" / k, adapter_name=k)
        model.set_adapter(k)
        drawn.append(answers(logits(model.eval())))
    probs = torch.stack(drawn)
    assert probs.std(0).max() > 1e-3
    torch.testing.assert_close(probs.mean(0), expected, atol=1e-5, rtol=0)
    assert model.peft_config["0"].task_type == TASKS.get(name, "CAUSAL_LM")


def test_an_export_of_a_network_without_a_configuration_loads_in_peft(tmp_path):
    class Classes(own_classes.OfX, SequenceClassification):
        """Of a network with a new head."""

    layers = {"first": torch.nn.Linear(6, 8), "act": torch.nn.Tanh()}
    net = torch.nn.Sequential(OrderedDict(layers, classifier=torch.nn.Linear(8, 3)))
    blora = moved(net, target_modules=["first"], likelihood=Classes(num_data=8))
    blora.export_peft(tmp_path)
    x = torch.randn(4, 6)
    expected, plain = blora.predict({"x": x}, 0).probs, copy.deepcopy(blora.unwrap())
    found = peft.PeftModel.from_pretrained(plain, tmp_path).eval()(x).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_classes_of_a_classifier_are_named_beside_its_export(tmp_path):
    names = ("no", "maybe", "yes")
    blora = moved(tiny.bert(), likelihood=SequenceClassification(classes=names))
    blora.export_peft(tmp_path)
    again = BayesianLoRA.from_peft(tiny.bert(), tmp_path)
    assert again.likelihood.classes == names
    other = SequenceClassification(classes=names[::-1])
    with pytest.raises(CheckpointError, match=r"classes \['no', 'maybe', 'yes'\], in this order"):
        BayesianLoRA.from_peft(tiny.bert(), tmp_path, likelihood=other)
    config = blora.merge_and_unload().config
    assert (config.id2label, config.label2id["yes"]) == ({0: "no", 1: "maybe", 2: "yes"}, 2)


def test_the_classes_of_an_export_are_not_those_of_what_peft_writes_over_it(tmp_path):
    likelihood = SequenceClassification(classes=["no", "maybe", "yes"])
    moved(tiny.bert(), likelihood=likelihood).export_peft(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(tiny.bert(), config).save_pretrained(tmp_path)
    assert BayesianLoRA.from_peft(tiny.bert(), tmp_path).likelihood.classes == ()


def test_a_disabled_adapter_and_its_head_are_out_of_the_way():
    net = tiny.bert()
    before = logits(net)
    blora = moved(net)
    after, loss = mean_logits(blora), blora.log_predictive(tiny.sequences(), 2)
    assert torch.equal(blora(**BATCH).logits, after)
    with blora.disable_adapter():
        with blora.disable_adapter():
            assert torch.equal(blora(**BATCH).logits, before)
        assert torch.equal(blora.predict(BATCH, 3).samples.var(0), torch.zeros(4, 3))
    assert torch.equal(mean_logits(blora), after)
    assert loss.shape == (4,)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_merged_network_stands_by_itself(name, tmp_path):
    build, options = EXPORTS[name]
    blora = moved(build(), **options)
    expected = mean_logits(blora)
    whole = blora.merge_and_unload()
    torch.testing.assert_close(logits(whole), expected, atol=1e-5, rtol=0)
    whole.save_pretrained(tmp_path)
    again = type(whole).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
    assert not any(module._forward_hooks for module in whole.modules())
    moved(whole)


def test_a_network_without_a_configuration_is_merged():
    likelihood = SequenceClassification(num_data=12, classes=("no", "maybe", "yes"))
    blora = moved(tiny.BareClassifier(), likelihood=likelihood)
    expected = blora.predict(BATCH, 0).probs
    found = blora.merge_and_unload()(**BATCH).logits.softmax(-1)
    torch.testing.assert_close(found, expected)


PARTS = [("distilbert", "classifier"), ("roberta", "classifier.out_proj")]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_part_of_a_head_is_exported_with_what_peft_saves_beside_it(name, part, tmp_path):
    net = getattr(tiny, name)()
    blora = moved(copy.deepcopy(net), modules_to_save=[part])
    expected = mean_logits(blora)
    blora.export_peft(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net, tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(blora.merge_and_unload()), expected, atol=1e-5, rtol=0)


def test_a_pooler_that_is_new_is_trained_and_exported(tmp_path):
    """A base that was loaded without one has another in each process."""
    net = tiny.bert(vocab_size=32)
    blora = moved(copy.deepcopy(net), modules_to_save=["pooler", "classifier"])
    assert not torch.equal(
        blora.model.trained_heads.bert_pooler_dense_weight, net.bert.pooler.dense.weight
    )
    expected = mean_logits(blora)
    blora.export_peft(tmp_path)
    torch.nn.init.normal_(net.bert.pooler.dense.weight)
    read = BayesianLoRA.from_peft(net, tmp_path)
    torch.testing.assert_close(mean_logits(read), expected, atol=1e-5, rtol=0)
    loaded = peft.PeftModel.from_pretrained(read.unwrap(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    for name in ("embeddings", "encoder", "layer.1.output"):
        with pytest.raises(ConfigurationError, match=r"heads among .* 'bert\.pooler'"):
            moved(tiny.bert(), modules_to_save=[name])


def with_a_head_in_a_head():
    options = {"target_modules": ["q_lin", "pre_classifier"], "modules_to_save": ["classifier"]}
    return moved(tiny.distilbert(), **options)


class OwnLayer(torch.nn.Module):
    """Linear, but of a class that PEFT does not know."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 16
        self.weight = torch.nn.Parameter(0.3 * torch.randn(16, 16))

    def forward(self, x):
        return x @ self.weight.T


def with_a_layer_of_its_own():
    net = tiny.bert()
    net.bert.encoder.layer[1].attention.self.value = OwnLayer()
    return moved(net)


def with_a_layer_that_peft_refuses_by_its_name():
    config = MambaConfig(vocab_size=100, hidden_size=8, state_size=4, num_hidden_layers=1)
    return moved(MambaForCausalLM(config).eval(), target_modules=["in_proj", "out_proj"])


CANNOT = [with_a_head_in_a_head, with_a_layer_of_its_own]
CANNOT += [with_a_layer_that_peft_refuses_by_its_name]


@pytest.mark.parametrize("make", CANNOT)
def test_what_cannot_be_merged_stays_adapted(make, tmp_path):
    blora = make()
    before = mean_logits(blora)
    for call in (blora.merge_and_unload, lambda: blora.export_peft(tmp_path / "out")):
        with pytest.raises(ConfigurationError):
            call()
    assert torch.equal(mean_logits(blora), before)
    assert not (tmp_path / "out").exists()


def test_draws_that_are_no_loras_are_refused_and_nothing_is_written(tmp_path):
    noisy = models.KroneckerInducing(rank=2, conditional="exact")
    with pytest.raises(ConfigurationError):
        moved(tiny.llama(), prior=noisy).export_peft(tmp_path / "x", num_samples=2)
    assert not (tmp_path / "x").exists()
