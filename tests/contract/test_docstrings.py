"""The examples in the documentation are true; ruff sees that there are docstrings."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import pyro_blora

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(pyro_blora.__path__, "pyro_blora.")
    if not found.name.endswith("__main__")
)


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        owner = importlib.import_module(name)
        for test in finder.find(owner, extraglobs={"torch": torch, "nn": nn}):
            if test.examples:
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("example", list(examples()))
def test_example(example):
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(example, out=output.append)
    assert result.failed == 0, "".join(output)
