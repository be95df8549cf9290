"""A trained PEFT adapter as the start of a Bayesian one; PEFT's own logits are the judge."""

import json
import shutil
import sys

import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file

from pyro_blora import BayesianLoRA, bayesianize, guides, models
from pyro_blora.checkpoints import read_peft
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.likelihoods import CausalLM, LabelTokens, SequenceClassification

peft = pytest.importorskip("peft")
from peft_adapters import CASES, base, logits, mean_logits, trained  # noqa: E402

WORDS = LabelTokens(token_ids=tiny.ANSWERS, num_data=8)
ROWS = tiny.examples(8)
# Logits equal to 1e-5 in single precision
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(params=["memory", "folder"])
def place(request, tmp_path):
    """Gives the arguments of ``from_peft`` for a ``PeftModel``."""

    def arguments(model, name="llama"):
        if request.param == "memory":
            return (model,)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        return base(name), tmp_path

    return arguments


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    trained().save_pretrained(folder)
    return folder


HEADS = {"bert": ("classifier",), "score": ("score",)}
HEADS["distilbert"] = ("pre_classifier", "classifier")


@pytest.mark.parametrize("name", CASES)
def test_the_mean_starts_at_the_adapter_and_unwraps_to_the_base(name, place):
    model, pretrained = trained(name), logits(base(name))
    expected = logits(model)
    assert (expected - pretrained).abs().max() > 0.1
    blora = BayesianLoRA.from_peft(*place(model, name))
    torch.testing.assert_close(mean_logits(blora), expected, **CLOSE)
    assert not any("base_layer" in n or "lora" in n for n, _ in blora.net.named_modules())
    assert type(blora.likelihood) is (SequenceClassification if name in HEADS else CausalLM)
    assert blora.model.trained_heads.names == HEADS.get(name, ())
    torch.testing.assert_close(logits(blora.unwrap()), pretrained, atol=0, rtol=0)


ABLE = ("KroneckerInducing", "FactorInducing", "GaussianFactors", "Subspace")
STARTS = [type(prior)(rank=4) for name, prior in tiny.priors().items() if name in ABLE]
STARTS += [
    models.KroneckerInducing(rank=(4, 5), scale="fixed", conditional="scaled"),
    models.FactorInducing(rank=6, inducing=4, scale="fixed"),
    models.GaussianFactors(rank=4, random="both", alpha=8),
]
REFUSED = [type(prior)(rank=4) for name, prior in tiny.priors().items() if name not in ABLE]
REFUSED += [models.KroneckerInducing(rank=4, core="horseshoe")]


@pytest.mark.parametrize("prior", STARTS + REFUSED, ids=repr)
def test_every_prior_starts_there_or_is_refused(prior):
    """By dense algebra: the deltas are PEFT's own, of layers of two ranks, below the priors'."""
    model = trained()
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    deltas = {n: m.get_delta_weight("default").detach() for n, m in layers.items()}
    factors, expected = read_peft(model).factors, logits(model)
    options = {"target_modules": "|".join(factors), "prior": prior, "likelihood": WORDS}
    if prior in REFUSED:
        with pytest.raises(ConfigurationError):
            BayesianLoRA(base(), **options, start=factors)
        return
    blora = BayesianLoRA(base(), **options, start=factors)
    for group in blora.model.groups:
        updates = blora.posterior.draws(0)[group.name].layers()
        for n, update in zip(group.module_names, updates, strict=True):
            torch.testing.assert_close(update.weight(), deltas[n], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mean_logits(blora), expected, atol=2e-5, rtol=0)


def test_a_network_with_an_adapter_of_peft_is_refused(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for call in (BayesianLoRA, lambda net: BayesianLoRA.from_peft(net, tmp_path)):
        with pytest.raises(ConfigurationError, match="must have no adapter of PEFT"):
            call(model)
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)


MAPPING = {"q_proj": guides.MeanField(), ".*": guides.MatrixNormal()}


@pytest.mark.parametrize("guide", [*tiny.families().values(), MAPPING], ids=repr)
def test_every_guide_starts_there_or_is_refused(guide):
    model = trained()
    expected = logits(model)
    if isinstance(guide, guides.Flow):  # whose center is known by draws
        with pytest.raises(ConfigurationError, match="MatrixNormal, MeanField"):
            BayesianLoRA.from_peft(model, guide=guide, likelihood=WORDS)
        torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)  # as it was
        return
    blora = BayesianLoRA.from_peft(model, guide=guide, likelihood=WORDS)
    torch.testing.assert_close(mean_logits(blora), expected, **CLOSE)


def test_it_is_near_in_a_draw_and_trains_on_from_there():
    model = trained()
    expected, guide = logits(model), guides.MatrixNormal(init_scale=1e-4)
    blora = BayesianLoRA.from_peft(model, guide=guide, likelihood=WORDS)
    with blora.posterior(1):
        drawn = logits(blora.net)
    assert 1e-6 < (drawn - expected).abs().max() < 0.01
    before, start = tiny.trained(blora), blora.log_predictive(tiny.collate(ROWS), 0).mean()
    tiny.train(blora, ROWS, batch_size=8)
    assert blora.log_predictive(tiny.collate(ROWS), 0).mean() > start
    assert not [n for n, p in blora.named_parameters() if torch.equal(p, before[n])]


