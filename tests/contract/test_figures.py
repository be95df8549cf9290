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
    "`from_peft` + temperature": "temperature:from-peft",
    "four draws": "bayesian-lora-4",
}
TABLE = re.compile(r"<!-- report: (.*?) -->\n+((?:\|.*\n)+)")
FIGURE = re.compile(r"\d+\.\d+(?:(?: ±|,) \d+\.\d+)*")


def body(table):
    """The rows under a table's head: the method, or None if the head has none; the figures."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
    for cells in rows:
        name = cells[head.index("method")] if "method" in head else None
        yield name, FIGURE.findall(" | ".join(cells))


def section(title):
    """A section of the report: the figures of its first table by method, and under None all."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n\n((?:(?!## ).*\n)+)", REPORT, re.MULTILINE)
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return {**dict(body(table[0])), None: FIGURE.findall(text)}


@pytest.mark.parametrize(
    ("page", "count"), [("README.md", 1), ("docs/calibration.md", 3), ("docs/choose.md", 2)]
)
def test_the_tables_of_a_page_are_the_report_s(page, count):
    tables = TABLE.findall((ROOT / page).read_text("utf-8"))
    assert len(tables) == count
    for titles, table in tables:
        sections = [section(title) for title in titles.split(" + ")]
        for name, figures in body(table):
            row = METHODS[name] if name else None
            told = [figure for found in sections for figure in found.get(row, [])]
            told += [figure.split(" ±")[0] for figure in told]  # a page may leave the error out
            assert figures
            assert [figure for figure in figures if figure not in told] == [], (titles, name)
