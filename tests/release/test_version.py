"""The version, which has one home, `pyro_blora/_version.py`, and is told in two other files."""

import importlib.metadata
import re
from pathlib import Path

import pyro_blora

ROOT = Path(__file__).resolve().parents[2]
FIRST = {"CHANGELOG.md": r"^## ([^,\s]+)", "CITATION.cff": r"^version: (\S+)"}


def test_it_is_told_alike():
    assert importlib.metadata.version("pyro-blora") == pyro_blora.__version__
    for file, first in FIRST.items():
        found = re.search(first, (ROOT / file).read_text("utf-8"), re.MULTILINE)
        assert found
        assert found[1] == pyro_blora.__version__, file
