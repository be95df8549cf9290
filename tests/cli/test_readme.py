"""The programs and commands of the README and of the pages that go on from it, as they stand."""

import re
import shlex
from pathlib import Path

import pyro
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

import pyro_blora

ROOT = Path(__file__).resolve().parents[2]
README, OWN_DATA, PROGRAMS, WITH_PEFT = (
    (ROOT / page).read_text("utf-8")
    for page in ("README.md", "docs/own_data.md", "docs/programs.md", "docs/peft.md")
)
COMMAND = re.compile(r"^pyro-blora .*", re.MULTILINE)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FIRST, LOOP, OWN_PRIOR = BLOCK.findall(README)
QUICK = FIRST.replace("num_steps=300", "num_steps=10").replace("range(24, 30)", "[0]")
QUICK = QUICK.replace("openbookqa", "facts")  # which needs no hub


def test_the_commands_run_one_after_the_other(run, model_dir, tmp_path, monkeypatch):
    """On a tiny network, in few steps, and else as they stand; each goes on from those before."""
    monkeypatch.chdir(tmp_path)
    tiny = ["--model", str(model_dir)]  # as a folder has no name that an adapter may give
    short = [*tiny, "--max-steps", "2", "--max-train", "16", "--rank", "2"]
    smaller = {
        "train": short,
        "compare": [*short, "--max-validation", "8", "--max-test", "8"],
        "evaluate": [*tiny, "--max-test", "8"],
        "distill": tiny,
        "generate": [*tiny, "--max-new-tokens", "3"],
    }
    commands = [shlex.split(line, comments=True) for line in COMMAND.findall(README)]
    assert len({command[1] for command in commands}) == 5
    for _, name, *options in commands:
        run(name, *options, *smaller.get(name, []))
    written = ("out/facts/test/reliability.png", "answer.html")
    assert all(Path(name).exists() for name in (*written, "out/compare/results.json"))


@pytest.fixture
def tiny(monkeypatch, model_dir, tmp_path):
    """The README's program, with a tiny network in place of SmolLM2, in a folder of its own.

    A BERT is as tiny.
    """
    monkeypatch.chdir(tmp_path)
    net = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def loaded(name, num_labels=None):
        if num_labels is None:
            return net, tokenizer
        padded = AutoTokenizer.from_pretrained(model_dir, pad_token="</s>")
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "vocab_size": len(padded), "num_labels": num_labels}
        return BertForSequenceClassification(BertConfig(**sizes)).eval(), padded

    monkeypatch.setattr(pyro_blora, "load_pretrained", loaded)


def test_the_readme_is_short():
    assert len(README.split()) <= 1200
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE).splitlines()
    assert [x for x in prose if len(x) > 100 and "](" not in x and x[:1] not in ("|", "<")] == []
    assert len(FIRST.splitlines()) <= 20
    assert QUICK != FIRST
    assert len([line for line in OWN_PRIOR.split("\n\nblora")[0].splitlines() if line]) <= 16


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.usefixtures("tiny")
def test_the_first_program_runs_and_the_loop_goes_on_from_it(local, capsys):
    names: dict[str, object] = {}
    with pyro.settings.context(module_local_params=local):
        exec(QUICK, names)
        printed = capsys.readouterr().out.strip().splitlines()
        shape = r" +ACC \d+\.\d  ECE \d+\.\d  NLL \d\.\d{3}  Brier \d\.\d{3}"
        for name, line in zip(("lora", "bayesian-lora"), printed, strict=True):
            assert re.fullmatch(name + shape, line)
        blora = names["blora"]
        sites = [f"{group.name}_V" for group in blora.model.groups]
        before = [getattr(blora.guide, site).loc.detach().clone() for site in sites]
        assert all(loc.any() for loc in before)  # started at zero
        exec(LOOP, names)
        batch = names["batch"]
        for site, loc in zip(sites, before, strict=True):
            assert not torch.equal(getattr(blora.guide, site).loc, loc)
        prediction = blora.predict(batch, num_samples=10)
    assert prediction.samples.shape == (10, *batch["option_mask"].shape[:2])


def ran(page, *, alone=False):
    """The names that the programs of a page define, one after the other.

    On one network, the adapter before taken off where one is made, if the page does not do so
    itself; a warning would be an error.
    """
    names: dict[str, object] = {}
    if not alone:
        exec(QUICK, names)
    for program in BLOCK.findall(page):
        if not alone and re.search(r"BayesianLoRA[.(]|bayesianize\(", program):
            names["blora"].unwrap()
        exec(program, names)
    return names


@pytest.mark.usefixtures("tiny")
def test_the_programs_and_commands_on_own_data_run(run, model_dir, capsys):
    names = ran(OWN_DATA, alone=True)
    assert re.search(r"ACC .* ECE .* NLL", capsys.readouterr().out)
    assert names["result"].best_step in (1, 2)
    assert type(names["classifier"]).__name__ == "BertForSequenceClassification"
    for line in COMMAND.findall(OWN_DATA):
        _, name, *options = shlex.split(line, comments=True)
        short = ["--max-steps", "2"] if name == "train" else []
        run(name, *options, "--model", model_dir, *short)
    assert Path("out/odd/test/metrics.json").exists()


@pytest.mark.usefixtures("tiny")
def test_all_programs_run():
    names = ran(PROGRAMS)
    assert Path("out/lora/adapter_model.safetensors").exists()
    exec("import pyro.infer.autoguide", names)
    exec(OWN_PRIOR, names)
    blora, batch = names["blora"], names["collate"](names["task"].test[:4])
    loss = pyro.infer.Trace_ELBO().differentiable_loss(blora.model, blora.guide, batch)
    assert loss.isfinite()
    blora.unwrap()


@pytest.mark.usefixtures("tiny")
def test_the_programs_with_peft_run(capsys):
    peft = pytest.importorskip("peft")
    names = ran(WITH_PEFT, alone=True)
    assert len(names["probs"]) == 4
    assert {p.name for p in Path("out/draws").iterdir()} - {".pyro_blora.json"} == set("0123")
    printed = re.findall(r"(\S+) +ACC .* NLL (\S+)", capsys.readouterr().out)
    assert [name for name, _ in printed] == ["LoRA", "bayesianize", "from_peft", "pass"]
    lora = peft.PeftModel.from_pretrained(names["net"], "my_lora")  # what PEFT itself says of it
    with torch.no_grad():
        batches = names["DataLoader"](names["held_out"], 16, collate_fn=names["collate"])
        nlls = [
            torch.nn.functional.cross_entropy(
                names["scores"].logits(lora, batch), batch["labels"], reduction="sum"
            )
            for batch in batches
        ]
    told = float(torch.stack(nlls).sum()) / len(names["held_out"])
    assert float(printed[0][1]) == pytest.approx(told, abs=1e-3)


@pytest.mark.usefixtures("tiny")
def test_the_programs_that_evaluate_run():
    page = (ROOT / "docs/evaluation.md").read_text("utf-8")
    names = ran(page.split("## lm-evaluation-harness")[0])
    held, labels = names["held_out"].probs, names["held_out_labels"]
    scaled = (held.log() / names["temperature"]).softmax(-1)
    assert names["evaluate"](scaled, labels).nll < names["evaluate"](held, labels).nll
    assert names["scaled"].shape == names["prediction"].probs.shape
    names["blora"].unwrap()
