"""Figures of the pages are in the reports, in tables in what ``<!-- report: SECTION -->`` names."""

import json
import math
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pyro_blora.evaluation.comparison import Comparison
from pyro_blora.evaluation.results import Row
from pyro_blora.inference import RATES
from pyro_blora.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted(ROOT.glob("benchmarks/results/*/report.md"))
REPORT = "\n".join(path.read_text("utf-8") for path in RESULTS)
PAGES = sorted(p for p in ROOT.glob("docs/*.md") if "<!-- report:" in p.read_text("utf-8"))
TABLE = re.compile(r"<!-- report: (.*?) -->\n+((?:\|.*\n)+)")
FIGURE = re.compile(r"(?<![\d:.])\d+\.\d+(?: ± \d+\.\d+)?")  # and no arXiv:2106.09685


def section(title):
    """The figures of a section of the report; a page may leave a figure's error out."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n\n((?:(?!## ).*\n)+)", REPORT, re.MULTILINE)
    return {part for figure in FIGURE.findall(text) for part in (figure, figure.split(" ±")[0])}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_figures_of_a_page_are_those_of_the_report(page):
    text = page.read_text("utf-8")
    tables = TABLE.findall(text)
    assert tables
    with_errors = {figure for figure in FIGURE.findall(TABLE.sub("", text)) if "±" in figure}
    assert with_errors <= set(FIGURE.findall(REPORT))
    for titles, table in tables:
        known = set().union(*map(section, titles.split(" + ")))
        assert set(FIGURE.findall(table)) <= known, titles


@pytest.mark.parametrize("page", ["README.md", "docs/choose.md"])
def test_the_figures_in_sentences_are_those_of_the_report(page):
    text = re.sub(r"^\|.*\n", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE)
    with_errors = {figure for figure in FIGURE.findall(text) if "±" in figure}
    assert with_errors
    assert with_errors <= set(FIGURE.findall(REPORT))


def lines(file):
    """The lines of a file of the calibration benchmark."""
    path = ROOT / "benchmarks/results/calibration" / file
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("method", ["lora", "lora-split"])
def test_a_rate_of_smollm2_is_best_on_the_mean_of_its_tasks_and_not_on_sst2(method):
    """The page has the NLL of the rate that was taken, and of the best one on SST-2 alone."""
    page = (ROOT / "docs/calibration.md").read_text("utf-8")
    found = {"sst2": {}, "arc_easy": {}}
    for line in lines("trials.jsonl"):
        if (line["network"], line["method"]) == ("smollm2", method):
            found[line["task"]][line["settings"]["fit"]["learning_rates"]] = line["nll"]
    sst2, arc_easy = found.values()
    taken = min(arc_easy, key=lambda rate: sst2[rate] + arc_easy[rate])
    best = min(sst2, key=sst2.__getitem__)
    assert taken == 2e-4
    assert best in (min(sst2), max(sst2))  # the grid's edge
    assert {f"{sst2[taken]:.3f}", f"{sst2[best]:.3f}"} <= set(FIGURE.findall(page))


def test_the_rivals_that_were_run_are_those_of_the_pages():
    ran = {}
    for cell in lines("cells.jsonl"):
        if (cell["steps"], cell["max_train"]) == (300, 400) and cell["task"] != "openbookqa":
            ran.setdefault((cell["network"], cell["task"]), set()).add(cell["method"])
    everywhere = set.intersection(*ran.values())
    own = {name for name in everywhere if name.startswith("bayesian-lora")}
    assert everywhere - own == {"lora", "lora-split"}
    assert {*ran["gemma", "sst2"], *ran["smollm2", "arc_easy"]} <= {
        *everywhere,
        "zero-shot",
        "bayesian-lora-linearized",
    }
    of_minilm = ran["minilm", "sst2"] & ran["minilm", "ag_news"] - everywhere
    assert of_minilm == {"map", "ensemble-split", "dropout-split", "lora-best"}
    page = " ".join((ROOT / "docs/calibration.md").read_text("utf-8").split())
    (unrun,) = re.findall(r"all five tasks\. (.*?) and (\S+), which \[the library has\]", page)
    unrun = {name.lower() for part in unrun for name in part.split(", ")}
    assert unrun <= set(METHODS)
    assert not unrun & set().union(*ran.values())


def test_the_wins_over_split_lora_that_seeds_leave_clear_are_on_sst2():
    """In sections of one task each, whose rows have the errors over items and over seeds."""
    title = r"^## (\w+): (\w+), 400 training items, 300 steps\n((?:(?!## ).*\n)+)"
    row = r"^\| lora-split \| 3 \| (\S+) ± (\S+) ± (\S+) \|"
    clear = {}
    for network, task, text in re.findall(title, REPORT, re.MULTILINE):
        for gap, items, seeds in re.findall(row, text, re.MULTILINE):
            errors = -float(gap) / math.hypot(float(items), float(seeds))
            clear |= {(network, task): errors} if errors > 2 else {}
    assert set(clear) == {("smollm2", "sst2"), ("gemma", "sst2")}
    page = " ".join((ROOT / "docs/calibration.md").read_text("utf-8").split())
    assert f"with Gemma by {clear['gemma', 'sst2']:.1f} standard errors" in page


def test_the_readme_shows_what_its_program_printed():
    """``compare(out=)`` wrote the results, whose settings are those of the program."""
    readme, folder = (ROOT / "README.md").read_text("utf-8"), ROOT / "benchmarks/results/readme"
    document = json.loads((folder / "results.json").read_text("utf-8"))
    found = load_file(folder / "predictions.safetensors")
    kept = ("probs", "labels")
    rows = [
        Row(**row, **{key: found[f"{k} {key}"] for key in kept})
        for k, row in enumerate(document["rows"])
    ]
    assert Comparison(rows).to_markdown() in readme
    program = re.search(r"table = compare\(.*?^\)", readme, re.DOTALL | re.MULTILINE)
    settings = document["settings"]
    assert program
    for said in (settings["network"], settings["task"], *(f'"{row.method}"' for row in rows)):
        assert said in program.group()
    for key in ("max_train", "max_test"):
        assert f"{key}={settings[key]}," in program.group()
    assert "0.0002" in str(settings["methods"]["lora"])
    assert '"mean": 2e-4' in program.string


def test_the_ratios_of_the_page_on_cost_are_those_of_its_file():
    page = (ROOT / "docs/cost.md").read_text("utf-8").partition("## How it was measured")[0]
    known = (ROOT / "benchmarks/results/cost/ratios.csv").read_text("utf-8")
    assert set(FIGURE.findall(page)) <= set(FIGURE.findall(known))


def test_the_rates_of_the_page_on_hyperparameters_are_the_defaults():
    page = (ROOT / "docs/hyperparameters.md").read_text("utf-8")
    rates = dict(re.findall(r'^\| `"(\w+)"`.*? \| ([\d.]+) \|', page, re.MULTILINE))
    assert {role: float(rate) for role, rate in rates.items()} == {k: RATES[k] for k in rates}
    assert len(rates) == 4
