"""The programs and commands of the README and of other pages, as they stand but for their sizes."""

import json
import re
import shlex
from pathlib import Path

import peft
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyro_blora
from pyro_blora.evaluation import comparison

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
CLI = (ROOT / "docs/reference/cli.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
SMALLER = {
    "max_train=400, num_steps": "max_train=400, max_test=8, num_steps",
    "max_train=400": "max_train=16",
    "max_test=600": "max_test=8",
    r"(num|max)_steps=\d+": r"\1_steps=2",
    "num_epochs=6": "num_steps=2",
    r"range\(6\)": "range(1)",
    r"range\(400\)": "range(40)",
    r"seeds=\[0\],\n    max": "seeds=[0],\n    num_steps=2, max",
    '"sst2"': '"facts"',
    "num_samples=400, warmup_steps=200": "num_samples=4, warmup_steps=2",
    'validate_every": 50': 'validate_every": 1',
    r"\[(:?)(\d+)0(:?)\]": r"[\1\2\3]",  # a slice
}
SMALL = shlex.split("--max-steps 2 --rank 2 --max-train 16 --max-test 8")


@pytest.fixture(autouse=True)
def small(monkeypatch, model_dir, tmp_path):
    """A tiny network in place of SmolLM2, one in place of BERT, and a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    net = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def loaded(name, num_labels=None):
        if num_labels is None:
            return net, tokenizer
        padded = AutoTokenizer.from_pretrained(model_dir, pad_token="</s>")
        torch.manual_seed(0)  # the same base each time
        sizes = {"vocab_size": len(padded), "max_position_embeddings": 512}
        return tiny.bert(**sizes, num_labels=num_labels), padded

    def by_name(name, classes, seed):
        return loaded(name, classes if classes in (2, 24) else None)  # of reviews and of the desk

    monkeypatch.setattr(pyro_blora, "load_pretrained", loaded)
    monkeypatch.setattr(comparison, "load_for", by_name)
    words = [("soared", "positive"), ("sank", "negative")] * 30
    lines = [f"it {verb} {i} times,{label}" for i, (verb, label) in enumerate(words)]
    Path("tutorials").symlink_to(ROOT / "tutorials")
    Path("reviews.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    peft.get_peft_model(loaded("", 2)[0], config).save_pretrained("my_lora")
    rows = [json.dumps({"text": line, "label": len(line) / 2}) for line in lines]
    Path("ratings.jsonl").write_text("\n".join(rows), encoding="utf-8")


def test_the_commands_run(run, model_dir):
    commands = re.findall(r"^pyro-blora (\w+) (.*)", CLI, re.MULTILINE)
    (demo,) = re.findall(r"^DEMO := ((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)
    commands.append(("compare", demo.replace("\\\n", " ")))
    for name, options in commands:
        run(name, *shlex.split(options, comments=True), "--model", model_dir, *SMALL)
    assert Path("out/compare/results.json").exists()
    assert Path("out/demo/results.json").exists()


PAGES = "README own_data peft evaluation generation pyro save_and_serve priors_and_guides"
PAGES += " reference/names likelihoods"


@pytest.mark.filterwarnings("ignore:No threshold has")  # for a tiny network after two steps
@pytest.mark.filterwarnings("ignore:The adapter has not learned")
@pytest.mark.filterwarnings("ignore:The LoRA's NLL")  # which is untrained
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
            program = re.sub(large, small, program)
        exec(program, names)
    for kind in [made for word, made in names.items() if word.startswith("Test")]:
        contract = kind()
        for test in [test for test in dir(contract) if test.startswith("test_")]:
            getattr(contract, test)()
    if name == "pyro":  # each label counts once, under NUTS
        assert names["blora"].likelihood.num_data == len(names["few"])
