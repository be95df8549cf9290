"""The commands that ask a saved adapter: pictures, files and the ranking of a pool."""

import csv
import json
import sys

import pytest
import torch
from matplotlib.image import imread

from pyro_blora.evaluation.metrics import ece_by_chance
from pyro_blora.network import pretrained


@pytest.fixture(scope="module")
def adapter(model_dir, word_items, tmp_path_factory):
    """An adapter that ``pyro-blora train`` wrote, and the options that name its data."""
    from pyro_blora import cli

    folder = tmp_path_factory.mktemp("trained")
    for task, count, start in (("words", 24, 0), ("others", 12, 300)):
        (folder / "data" / task).mkdir(parents=True)
        for split in ("train", "test"):
            lines = "".join(json.dumps(item) + "\n" for item in word_items(count, start))
            (folder / "data" / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    words = ["--model", str(model_dir), "--data-dir", str(folder / "data"), "--task", "words"]
    with pytest.MonkeyPatch.context() as patch:
        options = ["--max-steps", "4", "--rank", "2", "--precision", "float32"]
        options += ["--out", str(folder / "adapter")]
        patch.setattr(sys, "argv", ["pyro-blora", "train", *words, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    return ["--adapter", str(folder / "adapter"), *words]


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_evaluate_writes_pictures_json_and_csv(run, adapter, tmp_path):
    out = tmp_path / "test"
    code, text, err = run("evaluate", *adapter, "--ood", "others", "--num-samples", 3, "--out", out)
    assert code == 0, err
    pictures = {"reliability.png", "risk_coverage.png", "ood.png"}
    assert {p.name for p in out.iterdir()} == {*pictures, "metrics.json", "items.csv", "ood.csv"}
    for name in pictures:
        image = imread(out / name)
        assert min(image.shape[:2]) > 300
        assert image.std() > 0.05
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["aurc"]) == {"confidence", "entropy", "mutual_information"}
    assert all(0 <= area <= 1 for area in metrics["aurc"].values())
    assert metrics["ood"]["task"] == "others"
    assert metrics["ood"]["n"] == 12
    # The numbers in the document are those of the lines in the files
    known, foreign = rows(out / "items.csv"), rows(out / "ood.csv")
    assert [len(known), len(foreign)] == [24, 12]
    for name, score in metrics["ood"]["auroc"].items():
        pairs = [
            (float(b[name]) > float(a[name])) + 0.5 * (float(b[name]) == float(a[name]))
            for a in known
            for b in foreign
        ]
        share = sum(pairs) / len(pairs)
        assert score == pytest.approx(1 - share if name == "confidence" else share, abs=1e-4)
        assert f"{100 * score:.1f} % by {name.replace('_', ' ')}" in text
    known.sort(key=lambda row: -float(row["confidence"]))
    wrong = [row["label"] != row["prediction"] for row in known]
    risks = [sum(wrong[: k + 1]) / (k + 1) for k in range(24)]
    assert metrics["aurc"]["confidence"] == pytest.approx(sum(risks) / 24, abs=1e-3)
    options = [name for name in known[0] if name[1:].isdigit()]
    probs = torch.tensor([[float(row[name]) for name in options] for row in known])
    assert metrics["ece_by_chance"] == pytest.approx(ece_by_chance(probs), abs=0.01)
    assert f"by chance: {100 * metrics['ece_by_chance']:.1f})" in text


def test_rank_writes_the_pool_by_mutual_information(run, adapter, word_items, tmp_path):
    pool = tmp_path / "pool.jsonl"
    unlabelled = [{k: v for k, v in item.items() if k != "label"} for item in word_items(9, 200)]
    unlabelled[3]["id"] = "line 4"  # as one without an id is called
    nameless = {name: value for name, value in unlabelled[3].items() if name != "id"}
    written = [*unlabelled[:3], nameless, *unlabelled[4:]]
    pool.write_text("".join(json.dumps(item) + "\n" for item in written), encoding="utf-8")
    common = ["rank", *adapter, "--pool", pool, "--num-samples", 4]
    code, text, err = run(*common, "--out", tmp_path / "new" / "all.jsonl")
    assert code == 0, err
    assert "9 of 9 items by mutual information" in text
    lines = [json.loads(x) for x in (tmp_path / "new" / "all.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == list(range(1, 10))
    told = [line["mutual_information"] for line in lines]
    assert told == sorted(told, reverse=True)
    assert told[0] > 0
    given = {item["id"]: item for item in unlabelled}
    for line in lines:
        assert line["prediction"] in line["choices"]
        assert given.pop(line["id"]).items() <= line.items()
        assert line["entropy"] >= line["mutual_information"]
    code, _, err = run(*common, "--by", "entropy", "--top", 4, "--out", tmp_path / "few.csv")
    assert code == 0, err
    few = rows(tmp_path / "few.csv")
    by_entropy = sorted(lines, key=lambda line: -line["entropy"])[:4]
    assert [row["id"] for row in few] == [line["id"] for line in by_entropy]  # the same draws
    assert list(few[0]) == [name for name in lines[0] if name != "choices"]
    out = tmp_path / "training.jsonl"  # without --pool: the training items, in a random order
    code, text, err = run("rank", *adapter, "--by", "random", "--num-samples", 0, "--out", out)
    assert code == 0, err
    assert "items by random" in text
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert set(ids) < {str(i) for i in range(24)}
    assert ids != sorted(ids, key=int)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"by": "bald"}, ["--by 'bald'", "mutual_information"]),
        ({"num-samples": 1}, ["--num-samples 1"]),
        ({"out": "ranking.txt"}, ["ranking.txt", ".jsonl or .csv"]),
        ({"pool": "/nowhere/pool.jsonl"}, ["--pool /nowhere/pool.jsonl is no file"]),
        ({"adapter": "/nowhere/adapter"}, ["bayesian_lora_config.json"]),
    ],
)
def test_a_mistake_of_rank_is_one_line(run, adapter, tmp_path, monkeypatch, change, told):
    monkeypatch.setattr(pretrained, "load_pretrained", lambda name: pytest.fail("it was read"))
    monkeypatch.chdir(tmp_path)
    changed = [part for name, value in change.items() for part in (f"--{name}", value)]
    code, _, err = run("rank", *adapter, "--out", "ranking.csv", *changed)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert [word for word in told if word not in err] == []
    assert list(tmp_path.iterdir()) == []


def test_a_pool_has_questions_and_choices(run, adapter, tmp_path):
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"id": "a", "choices": ["x", "y"]}\n', encoding="utf-8")
    code, _, err = run("rank", *adapter, "--pool", pool, "--out", tmp_path / "out.csv")
    assert code == 2
    assert "pool.jsonl, line 1" in err
    assert "'question'" in err
    code, _, err = run("evaluate", *adapter, "--ood", "othrs", "--out", tmp_path / "out")
    assert code == 2
    assert "did you mean 'others'" in err
    assert not (tmp_path / "out").exists()
