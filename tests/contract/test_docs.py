"""The documentation: its examples are true, its links lead somewhere, its site is built."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyro_blora
from pyro_blora import guides, likelihoods, models, testing

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NAMES = [f"{room.__name__}.{n}" for room in (models, guides, likelihoods) for n in room.__all__]
NAMES += [f"pyro_blora.testing.{name}" for name in testing.__all__]


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for found in pkgutil.walk_packages(pyro_blora.__path__, "pyro_blora."):
        if not found.name.endswith("__main__"):
            owner = importlib.import_module(found.name)
            for test in finder.find(owner, extraglobs={"torch": torch, "nn": nn}):
                if test.examples:
                    yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("example", list(examples()))
def test_example(example):
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(example, out=output.append)
    assert result.failed == 0, "".join(output)


def anchors(page):
    """The headings of a page as GitHub names them."""
    text = FENCED.sub("", page.read_text("utf-8"))
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target} is not there"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target} has no such heading"


OTHERS = {"KeyError: 'labels'", "NaN", "has executed outside of supermodule"}  # messages of Pyro


def test_the_messages_of_troubleshooting_are_the_library_s():
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    heads = re.findall(r"^### `(.*)`$", page.partition("## Training")[0], re.MULTILINE)
    quoted = {text for head in heads for text in head.split("`, `")} - OTHERS
    files = [file for room in ("pyro_blora", "models") for file in (ROOT / room).rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    said = " ".join(str(node.value) for node in nodes if isinstance(node, ast.Constant))
    assert len(quoted) > 10
    assert {text for text in quoted if text not in said} == set()


def test_every_page_is_linked_from_the_readme():
    text = PAGES[0].read_text("utf-8")
    assert [p.name for p in PAGES[1:] if f"](docs/{p.name}" not in text] == []


def test_the_site_is_built_without_a_warning(tmp_path):
    """Sphinx warns of a page without a place in the menu, and of a name that is not there."""
    for name in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-d"]
    folders = [str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):  # a formula that is not typeset
        prose = re.sub(
            r"<(pre|code|script)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.DOTALL
        )
        assert not re.search(r"\$\\", prose), page.name
    pages = sorted((tmp_path / "site" / "reference").glob("*.html"))
    ids = set(re.findall(r' id="([\w.]+)"', "".join(page.read_text("utf-8") for page in pages)))
    assert {name for name in NAMES if name not in ids} == set()
    assert "pyro_blora.BayesianLoRA.save_pretrained" in ids  # inherited
    assert "pyro_blora.BayesianLoRA.zero_grad" not in ids  # torch's
