"""Figures of the pages are in the reports, in tables in what ``<!-- report: SECTION -->`` names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted(ROOT.glob("benchmarks/results/*/report.md"))
REPORT = "\n".join(path.read_text("utf-8") for path in RESULTS)
MARKED = [page for page in ROOT.glob("docs/*.md") if "<!-- report:" in page.read_text("utf-8")]
PAGES = sorted({"README.md", "docs/calibration.md", *(f"docs/{page.name}" for page in MARKED)})
TABLE = re.compile(r"<!-- report: (.*?) -->\n+((?:\|.*\n)+)")
FIGURE = re.compile(r"(?<![\d:.])\d+\.\d+(?: ± \d+\.\d+)?")  # and no arXiv:2106.09685


def section(title):
    """The figures of a section of the report; a page may leave a figure's error out."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n\n((?:(?!## ).*\n)+)", REPORT, re.MULTILINE)
    return {part for figure in FIGURE.findall(text) for part in (figure, figure.split(" ±")[0])}


@pytest.mark.parametrize("page", PAGES)
def test_the_figures_of_a_page_are_those_of_the_report(page):
    tables = TABLE.findall((ROOT / page).read_text("utf-8"))
    assert tables
    for titles, table in tables:
        known = set().union(*map(section, titles.split(" + ")))
        assert set(FIGURE.findall(table)) <= known, titles


def test_the_ratios_of_the_page_on_cost_are_those_of_its_file():
    page = (ROOT / "docs/cost.md").read_text("utf-8").partition("## How it was measured")[0]
    known = (ROOT / "benchmarks/results/cost/ratios.csv").read_text("utf-8")
    assert set(FIGURE.findall(page)) <= set(FIGURE.findall(known))
