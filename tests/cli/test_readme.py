"""The programs and commands of the README and of other pages, as they stand but for their sizes."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

import pyro_blora
from pyro_blora.evaluation import comparison

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
COMMAND = re.compile(r"^(?:\t\$\(BIN\)/)?pyro-blora (.*)", re.MULTILINE)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
SIZES = """
max_train=400, num_steps=300 -> max_train=16, max_validation=8, max_test=8, num_steps=2
num_steps=300 -> num_steps=2
num_steps=480 -> num_steps=2
num_steps=100 -> num_steps=2
max_steps=300 -> max_steps=2
num_epochs=6 -> num_steps=2
range(6) -> range(1)
seeds=[0], -> seeds=[0], num_steps=2,
"sst2" -> "facts"
max_train=400 -> max_train=16, max_validation=8
max_test=600 -> max_test=8
num_samples=400, warmup_steps=200 -> num_samples=4, warmup_steps=2
validate_every": 50 -> validate_every": 1
range(400) -> range(40)
[:300] -> [:30]
[300:] -> [30:]
[:200] -> [:20]
[200:] -> [20:]
[:50] -> [:5]
[50:] -> [5:]
"""
SMALLER = dict(line.split(" -> ") for line in SIZES.strip().splitlines())


@pytest.fixture(autouse=True)
def tiny(monkeypatch, model_dir, tmp_path):
    """A tiny network in place of SmolLM2, one in place of BERT, and a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    net = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def loaded(name, num_labels=None):
        if num_labels is None:
            return net, tokenizer
        padded = AutoTokenizer.from_pretrained(model_dir, pad_token="</s>")
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "vocab_size": len(padded), "num_labels": num_labels}
        torch.manual_seed(0)  # the same base each time
        return BertForSequenceClassification(BertConfig(**sizes)).eval(), padded

    def by_name(name, classes, seed):
        return loaded(name, classes if classes == 2 else None)  # of reviews.csv

    monkeypatch.setattr(pyro_blora, "load_pretrained", loaded)
    monkeypatch.setattr(comparison, "load_for", by_name)
    texts = [
        f"it {'sank' if i % 2 else 'soared'} {i} times,{'negative' if i % 2 else 'positive'}"
        for i in range(60)
    ]
    Path("reviews.csv").write_text("\n".join(["text,label", *texts]), encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/reference/cli.md", "Makefile"])
def test_the_commands_of_a_page_run(run, model_dir, page):
    """On a tiny network, in few steps, and else as they stand."""
    text = (ROOT / page).read_text("utf-8").replace("\\\n", "")
    variables = dict(re.findall(r"^([A-Z]+) [?:]= (.*)", text, re.MULTILINE))
    small = ["--model", str(model_dir), "--max-steps", "2", "--max-train", "16", "--rank", "2"]
    small += ["--max-validation", "8", "--max-test", "8", "--out", "out"]
    for line in COMMAND.findall(text):
        line = re.sub(r"\$\(([A-Z]+)\)", lambda found: variables[found[1]], line)
        run(*shlex.split(line, comments=True), *small)
    assert Path("out/results.json").exists()


PAGES = "README own_data peft evaluation generation pyro save_and_serve priors_and_guides"
PAGES += " reference/names"


@pytest.mark.filterwarnings("ignore:No threshold has")  # for a tiny network after two steps
@pytest.mark.filterwarnings("ignore:The adapter has not learned")
@pytest.mark.parametrize("name", PAGES.split())
def test_the_programs_of_a_page_run(name):
    """One after the other, and on one network: an adapter is taken off where another is made.

    A page that loads no network goes on from the README's last program. A warning is an error.
    """
    page = README if name == "README" else (ROOT / f"docs/{name}.md").read_text("utf-8")
    programs = BLOCK.findall(page.split("## lm-evaluation-harness")[0])
    if not any("load_pretrained(" in program for program in programs):
        programs.insert(0, BLOCK.findall(README)[-1])
    names: dict[str, object] = {}
    for program in programs:
        if "blora" in names and re.search(r"BayesianLoRA[.(]|bayesianize\(|compare\(", program):
            names["blora"].unwrap()
        for large, small in SMALLER.items():
            program = program.replace(large, small)
        exec(program, names)
    if name == "pyro":  # each label counts once, under NUTS
        assert names["blora"].likelihood.num_data == len(names["few"])
