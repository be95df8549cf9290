"""The site: an entry for every public name, a place for every page, no warning as it is built."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import get_origin

import pytest

import pyro_blora

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
MODULES = [
    "pyro_blora",
    *(
        found.name
        for found in pkgutil.walk_packages(pyro_blora.__path__, "pyro_blora.")
        if "._" not in found.name and not found.name.endswith("__main__")
    ),
]
DIRECTIVE = re.compile(r"^\.\. auto(\w+):: ([\w.]+).*\n((?:   :.*\n)*)", re.MULTILINE)


def listed(options, name):
    found = re.search(rf"^   :{name}: (.+)$", options, re.MULTILINE)
    return found[1].split(", ") if found else []


def entries(text):
    """Path and object of all that the directives of a page describe, as Sphinx reads them.

    Of a module functions and classes; constants and type aliases are named one by one.
    """
    for kind, target, options in DIRECTIVE.findall(text):
        if kind == "module":
            owner = importlib.import_module(target)
            chosen = listed(options, "members") or getattr(owner, "__all__", ())
            left_out = listed(options, "exclude-members")
            assert set(left_out) <= set(owner.__all__ if left_out else ()), target
            for name in set(chosen) - set(left_out):
                value = getattr(owner, name)
                if get_origin(value):  # an alias of types, a class to Python 3.10
                    continue
                if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
                    yield f"{target}.{name}", value
        else:
            place, name = target.rsplit(".", 1)
            yield target, getattr(importlib.import_module(place), name)


def described():
    return [entry for page in REFERENCE for entry in entries(page.read_text("utf-8"))]


def test_every_public_name_has_one_entry():
    pages = [(path.split(".")[-1], id(value)) for path, value in described()]
    wanted = {}
    for module in MODULES:
        owner = importlib.import_module(module)
        for name in getattr(owner, "__all__", ()):
            wanted.setdefault((name, id(getattr(owner, name))), f"{module}.{name}")
    assert len(wanted) > 50
    assert {where: pages.count(key) for key, where in wanted.items() if pages.count(key) != 1} == {}


def test_a_missing_name_would_be_found():
    text = ".. automodule:: pyro_blora.errors\n   :exclude-members: BatchError, near_miss\n"
    found = dict(entries(text))
    assert "pyro_blora.errors.CheckpointError" in found
    assert not {"pyro_blora.errors.BatchError", "pyro_blora.errors.near_miss"} & set(found)
    text = ".. automodule:: pyro_blora.errors\n   :members: BatchError\n"
    assert dict(entries(text)) == {"pyro_blora.errors.BatchError": pyro_blora.errors.BatchError}


@pytest.mark.parametrize("folder", [DOCS, DOCS / "reference"], ids=lambda folder: folder.name)
def test_every_page_has_its_place_in_the_menu(folder):
    text = (folder / "index.md").read_text("utf-8")
    menus = re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
    placed = [line for menu in menus for line in menu.split("\n") if re.match(r"^\w", line)]
    pages = {path.stem for path in folder.glob("*.md")} - {"index"}
    assert sorted(p for p in placed if "/" not in p) == sorted(pages)


def test_the_parts_of_the_readme_are_there():
    readme = (ROOT / "README.md").read_text("utf-8")
    marks = re.findall(
        r'^:(?:start-after|end-before): "(.*)"$', (DOCS / "index.md").read_text("utf-8"), re.M
    )
    assert len(marks) == 4
    assert [readme.count(mark) for mark in marks] == [1] * 4


def test_it_is_built_without_a_warning(tmp_path):
    for name in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-d"]
    done = subprocess.run(
        [*command, str(tmp_path / "trees"), str(DOCS), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site" / "reference").glob("*.html"))
    ids = set(re.findall(r' id="([\w.]+)"', "".join(page.read_text("utf-8") for page in pages)))
    assert {path for path, value in described() if not inspect.ismodule(value)} - ids == set()
    assert "pyro_blora.BayesianLoRA.save_pretrained" in ids  # inherited
    assert "pyro_blora.BayesianLoRA.zero_grad" not in ids  # torch's
