"""The programs and commands of the README, of docs/programs.md and docs/peft.md as they stand."""

import re
import shlex
from pathlib import Path

import pyro
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyro_blora

ROOT = Path(__file__).resolve().parents[2]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


FIRST, LOOP, OWN_PRIOR = blocks("README.md")
QUICK = FIRST.replace("num_steps=100", "num_steps=10")  # nothing else is left out
PROGRAMS = blocks("docs/programs.md")
WITH_PEFT = blocks("docs/peft.md")


def test_the_commands_run_one_after_the_other(run, model_dir, tmp_path, monkeypatch):
    """On a tiny network, in few steps, and else as they stand; each goes on from those before."""
    monkeypatch.chdir(tmp_path)
    Path("pool.jsonl").write_text('{"question": "?", "choices": ["a", "b"]}\n')
    tiny = ["--model", str(model_dir)]  # as a folder has no name that an adapter may give
    short = [*tiny, "--max-steps", "2", "--max-train", "16", "--rank", "2"]
    smaller = {
        "train": short,
        "compare": [*short, "--max-validation", "8", "--max-test", "8"],
        "evaluate": [*tiny, "--max-test", "8"],
        "rank": tiny,
        "generate": [*tiny, "--max-new-tokens", "3"],
    }
    text = (ROOT / "README.md").read_text("utf-8")
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"^pyro-blora .*", text, re.M)
    ]
    assert len({command[1] for command in commands}) == 6
    for _, name, *options in commands:
        code, _, err = run(name, *options, *smaller.get(name, []))
        assert code == 0, (name, err)
    assert Path("out/facts/test/reliability.png").exists()
    assert Path("out/next.jsonl").exists()
    assert Path("answer.html").exists()
    assert Path("out/compare/results.json").exists()


@pytest.fixture
def tiny(monkeypatch, model_dir):
    """The README's program, with a tiny network in place of SmolLM2."""
    net = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    monkeypatch.setattr(pyro_blora, "load_pretrained", lambda name: (net, tokenizer))
    return net


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
    assert len(FIRST.splitlines()) <= 12
    assert QUICK != FIRST
    assert len([line for line in OWN_PRIOR.split("\n\nblora")[0].splitlines() if line]) <= 15


@pytest.mark.parametrize("local", [False, True])
def test_the_first_program_runs_and_the_loop_goes_on_from_it(tiny, local, capsys):
    names: dict[str, object] = {}
    with pyro.settings.context(module_local_params=local):
        exec(QUICK, names)
        printed = capsys.readouterr().out.strip().splitlines()
        assert len(printed) == 4
        assert all(re.match(r"[01]\.\d\d \d\.\d{3}  \S", line) for line in printed)
        blora = names["blora"]
        locs = [getattr(blora.guide, f"{group.name}_V").loc for group in blora.model.groups]
        assert all(loc.abs().sum() > 0 for loc in locs)  # started at zero
        before = [loc.detach().clone() for loc in locs]
        exec(LOOP, names)
        batch = names["batch"]
        locs = [getattr(blora.guide, f"{group.name}_V").loc for group in blora.model.groups]
        assert not any(torch.equal(a, b) for a, b in zip(before, locs, strict=True))
        prediction = blora.predict(batch, num_samples=10)
    assert prediction.samples.shape == (10, *batch["option_mask"].shape[:2])


def test_all_programs_run_one_after_the_other(tiny, tmp_path, monkeypatch):
    """On one network, the adapter before taken off; a warning would be an error here."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(QUICK, names)
    for program in PROGRAMS:
        exec(program, names)
        names["blora"].unwrap()
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").exists()
    exec("import pyro.infer.autoguide", names)
    exec(OWN_PRIOR, names)
    blora, batch = names["blora"], names["collate"](names["task"].test[:4])
    loss = pyro.infer.Trace_ELBO().differentiable_loss(blora.model, blora.guide, batch)
    assert loss.isfinite()
    blora.unwrap()


def test_the_programs_with_peft_run_one_after_the_other(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(QUICK, names)
    for program in WITH_PEFT:
        exec(program, names)
        names["blora"].unwrap()
    assert {path.name for path in (tmp_path / "out" / "draws").iterdir()} == set("0123")
    assert len(names["probs"]) == 4
