"""The notebooks run as they stand, and what they keep of a run is fit to be shown."""

import base64
import json
import re
from pathlib import Path

import matplotlib
import pyro
import pytest

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
LISTED = (TUTORIALS / "README.md").read_text("utf-8")
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
# those that make their network and their data, and so run in seconds
LIGHT = (
    "01_anatomy_of_one_update",
    "02_a_prior_of_your_own",
    "03_a_guide_of_your_own",
    "05_svi_from_scratch",
    "08_learning_the_rank",
)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
    return json.loads(path.read_text("utf-8"))["cells"]


def code(path):
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def images(cell):
    data = [output.get("data", {}) for output in cell.get("outputs", ())]
    return [base64.b64decode("".join(d["image/png"])) for d in data if "image/png" in d]


@pytest.mark.parametrize("name", LIGHT)
def test_it_runs(name, monkeypatch):
    """Cell by cell in one namespace, without a kernel; a warning is an error here."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.chdir(TUTORIALS)
    monkeypatch.syspath_prepend(str(TUTORIALS))  # as a kernel has its own folder
    path, names = TUTORIALS / f"{name}.ipynb", {"__name__": "__main__"}
    with pyro.settings.context(module_local_params=False), matplotlib.rc_context():
        try:
            for number, cell in enumerate(code(path), 1):
                exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
        finally:
            pyplot.close("all")


@each_notebook
def test_its_outputs_are_of_one_run_without_errors_warnings_or_paths(path):
    counts = [cell["execution_count"] for cell in code(path)]
    assert counts == list(range(1, len(counts) + 1))
    for output in (output for cell in code(path) for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        data = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
        said = json.dumps({**output, "data": data})
        assert not re.search(r"Warning|(?<![\w.])/(tmp|home|root|usr|Users)/|0x[0-9a-f]{6}", said)


@each_notebook
def test_its_figures_are_small_and_the_text_below_says_what_one_sees(path):
    below = [*cells(path)[1:], {"cell_type": "none"}]
    for cell, text in zip(cells(path), below, strict=True):
        assert all(len(image) < 60_000 for image in images(cell))
        assert not images(cell) or text["cell_type"] == "markdown"
        assert not images(cell) or "sees: " in "".join(text["source"])


@each_notebook
def test_it_opens_with_what_you_will_be_able_to_do_and_is_listed(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert "you will be able to" in "".join(first["source"])
    assert f"]({path.name})" in LISTED


def test_links_resolve_and_pictures_are_small():
    texts = ["".join(c["source"]) for p in NOTEBOOKS for c in cells(p) if "outputs" not in c]
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join([*texts, LISTED]))
    for target in targets:
        path = TUTORIALS / target.partition("#")[0]
        assert "://" in target or path.exists(), target
        assert path.suffix != ".png" or path.stat().st_size < 60_000, target
