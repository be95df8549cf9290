"""Tables of the pages are those of the report that ``<!-- report: SECTION -->`` names above."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = (ROOT / "benchmarks/results/calibration/report.md").read_text("utf-8")
METHODS = {
    "LoRA": "lora",
    "LoRA + temperature": "temperature:lora",
    "LoRA, best step": "lora-best",
    "LoRA, best step + temperature": "temperature:lora-best",
    "`BayesianLoRA(net)`": "bayesian-lora",
    "`BayesianLoRA(net)` + temperature": "temperature:bayesian-lora",
    "posterior mean": "bayesian-lora-mean",
    "distilled": "bayesian-lora-distilled",
    "`bayesianize`": "bayesianize",
    "`from_peft`": "from-peft",
    "posterior mean (`num_samples=0`)": "bayesian-lora-mean",
    "4 draws": "bayesian-lora-4",
    "8 draws": "bayesian-lora",
    "64 draws": "bayesian-lora-64",
    "`dropout`": "dropout",
    "`laplace-lora`": "laplace-lora",
}
TABLE = re.compile(r"<!-- report: (.*?) -->\n+((?:\|.*\n)+)")
FIGURE = re.compile(r"\d+\.\d+(?:(?: ±|,) \d+\.\d+)*")


def body(table):
    """The rows under a table's head: the first cell, and the figures."""
    for line in table.splitlines()[2:]:
        yield line.split("|")[1].strip(), FIGURE.findall(line)


def section(title):
    """The first table of a section of the report, or that of seed 0, by the first cell."""
    title, alone, _ = title.partition(" (seed 0)")
    (text,) = re.findall(rf"^## {re.escape(title)}\n\n((?:(?!## ).*\n)+)", REPORT, re.MULTILINE)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return dict(body(tables[bool(alone)]))


@pytest.mark.parametrize(
    ("page", "count"), [("README.md", 1), ("docs/calibration.md", 7), ("docs/faq.md", 3)]
)
def test_the_tables_of_a_page_are_the_report_s(page, count):
    tables = TABLE.findall((ROOT / page).read_text("utf-8"))
    assert len(tables) == count
    for titles, table in tables:
        sections = [section(title) for title in titles.split(" + ")]
        for name, figures in body(table):
            row = name if name.isdigit() else METHODS[name]
            told = [figure for found in sections for figure in found[row]]
            told += [figure.split(" ±")[0] for figure in told]  # or without its error
            assert figures
            assert [figure for figure in figures if figure not in told] == [], (titles, name)
