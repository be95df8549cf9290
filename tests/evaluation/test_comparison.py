"""``compare`` in Python: own networks, data, priors and guides, beside dense figures."""

import copy
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from datasets import Dataset
from own_tokenizer import build_tokenizer
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file

from pyro_blora import Comparison, compare, load_task
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.evaluation import comparison
from pyro_blora.evaluation.metrics import error_of
from pyro_blora.evaluation.results import Row
from pyro_blora.guides import Delta, MeanField
from pyro_blora.likelihoods import Ordinal, SequenceClassification
from pyro_blora.methods import Method
from pyro_blora.models import KroneckerInducing, Subspace
from pyro_blora.scores import evaluate, item_scores, sure_answers

WORDS = ("cold", "warm", "wet")
MINE = Method("mine", prior=Subspace(rank=2), guide=MeanField())
SHORT = {"seeds": [0], "num_steps": 2, "num_samples": 2, "progress": False}
ROWS = [{"text": f"it was {WORDS[k % 3]} and {k}", "label": WORDS[k % 3]} for k in range(60)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny BERT without a head."""
    folder, tokenizer, net = tmp_path_factory.mktemp("bert"), tokenizer_of(), tiny.bert()
    tokenizer.save_pretrained(folder)
    net.resize_token_embeddings(len(tokenizer))
    net.bert.save_pretrained(folder)
    return folder


def tokenizer_of(texts=None):
    texts = [row["text"] for row in ROWS] if texts is None else texts
    return build_tokenizer(texts, bos="<s>", eos="</s>", pad="<pad>")


def row(method, seed, probs, labels):
    log_probs = probs.gather(1, labels[:, None]).log()[:, 0]
    sizes = (0, len(probs), "none", 1, 1.0, 1)
    return Row(method, seed, evaluate(probs, labels), *sizes, probs, labels, log_probs)


def test_differences_are_paired_by_item_and_seed():
    labels, rows = torch.zeros(80, dtype=torch.long), []
    for seed in range(3):
        base = 1 + 0.5 * torch.randn(80)
        for method, z in (("a", base), ("b", base + 0.2 + 0.3 * torch.randn(80))):
            rows.append(row(method, seed, torch.stack([z.sigmoid(), (-z).sigmoid()], 1), labels))
    gaps = torch.stack(
        [a.log_probs - b.log_probs for a, b in zip(rows[::2], rows[1::2], strict=True)]
    )
    expected = float(gaps.mean()), float(error_of(gaps))
    assert Comparison(rows).differences()["b"]["nll"] == pytest.approx(expected, abs=1e-6)


def test_a_column_has_the_values_of_all_seeds():
    probs, labels = torch.tensor([[0.96, 0.04]] * 3 + [[0.94, 0.06]]), torch.tensor([0, 1, 0, 1])
    rows = [row("a", seed, probs, labels) for seed in range(3)]
    rows[2].passes = 7
    columns = Comparison(rows).columns()
    assert columns["passes"] == ["1, 7"]
    assert columns["wrong above 95 %"] == ["3 of 9"]
    assert "temperature by" not in columns  # no method has one
    assert sure_answers(probs, torch.tensor([0, 1, -100, 1])) == (2, 1)


def test_a_bert_by_its_folder_and_rows_of_text(encoder, tmp_path):
    """A row trained alone is the same, and a head of one seed is the same for every method."""
    names = ["lora", "split:lora", "bayesian-lora", "mine", "point", "mean:mine"]
    parts = {"own": [MINE, Method("point", Subspace(rank=2), Delta())], "batch_size": 6}
    seen, task = [], load_task(ROWS, max_validation=0)

    def run(names=names, num_steps=4, seeds=(0, 1), **options):
        options |= {"target_modules": ["query"], "progress": False, **parts}
        options |= {"seeds": seeds, "num_samples": 3, "num_steps": num_steps}
        return compare(str(encoder), ROWS, names, **options)

    table = run(out=tmp_path, callback=seen.append)
    assert [(r.method, r.seed) for r in table.rows] == [(n, s) for n in names for s in (0, 1)]
    assert sorted(map(id, seen)) == sorted(map(id, table.rows))
    assert {(r.n_train, r.n_test) for r in table.rows} == {(len(task.train), len(task.test))}
    alone = [run(["mine"], seeds=[seed]).rows[0] for seed in (0, 1)]
    for one, other in zip(alone, table.by_method()["mine"], strict=True):
        torch.testing.assert_close(one.probs, other.probs, atol=0, rtol=0)
    assert [r.passes for r in table.rows[::2]] == [1, 1, 3, 3, 1, 1]
    by = [row.temperature_by for row in table.rows[::2]]
    assert by == ["none", "0.125 of training", "none", "none", "none", "none"]
    text = str(table)
    assert len(table.plot().axes) >= len(names)
    assert str(run(out=tmp_path)) == text
    for one in table.rows:  # the table's columns are those of its differences
        means = [one.metrics[name] for name in ("nll", "brier", "ece")]
        assert means == item_scores(one.probs, one.labels).mean(1).tolist()
    with pytest.raises(ConfigurationError, match="another num_steps"):
        run(out=tmp_path, num_steps=5)


def test_a_head_has_the_classes_of_the_rows_if_their_likelihood_is_passed(encoder):
    classes = SequenceClassification()
    (row,) = compare(str(encoder), ROWS, ["lora"], likelihood=classes, **SHORT).rows
    held = load_task(ROWS, as_rows=True).test
    assert row.labels.tolist() == [sorted(WORDS).index(each["label"]) for each in held]
    assert row.probs.shape == (len(held), len(WORDS))


def test_questions_out_of_scope_have_a_column_and_a_row_that_learned_nothing_a_mark(
    encoder, monkeypatch
):
    asked = []  # which doubt
    scored = comparison.out_of_scope
    monkeypatch.setattr(
        comparison, "out_of_scope", lambda *of, by: asked.append(by) or scored(*of, by=by)
    )
    outside = ["who are you", "what is it", *(f"and {k}" for k in range(20))]
    table = compare(str(encoder), ROWS, ["lora", "mean-field"], outside=outside, **SHORT)
    lora, field = table.rows
    assert asked == ["entropy", "entropy"]
    columns = table.columns()
    found = [f"{100 * each.auroc:.1f}" for each in (lora, field)]
    assert columns["out of scope, AUROC %"] == found
    for each in (lora, field):
        gap = each.probs.amax(-1) - (each.probs.argmax(-1) == each.labels).double()
        assert each.metrics.gap == pytest.approx(float(gap.mean()), abs=1e-6)
    assert columns["gap %"] == [f"{100 * each.metrics.gap:+.1f}" for each in (lora, field)]
    lora.has_learned, field.has_learned = False, True
    assert table.columns()["method"] == ["lora (has not learned)", "mean-field"]
    task = load_task(ROWS)
    for data in (outside, [{"text": text} for text in outside]):
        items = task.outside(data)
        assert [item.question for item in items] == outside
        assert {item.choices for item in items} == {task.test[0].choices}
    with pytest.raises(DataError, match="must be texts"):
        task.outside([{"sentence": "a"}])


def test_other_weights_or_tokenizers_of_the_same_name_are_not_taken_for_these(encoder, tmp_path):
    folder, out = tmp_path / "network", tmp_path / "out"

    def run(*names):
        return compare(str(folder), ROWS, names, out=out, **SHORT)

    shutil.copytree(encoder, folder)
    first, before = run("lora"), (out / "results.json").read_bytes()
    shutil.copytree(encoder, folder, dirs_exist_ok=True)  # the same once more
    (folder / "README.md").write_text("More words.")
    assert run("lora").rows[0].train_seconds == first.rows[0].train_seconds
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "query.weight" in name)
    tensors[name] = tensors[name] + 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"another model\.safetensors;"):
        run("lora")
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    tokenizer_of([row["text"][::-1] for row in ROWS]).save_pretrained(folder)
    with pytest.raises(ConfigurationError, match=r"another tokenizer\.json"):
        run("lora", "map")
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        ("split:lora", {"held_out": 0.0}, r"split:lora must have items .* with held_out=0\.0;"),
        ("lora", {"validation": ROWS}, "got validation=;"),
        ("lora", {"patience": 2}, "got patience=;"),
        ("lora", {"max_test": 20}, "A Task must come without .*'max_test': 20"),
        ("lora", {"likelihood": Ordinal(num_classes=3)}, r"likelihood= must have .* got Task\("),
        ("lora", {"data_dir": "data"}, "A Task must come without .* data_dir='data'"),
    ],
)
def test_options_that_would_not_be_obeyed_are_refused_first(
    methods, options, said, tmp_path, monkeypatch
):
    task, out = load_task(ROWS), tmp_path / "out"
    for name in ("load_task", "load_for"):
        monkeypatch.setattr(comparison, name, lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ConfigurationError, match=said) as caught:
        compare("smollm2", task, ["lora", methods], num_steps=1, out=out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:The adapter has not learned")
def test_results_of_other_methods_networks_or_data_are_not_taken_for_these(tmp_path):
    """A network of the user's own is given back as it was."""
    tokenizer, net = tokenizer_of(), tiny.bert()
    net.resize_token_embeddings(len(tokenizer))

    def run(net=net, rows=ROWS, names=("mine",), tokenizer=tokenizer, **options):
        options = {"out": tmp_path, "own": [MINE], **SHORT, **options}
        return compare((net, tokenizer), rows, names, **options)

    altered, pads, task = copy.deepcopy(net), tokenizer_of(), load_task(ROWS)
    first = run()
    assert tiny.equal(net.state_dict(), altered.state_dict())
    assert not any(module._forward_hooks for module in net.modules())
    with torch.no_grad():
        for parameter in altered.parameters():
            parameter *= 1 + 1e-6
    pads.add_special_tokens({"eos_token": "it"})
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 4
    for changed, match in (
        ({"own": [MINE.with_rank(3)]}, "another mine"),
        ({"net": altered}, "another network"),
        ({"tokenizer": pads}, "another tokenizer"),
        ({"tokenizer": short}, "another tokenizer"),
        ({"tokenizer": tokenizer_of(["other words"])}, "another tokenizer"),
        ({"rows": [*ROWS[:-1], {**ROWS[-1], "text": "another"}]}, "another data"),
        ({"names": ()}, "must not be empty"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            run(**changed)
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=9)  # no other one
    both = run(names=("map", "mine"), progress=None)  # of which one is there
    assert [row.method for row in both.rows] == ["map", "mine"]
    assert both.rows[1].probs.equal(first.rows[0].probs)
    with pytest.raises(ConfigurationError, match="another map"):
        run(names=("map",), own=[replace(MINE, name="map")])
    other = replace(task, train=task.train[1:], validation=(task.train[0], *task.validation))
    run(rows=task, out=tmp_path / "task")
    with pytest.raises(ConfigurationError, match="another data"):  # the same items, split apart
        run(rows=other, out=tmp_path / "task")


def test_a_function_of_a_method_is_another_one_if_its_code_or_its_values_are():
    def method(scale):
        def core(shape):
            return torch.distributions.Normal(torch.zeros(shape), 1.0)

        def guide(model):
            return AutoNormal(model, init_scale=scale)

        return Method("mine", KroneckerInducing(core=core), guide)

    first, again, other = map(comparison._settings, map(method, (0.1, 0.1, 0.5)))
    assert first == again != other


def test_a_split_must_have_something_to_hold_out(encoder):
    same = {"train": ROWS[:1] * 9, "test": ROWS}
    with pytest.raises(ConfigurationError, match="split:lora must have items to hold out"):
        compare(str(encoder), same, ["lora", "split:lora"], seeds=[0], num_steps=1)


def test_a_new_head_has_the_names_of_a_data_set_whose_split_is_empty(encoder):
    named = Dataset.from_list(ROWS).class_encode_column("label")
    splits = {"train": named, "validation": [], "test": named}
    options = {"likelihood": SequenceClassification(), **SHORT}
    assert len(compare(str(encoder), splits, ["map"], **options).rows[0].labels) == len(ROWS)
