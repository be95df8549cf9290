import pyro
import pytest


def compare(run, model_dir, data_dir, out, **changes):
    options = {"--model": model_dir, "--task": "words", "--data-dir": data_dir, "--out": out}
    options |= {"--max-steps": 1, "--seeds": "0", "--methods": "mean-field"}
    options |= {"--" + k.replace("_", "-"): v for k, v in changes.items()}
    return run("compare", *[part for pair in options.items() for part in pair])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"methods": "lorra"}, ["lorra", "lora"]),
        ({"methods": "temperature:blub"}, ["blub", "blob"]),
        ({"methods": "Subspce+Delta"}, ["Subspce", "Subspace"]),
        ({"methods": "Subspace+Dleta"}, ["Dleta", "Delta"]),
        ({"methods": " , "}, ["--methods"]),
        ({"seeds": "0,x"}, ["--seeds", "0,1,2"]),
        ({"task": "wrds"}, ["wrds", "words"]),
        ({"precision": "half"}, ["half", "bfloat16"]),
        ({"model": "/nowhere/at/all"}, ["/nowhere/at/all", "smollm2"]),
        ({"target_modules": "q_prj"}, ["q_prj", "q_proj"]),
        ({"rank": "64"}, ["rank", "q_proj"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    run, model_dir, data_dir, tmp_path, change, told
):
    out = tmp_path / "out"
    code, _, err = compare(run, model_dir, data_dir, out, **change)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    for word in told:
        assert word in err
    assert not out.exists()


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"id": "1", "question": "q", "choices": ["a"], "label": 0}',
        '{"id": "1", "question": "q", "choices": ["a", "b"], "label": 2}',
        '{"id": "1", "question": "q", "label": 0}',
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(run, model_dir, data_dir, tmp_path, line):
    path = data_dir / "words" / "train.jsonl"
    good = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*good[:2], line, *good[2:]]) + "\n", encoding="utf-8")
    code, _, err = compare(run, model_dir, data_dir, tmp_path / "out")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "train.jsonl" in err
    assert "3" in err
    assert not (tmp_path / "out").exists()


def test_a_missing_split_and_a_missing_adapter(run, model_dir, data_dir, tmp_path):
    (data_dir / "words" / "test.jsonl").unlink()
    code, _, err = compare(run, model_dir, data_dir, tmp_path / "out")
    assert code == 2
    assert "test" in err
    code, _, err = run(
        "evaluate", "--adapter", tmp_path / "none", "--model", model_dir, "--task", "facts"
    )
    assert code == 2
    assert "bayesian_lora_config.json" in err


def test_what_train_would_write_over_is_told_before_it_trains(run, model_dir, data_dir, tmp_path):
    options = ["--model", model_dir, "--task", "words", "--data-dir", data_dir, "--max-steps", 1]
    options += ["--rank", 2, "--out"]
    out, file = tmp_path / "out", tmp_path / "file"
    file.write_text("mine")
    gone = tmp_path / "link"
    gone.symlink_to(tmp_path / "gone")
    for place in (file, file / "below", gone, gone / "below"):
        code, _, err = run("train", *options, place)
        assert code == 2
        assert "cannot be written to: " in err
    assert run("train", *options, out)[0] == 0
    first = (out / "bayesian_lora.safetensors").read_bytes()
    code, _, err = run("train", *options, out, "--seed", 1)
    assert code == 2
    assert "--overwrite" in err
    assert (out / "bayesian_lora.safetensors").read_bytes() == first
    pyro.clear_param_store()  # the next command is another process
    assert run("train", *options, out, "--seed", 1, "--overwrite")[0] == 0
    assert (out / "bayesian_lora.safetensors").read_bytes() != first


def test_what_compare_would_write_over_is_told_before_it_trains(run, model_dir, data_dir, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    code, _, err = compare(run, model_dir, data_dir, tmp_path)
    assert code == 2
    assert "has a results.json already" in err
    assert (tmp_path / "results.json").read_text() == "mine"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "results.json").symlink_to(tmp_path / "gone")
    code, _, err = compare(run, model_dir, data_dir, tmp_path / "linked")
    assert code == 2
    assert "has a results.json already" in err
    code, _, err = compare(run, model_dir, data_dir, tmp_path / "results.json" / "below")
    assert code == 2
    assert "cannot be written to: " in err


def test_unknown_options_are_refused(run):
    code, _, err = run("compare", "--sseeds", "1")
    assert code == 2
    assert "--sseeds" in err
