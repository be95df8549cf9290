"""A user's mistake is one line on stderr, said before a model is read or anything is written."""

import pytest
import tiny

from pyro_blora.network import pretrained


@pytest.fixture
def words(run, model_dir, data_dir, tmp_path):
    """Runs a command on the task ``words`` with changed options."""

    def words(command="compare", *flags, **changes):
        options = {"model": model_dir, "task": "words", "data_dir": data_dir, "max_steps": 1}
        options |= {"rank": 2, "out": tmp_path / "out"}
        options |= {"seeds": 0, "methods": "mean-field"} if command == "compare" else {}
        options |= changes
        named = {"--" + name.replace("_", "-"): value for name, value in options.items()}
        return run(command, *flags, *[part for pair in named.items() for part in pair])

    return words


@pytest.fixture
def refused(words, monkeypatch, tmp_path):
    def refused(*told, **options):
        code, _, err = words(**options)
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert [word for word in told if word not in err] == []
        assert not (tmp_path / "out").exists()

    monkeypatch.setattr(pretrained, "load_pretrained", lambda name: pytest.fail("it was read"))
    return refused


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
        ({"model": "/nowhere/at/all"}, ["/nowhere/at/all", "smollm2"]),
    ],
)
def test_a_mistake(refused, change, told):
    refused(*told, **change)


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precision": "fp16"}, ["fp16", "bfloat16"]),
        ({"rank": 64}, ["rank=64", "q_proj"]),
        ({"target_modules": "q_prj"}, ["q_prj", "q_proj"]),
        ({"out": "/proc/nowhere"}, ["cannot be written to"]),
    ],
)
def test_a_mistake_in_an_option_of_both(refused, command, change, told):
    refused(*told, command=command, **change)


def test_a_malformed_line_and_a_missing_split_are_named(refused, data_dir):
    (data_dir / "words" / "test.jsonl").unlink()
    refused("no split 'test'")
    path = data_dir / "words" / "train.jsonl"
    good = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*good[:2], "not json", *good[2:]]) + "\n", encoding="utf-8")
    refused("train.jsonl, line 3")


def test_a_missing_adapter(run, tmp_path):
    code, _, err = run("evaluate", "--adapter", tmp_path / "none", "--task", "facts")
    assert code == 2
    assert "bayesian_lora_config.json" in err


def test_an_adapter_that_names_no_task(run, tmp_path):
    tiny.adapted(tiny.llama()).save_pretrained(tmp_path)
    code, _, err = run("evaluate", "--adapter", tmp_path)
    assert (code, "--task" in err) == (2, True)


def test_what_train_would_write_over_is_told_before_it_trains(words, tmp_path):
    out, file = tmp_path / "out", tmp_path / "file"
    file.write_text("mine")
    gone = tmp_path / "link"
    gone.symlink_to(tmp_path / "gone")
    for place in (file, file / "below", gone, gone / "below"):
        code, _, err = words("train", out=place)
        assert code == 2
        assert "cannot be written to: " in err
    assert words("train")[0] == 0
    first = (out / "bayesian_lora.safetensors").read_bytes()
    code, _, err = words("train", seed=1)
    assert code == 2
    assert "--overwrite" in err
    assert (out / "bayesian_lora.safetensors").read_bytes() == first
    assert words("train", "--overwrite", seed=1)[0] == 0
    assert (out / "bayesian_lora.safetensors").read_bytes() != first


def test_what_compare_would_write_over_is_told_before_it_trains(words, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "results.json").symlink_to(tmp_path / "gone")
    for place in (tmp_path, tmp_path / "linked"):
        code, _, err = words(out=place)
        assert code == 2
        assert "has a results.json already" in err
    assert (tmp_path / "results.json").read_text() == "mine"
    code, _, err = words(out=tmp_path / "results.json" / "below")
    assert code == 2
    assert "cannot be written to: " in err


def test_unknown_options_are_refused(run):
    code, _, err = run("compare", "--sseeds", "1")
    assert code == 2
    assert "--sseeds" in err


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ("nowhere:Prior+MeanField", ["'nowhere'", "current folder"]),
        ("mine:Plan+MeanField", ["mine:Plan", "'Plain'"]),
        ("mine:Plain+mine:Sprad", ["mine:Sprad", "'Spread'"]),
        ("mine:Spread+MeanField", ["prior 'mine:Spread'", "Plain"]),
        ("temperature:mine:Needs+MeanField", ["without a default, what"]),
    ],
)
def test_a_mistake_in_the_path_of_a_class(refused, own_module, methods, told):
    refused(*told, methods=methods)
