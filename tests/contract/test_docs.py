"""The documentation: its examples are true, its links lead somewhere, its site is built."""

import doctest
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyro_blora

ROOT = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
MODULES = [module.name for module in pkgutil.walk_packages(pyro_blora.__path__, "pyro_blora.")]


def test_the_examples_of_docstrings():
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for name in MODULES:
        module, given = importlib.import_module(name), {"torch": torch, "nn": nn}
        assert doctest.testmod(module, extraglobs=given, optionflags=flags).failed == 0, name


def test_links_lead_to_files():
    """Sphinx sees to headings, and not to files that are no pages of the site."""
    tutorials = [
        page for page in (ROOT / "tutorials").glob("*.*") if page.suffix in (".md", ".ipynb")
    ]
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *tutorials):
        for target in re.findall(r"\]\(([^)\s:#]+)[#)]", FENCED.sub("", page.read_text("utf-8"))):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_version_is_the_same_everywhere():
    assert importlib.metadata.version("pyro-blora") == pyro_blora.__version__
    for file, first in {"CHANGELOG.md": "\n## {},", "CITATION.cff": "\nversion: {}\n"}.items():
        assert first.format(pyro_blora.__version__) in (ROOT / file).read_text("utf-8")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """Sphinx warns of a page without a place in the menu, and of a name that is not there."""
    for name in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(name)
    parts = "myst_nb,sphinx.ext.autodoc,sphinx.ext.napoleon"  # without pages of the code itself
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-D", f"extensions={parts}"]
    done = subprocess.run([*command, "docs", tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