def test_an_adapter_becomes_bayesian_in_one_reading_of_the_data(place):
    model, seen = trained(), []
    expected = logits(model)
    collate = lambda rows: seen.extend(rows) or tiny.collate(rows)  # noqa: E731
    options = {"collate": collate, "likelihood": WORDS, "progress": False}
    blora = bayesianize(*place(model), data=ROWS, **options)
    assert sorted(row["index"] for row in seen) == list(range(8))
    torch.testing.assert_close(mean_logits(blora), expected, **CLOSE)
    drawn = blora.predict(tiny.collate(ROWS), 4)
    assert drawn.mutual_information.max() > 1e-6


def test_the_base_is_loaded_by_the_name_that_the_adapter_has(tmp_path):
    for name in ("llama", "score"):
        model = trained(name, task_type="SEQ_CLS" if name == "score" else "CAUSAL_LM")
        expected = logits(model)
        base(name).save_pretrained(tmp_path / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / name)
        blora = BayesianLoRA.from_peft(tmp_path / name)
        torch.testing.assert_close(mean_logits(blora), expected, **CLOSE)


def test_a_target_that_holds_the_embedding_brings_it_along(tmp_path):
    """PEFT writes the head's own weight then; a resized one, or other classes, are another base."""
    model = trained("head")
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("lora" not in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    blora = BayesianLoRA.from_peft(base("head"), tmp_path)
    torch.testing.assert_close(mean_logits(blora), expected, **CLOSE)
    blora.unwrap()
    with pytest.raises(CheckpointError, match="resized vocabulary"):
        BayesianLoRA.from_peft(tiny.llama(tied=True), tmp_path)
    trained("bert").save_pretrained(tmp_path)
    net = base("bert")
    net.classifier = torch.nn.Linear(16, 5)
    with pytest.raises(CheckpointError, match="other classes"):
        BayesianLoRA.from_peft(net, tmp_path)


def tensors(change):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


def changed(**options):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return spoil


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SPOILED = [
    changed(use_dora=True), changed(bias="all"), changed(of_a_later_release={"k": 1}),
    changed(init_lora_weights="pissa_niter_4"), changed(peft_type="IA3"),
    lambda folder: (folder / "adapter_model.safetensors").unlink(), tensors(lambda t: {}),
    lambda folder: (folder / "adapter_config.json").write_text("{"),
    lambda folder: (folder / "adapter_config.json").write_text("[1]"),
    tensors(lambda t: {name: value for name, value in t.items() if "lora_B" not in name}),
    tensors(lambda t: t | {FIRST: t[FIRST][:, :5].clone()}),
    tensors(lambda t: t | {FIRST.replace("A.weight", "magnitude"): torch.ones(3)}),
    tensors(lambda t: t | {"base_model.model.score.weight": torch.ones(3)}),
]  # fmt: skip


def test_a_folder_is_read_without_peft(saved, tmp_path, monkeypatch):
    """An initialization that leaves the base alone is plain."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    changed(init_lora_weights="eva", eva_config={"rho": 2.0})(tmp_path)
    expected = logits(trained())
    monkeypatch.setitem(sys.modules, "peft", None)
    torch.testing.assert_close(
        mean_logits(BayesianLoRA.from_peft(base(), tmp_path)), expected, **CLOSE
    )


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_spoiled_folder_is_refused(saved, tmp_path, spoil):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    net = tiny.llama()
    with pytest.raises((CheckpointError, ConfigurationError)):
        BayesianLoRA.from_peft(net, tmp_path)
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"prior": models.KroneckerInducing(rank=2)},
        {"prior": models.FactorInducing(rank=3, inducing=2)},
        {"guide": AutoNormal},
        *({"net": tiny.gpt2()}, {"net": None}, {"net": trained()}, {"folder": "nowhere"}),
        *({"folder": None}, {"folder": None, "net": trained(init_lora_weights="pissa")}),
    ],
)
def test_what_cannot_be_a_start_is_refused(saved, options):
    with pytest.raises((CheckpointError, ConfigurationError)):
        BayesianLoRA.from_peft(**{"folder": saved, "net": tiny.llama(), **options})


def test_the_scaling_in_force_in_memory_is_taken():
    """PEFT's ``scale_layer`` and ``set_scale`` change the layers alone, not the configuration."""
    model = trained()
    first, *others = (m for m in model.get_base_model().modules() if hasattr(m, "lora_A"))
    plain = logits(model)
    first.set_scale("default", 0.0)
    for layer in others:
        layer.scale_layer(2.0)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(mean_logits(BayesianLoRA.from_peft(model)), expected, **CLOSE)


def test_of_several_adapters_the_active_one_is_taken():
    model = trained()
    other = peft.LoraConfig(target_modules=["k_proj"], r=1, init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigurationError, match="must have one active adapter"):
        BayesianLoRA.from_peft(model)
    model.set_adapter("other")
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(ConfigurationError, match="unmerge_adapter"):
        BayesianLoRA.from_peft(model)
    with pytest.warns(UserWarning, match="Already unmerged"):  # the layers of the other one
        model.unmerge_adapter()
    torch.testing.assert_close(mean_logits(BayesianLoRA.from_peft(model)), expected, **CLOSE)
