"""The commands that ask a saved adapter: ``evaluate``, ``distill`` and ``generate``."""

import csv
import json
import re

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer

from pyro_blora import BayesianLoRA, likelihoods, load_pretrained, load_task
from pyro_blora.evaluation.metrics import auroc
from pyro_blora.guides import MatrixNormal
from pyro_blora.inference import FitResult
from pyro_blora.models import KroneckerInducing


@pytest.fixture(scope="module")
def adapter(model_dir, data_dir, tmp_path_factory):
    """The options that name an adapter of draws that differ, and its data."""
    folder = tmp_path_factory.mktemp("adapter")
    net, _ = load_pretrained(str(model_dir))
    wide = {"prior": KroneckerInducing(sigma=1.0), "guide": MatrixNormal(init_scale=0.5)}
    likelihood = likelihoods.MultipleChoice(num_data=40)
    blora = BayesianLoRA(net, target_modules=["q_proj"], likelihood=likelihood, **wide)
    blora.save_pretrained(folder, notes={"task": "words"})
    return ["--adapter", folder, "--data-dir", data_dir, "--model", model_dir]


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_distill_saves_a_temperature(run, adapter, tmp_path):
    folder = tmp_path / "copy"
    blora = BayesianLoRA.from_pretrained(load_pretrained(adapter[-1])[0], adapter[1])
    blora.model.mean_temperature.fill_(5)
    result = FitResult(history=[{"loss": 1.0}])
    blora.save_pretrained(folder, result=result, notes={"task": "words"})
    own = ["--adapter", folder, *adapter[2:]]
    text, _ = run("distill", *own, "--num-samples", 4, "--peft")
    (told,) = re.findall(r"temperature ([0-9.]+) of one pass", text)
    read = BayesianLoRA.from_pretrained(blora.unwrap(), folder)
    assert f"{float(read.model.mean_temperature):.4g}" == told != "5"
    assert (folder / "peft" / "one_pass.json").exists()
    assert "| steps | 1 |" in (folder / "README.md").read_text()  # what it was trained by stays


def test_evaluate_writes_pictures_json_and_csv(run, adapter, tmp_path):
    out = tmp_path / "test"
    text, _ = run("evaluate", *adapter, "--ood", "others", "--num-samples", 3, "--out", out)
    assert "words, 21 test items" in text  # its own task
    pictures = {"reliability.png", "risk_coverage.png", "ood.png"}
    assert tiny.written(out) == {*pictures, "metrics.json", "items.csv", "ood.csv"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["aurc"]) == {"confidence", "entropy", "mutual_information"}
    assert (metrics["ood"]["task"], metrics["ood"]["n"]) == ("others", 12)
    # The numbers in the document are those of the lines in the files
    known, foreign = rows(out / "items.csv"), rows(out / "ood.csv")
    assert [line["id"] for line in known] == [str(i) for i in range(100, 121)]
    assert len(foreign) == 12
    right = sum(line["label"] == line["prediction"] for line in known)
    assert right / 21 == pytest.approx(metrics["acc"])
    for line in known:
        probs = [float(line[f"p{k}"]) for k in range(3)]
        assert max(probs) == float(line["confidence"]) == probs[int(line["prediction"])]
    for name in ("entropy", "mutual_information"):
        mean = sum(float(line[name]) for line in known) / 21
        assert metrics[name] == pytest.approx(mean, rel=1e-4)
    for name, score in metrics["ood"]["auroc"].items():
        of = [torch.tensor([float(row[name]) for row in part]) for part in (known, foreign)]
        sign = -1 if name == "confidence" else 1  # doubt is what is left of it
        assert score == pytest.approx(auroc(*(sign * scores for scores in of)), abs=1e-4)
        assert f"{100 * score:.1f} % by {name.replace('_', ' ')}" in text
    assert f"by chance: {100 * metrics['ece_by_chance']:.1f})" in text


def test_evaluate_warns_of_rows_that_an_adapter_of_fit_may_have_seen(run, adapter, tmp_path):
    blora = BayesianLoRA.from_pretrained(load_pretrained(adapter[-1])[0], adapter[1])
    blora.save_pretrained(tmp_path / "fitted")
    rows = [
        {"question": f"Is {i} odd?", "choices": ["no", "yes"], "label": i % 2} for i in range(20)
    ]
    file = tmp_path / "odd.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="may have rows that it was trained on"):
        run("evaluate", "--adapter", tmp_path / "fitted", "--model", adapter[-1], "--task", file)


