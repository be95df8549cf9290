"""Figures in tables of the pages are those that the benchmark's report has of the same method."""

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
    "8 draws": "bayesian-lora",
    "`bayesianize`": "bayesianize",
    "`from_peft`, 100 steps of `fit`": "from-peft",
}
FIGURE = re.compile(r"\d+\.\d+(?: ± \d+\.\d+)?")


def rows(page):
    """Method and figures of each row of a table that names a method."""
    for line in (ROOT / page).read_text("utf-8").splitlines():
        cells = [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
        named = [METHODS[cell] for cell in cells if cell in METHODS]
        if line.startswith("|") and named:
            yield named[0], FIGURE.findall(line)


@pytest.mark.parametrize(("page", "count"), [("README.md", 4), ("docs/calibration.md", 30)])
def test_the_figures_of_a_page_are_the_report_s(page, count):
    found = list(rows(page))
    assert len(found) >= count
    for method, figures in found:
        told = [line for line in REPORT.splitlines() if line.startswith(f"| {method} |")]
        own = {figure for line in told for figure in FIGURE.findall(line)}
        means = own | {figure.partition(" ±")[0] for figure in own}
        assert figures
        assert [figure for figure in figures if figure not in means] == [], (method, page)
