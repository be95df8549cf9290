"""Figures of the pages are in the reports, in tables in what ``<!-- report: SECTION -->`` names."""

import base64
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pyro_blora.data import load_task
from pyro_blora.evaluation.comparison import Comparison, _digest
from pyro_blora.evaluation.results import PREDICTED, Row
from pyro_blora.inference import RATES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted(ROOT.glob("benchmarks/results/*/report.md"))
REPORT = "\n".join(path.read_text("utf-8") for path in RESULTS)
TABLE = re.compile(r"<!-- report: (.*?) -->\n+((?:\|.*\n)+)")
FIGURE = re.compile(r"(?<![\d:.])\d+\.\d+(?: ± \d+\.\d+)?")  # and no arXiv:2106.09685


def section(title):
    """The figures of a section of the report; a page may leave a figure's error out."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n\n((?:(?!## ).*\n)+)", REPORT, re.MULTILINE)
    return {part for figure in FIGURE.findall(text) for part in (figure, figure.split(" ±")[0])}


@pytest.mark.parametrize("page", ["README.md", "docs/calibration.md"])
def test_the_figures_of_a_page_are_those_of_the_report(page):
    text = (ROOT / page).read_text("utf-8")
    for titles, table in TABLE.findall(text):
        known = set().union(*map(section, titles.split(" + ")))
        assert set(FIGURE.findall(table)) <= known, titles
    sentences = " ".join(re.sub(r"^\|.*\n", "", text, flags=re.MULTILINE).split())
    with_errors = {figure for figure in FIGURE.findall(sentences) if "±" in figure}
    assert with_errors
    assert with_errors <= set(FIGURE.findall(REPORT))


def printed(folder):
    """The comparison that ``compare(out=)`` wrote, and its settings."""
    folder = ROOT / "benchmarks/results" / folder
    document = json.loads((folder / "results.json").read_text("utf-8"))
    tensors = load_file(folder / "predictions.safetensors")
    rows = [
        Row(**row, **{name: tensors[f"{k} {name}"] for name in PREDICTED})
        for k, row in enumerate(document["rows"])
    ]
    return Comparison(rows), document["settings"]


def test_a_page_shows_what_the_demo_printed():
    table, settings = printed("demo")
    page = (ROOT / "docs/own_data.md").read_text("utf-8")
    assert table.to_markdown() in page
    data = load_task(str(ROOT / "tutorials/desk"), max_validation=0)
    assert settings["data"] == _digest((data.template, data.train, data.validation, data.test))
    assert settings["outside"] == _digest(data.outside(ROOT / "tutorials/desk/outside.csv"))
    steps, precision = settings["num_steps"], settings["precision"]
    assert f'num_steps={steps},\n    precision="{precision}",' in page
    command = " ".join((ROOT / "Makefile").read_text("utf-8").replace("\\\n", "").split())
    assert f"--seeds 0 --max-steps {steps} --precision {precision} --out" in command


def test_the_readme_shows_what_its_program_printed():
    readme, (table, settings) = (ROOT / "README.md").read_text("utf-8"), printed("readme")
    assert table.to_markdown() in readme
    said = r"wrong on (\d+) of its (\d+) answers .*?the draws on (\d+) of (\d+),"
    (counts,) = re.findall(said, readme, re.DOTALL)
    lora, _, ours = table.columns()["wrong above 95 %"]
    assert [lora, ours] == [" of ".join(counts[:2]), " of ".join(counts[2:])]
    (program,) = re.findall(r"^table = compare\(.*?^\)", readme, re.DOTALL | re.MULTILINE)
    parts = [f'"{row.method}"' for row in table.rows] + [settings["network"], settings["task"]]
    parts += [f"{key}={settings[key]}," for key in ("max_train", "max_test")]
    assert [part for part in parts if part not in program] == []


def test_the_ratios_of_the_page_on_cost_are_those_of_its_file():
    page = (ROOT / "docs/cost.md").read_text("utf-8").partition("## How it was measured")[0]
    known = (ROOT / "benchmarks/results/cost/ratios.csv").read_text("utf-8")
    assert set(FIGURE.findall(page)) <= set(FIGURE.findall(known))


def test_the_rates_of_the_page_on_hyperparameters_are_the_defaults():
    page = (ROOT / "docs/hyperparameters.md").read_text("utf-8")
    rates = dict(re.findall(r'^\| `"(\w+)"`.*? \| ([\d.]+) \|', page, re.MULTILINE))
    assert {role: float(rate) for role, rate in rates.items()} == {k: RATES[k] for k in rates}
    assert len(rates) == 4


def test_the_picture_of_the_readme_is_that_of_the_quickstart():
    cells = json.loads((ROOT / "tutorials/00_quickstart.ipynb").read_text("utf-8"))["cells"]
    outputs = [out.get("data", {}) for cell in cells for out in cell.get("outputs", [])]
    first = next(data["image/png"] for data in outputs if "image/png" in data)
    assert (ROOT / "docs/_static/draws.png").read_bytes() == base64.b64decode(first)
