"""Tables of the pages are those of the report that ``<!-- report: SECTION -->`` names above."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = (ROOT / "benchmarks/results/calibration/report.md").read_text("utf-8")
METHODS = {  # a name in code that is not here is the report's own
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
    "posterior mean (`num_samples=0`)": "bayesian-lora-mean",
    "four draws": "bayesian-lora-4",
    "4 draws": "bayesian-lora-4",
    "8 draws": "bayesian-lora",
    "64 draws": "bayesian-lora-64",
}
TABLE = re.compile(r"<!-- report: (.*?) -->\n+((?:\|.*\n)+)")
FIGURE = re.compile(r"(?<![\d:])\d+\.\d+(?:(?: ±|,) \d+\.\d+)*")  # and no arXiv:2106.09685


def body(table):
    """The rows under a table's head: the method, or None if the head has none; the figures."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
    for cells in rows:
        name = cells[head.index("method")] if "method" in head else None
        yield name, FIGURE.findall(" | ".join(cells))


def section(title):
    """The figures of a section's first table, or that of seed 0, by method, and under None all."""
    title, alone, _ = title.partition(" (seed 0)")
    (text,) = re.findall(rf"^## {re.escape(title)}\n\n((?:(?!## ).*\n)+)", REPORT, re.MULTILINE)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return {**dict(body(tables[bool(alone)])), None: FIGURE.findall(text)}


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ("README.md", 1),
        ("docs/calibration.md", 3),
        ("docs/choose.md", 2),
        ("docs/faq.md", 3),
        ("docs/priors_and_guides.md", 1),
    ],
)
def test_the_tables_of_a_page_are_the_report_s(page, count):
    tables = TABLE.findall((ROOT / page).read_text("utf-8"))
    assert len(tables) == count
    for titles, table in tables:
        sections = [section(title) for title in titles.split(" + ")]
        for name, figures in body(table):
            rows = [METHODS.get(name, name.strip("`")) if name else None]
            if "| with a temperature |" in table:
                rows.append(f"temperature:{rows[0]}")
            told = [figure for found in sections for row in rows for figure in found.get(row, [])]
            told += [figure.split(" ±")[0] for figure in told]  # a page may leave the error out
            assert figures
            assert [figure for figure in figures if figure not in told] == [], (titles, name)