def test_evaluate_says_above_which_entropy_to_abstain(run, adapter, data_dir, tmp_path):
    """If its own answers are the labels of 63 items, and not of labels that it does not know."""
    data, file = tmp_path / "data", tmp_path / "data" / "words" / "test.jsonl"
    file.parent.mkdir(parents=True)
    lines = 3 * (data_dir / "words" / "test.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    for out in ("before", "after"):
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
        own = [*adapter[:2], *adapter[4:], "--data-dir", data, "--out", tmp_path / out]
        text, _ = run("evaluate", *own, "--num-samples", 3)
        found = rows(tmp_path / out / "items.csv")
        for item, row in zip(items, found, strict=True):
            item["label"] = int(row["prediction"])
        metrics = json.loads((tmp_path / out / "metrics.json").read_text())
        assert ("abstain_above" in metrics) == ("95 % confidence" in text) == (out == "after")
    highest = max(float(row["entropy"]) for row in found)
    assert metrics["abstain_above"] == {"entropy": highest, "risk": 0.05, "kept": 1}
    assert f"100 % of the items have an entropy of at most {highest:.3f} nats" in text


def test_evaluate_scores_options_as_the_adapter_does(run, model_dir, data_dir, tmp_path):
    net, tokenizer = load_pretrained(str(model_dir))
    task = load_task("lengths", data_dir=data_dir)
    likelihood = likelihoods.MultipleChoice(num_data=len(task.train), score="sum")
    blora = BayesianLoRA(net, rank=2, likelihood=likelihood)
    with torch.no_grad():
        for parameter in blora.likelihood.parameters():
            parameter.fill_(1.7)
    own = blora.predict(task.collator(tokenizer)(task.test), 0).probs
    blora.save_pretrained(tmp_path / "adapter", notes={"task": "lengths"})
    options = ["--num-samples", 0, "--precision", "float32", "--out", tmp_path / "out"]
    options += ["--adapter", tmp_path / "adapter", "--data-dir", data_dir]
    run("evaluate", "--model", model_dir, *options)
    lines = rows(tmp_path / "out" / "items.csv")
    found = torch.tensor([[float(line[f"p{k}"]) for k in range(3)] for line in lines])
    torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-3)


def test_generate_writes_text_its_scores_and_a_page(run, adapter, tmp_path):
    def generate(*arguments):
        adapted = [adapter[k] for k in (0, 1, 4, 5)]
        common = ["--max-new-tokens", 4, "--num-samples", 3]
        return run("generate", *adapted, *common, *arguments)[0]

    html = tmp_path / "new" / "answer.html"
    asked = ["Question: [red] <b>", "Which?", "--temperature", 0.7, "--by", "entropy"]
    text = generate(*asked, "--html", html)
    assert "Question: [red] <b>" in text
    assert "Entropy, nats:" in text
    scores = re.findall(r"(\d+) tokens, mean log-probability (-[\d.]+), mean entropy", text)
    assert len(scores) == 2
    page = html.read_text("utf-8")
    assert page.count("<article") == 2
    assert "the average of 3 draws, temperature 0.7, seed 0" in page
    again = generate(*asked)
    assert re.sub(r"[\d.]+ s\n", "", again) in re.sub(r"[\d.]+ s\n", "", text)
    assert "Abstains" not in again
    assert "Abstains" in generate("Which word?", "--abstain-above", 0, "--num-beams", 2)
    asked = ["Which word?", "--num-samples", 0, "--abstain-above", 0]
    assert "Abstains" in generate(*asked, "--abstain-by", "entropy")


def test_labels_and_predictions_are_in_the_order_of_the_network(run, tmp_path):
    """A task sorts its classes by name, and a network's own order may be another."""
    films = [{"text": f"a {w} film {k}", "label": w} for k, w in enumerate(["pos", "neg"] * 20)]
    (tmp_path / "films.jsonl").write_text("\n".join(map(json.dumps, films)))
    tokenizer = build_tokenizer([row["text"] for row in films], pad="<pad>")
    net = tiny.bert(num_labels=2, id2label={0: "pos", 1: "neg"})
    net.resize_token_embeddings(len(tokenizer))
    for part in (net, tokenizer):
        part.save_pretrained(tmp_path / "base")
    blora = BayesianLoRA(net, tokenizer=tokenizer, rank=2)
    blora.reading(films)
    blora.save_pretrained(tmp_path / "adapter")
    options = ["--task", tmp_path / "films.jsonl", "--model", tmp_path / "base"]
    with pytest.warns(UserWarning, match="may have rows"):
        run("evaluate", "--adapter", tmp_path / "adapter", *options, "--out", tmp_path / "out")
    found = rows(tmp_path / "out" / "items.csv")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    right = [row["label"] == row["prediction"] for row in found]
    assert sum(right) / len(right) == pytest.approx(metrics["acc"])
    truth = [("neg", "pos")[item.label] for item in load_task(tmp_path / "films.jsonl").test]
    assert [("pos", "neg")[int(row["label"])] for row in found] == truth
