"""docs/priors_and_guides.md: its programs run, its tables are complete, its sizes are right."""

import importlib.util
import re
from pathlib import Path

import pytest
import tiny

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Delta, MeanField
from pyro_blora.methods import METHODS, get_method
from pyro_blora.models import UpdateModel
from pyro_blora.network.pretrained import shape_only
from pyro_blora.testing import PriorContract

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "priors_and_guides.md").read_text("utf-8")
PRIOR, SHARED, GUIDE, CHECK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
spec = importlib.util.spec_from_file_location("matrix", ROOT / "benchmarks" / "matrix.py")
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)


def made(source, name):
    names = {}
    exec(source, names)
    return names[name]


def own_lines(source):
    lines = [line for line in source.splitlines() if line.strip()]
    return len([line for line in lines if not line.startswith(("import ", "from "))])


def test_the_classes_of_the_page_are_short():
    assert max(own_lines(PRIOR), own_lines(GUIDE)) <= 15
    assert own_lines(CHECK) <= 8


tiny.contract(globals(), PriorContract, "Shared", make=made(PRIOR + SHARED, "SharedScale")(rank=2))


def checks():
    names = {"SpikeAndSlab": made(PRIOR, "SpikeAndSlab"), "HeavyTails": made(GUIDE, "HeavyTails")}
    exec(CHECK, names)
    for kind in (names["TestSpikeAndSlab"], names["TestHeavyTails"]):
        for name in dir(kind):
            if name.startswith("test_"):
                yield pytest.param(kind, name, id=f"{kind.__name__}-{name}")


@pytest.mark.parametrize(("kind", "name"), list(checks()))
def test_the_classes_of_the_page_keep_the_contract_of_the_page(kind, name):
    getattr(kind(), name)()


def test_every_class_and_every_method_is_on_the_page():
    for name in (*tiny.priors(), *tiny.families()):
        assert PAGE.count(f"`{name}`") >= 2, name  # what it is for, and its size
    for name in set(METHODS) - {"lora"}:  # plain LoRA is no posterior
        assert f"`{name}`" in PAGE
    pairs = set(re.findall(r"`(\w+\+\w+)`", PAGE)) - {"PRIOR+GUIDE"}
    assert len(pairs) > 10
    for pair in pairs:
        get_method(pair)


def sizes():
    lines = PAGE.split(matrix.BEGIN)[1].split(matrix.END)[0].strip().splitlines()
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def test_the_sizes_are_those_of_the_benchmark():
    table, net = sizes(), shape_only("llama-2-7b")
    assert set(table) == {*tiny.families(), "*the prior itself*"}
    for prior in matrix.classes(matrix.models, UpdateModel):
        assert set(table["Delta"]) == set(tiny.priors())
        for guide in (Delta, MeanField):
            found = matrix.size(net, prior, guide)
            assert table["*the prior itself*"][prior.__name__] == matrix.short(found[0])
            assert table[guide.__name__][prior.__name__] == matrix.short(found[1])


def test_refused_pairs_are_listed_are_few_and_say_why():
    table, net = sizes(), shape_only("llama-2-7b")
    refused = {f"{p}+{g}" for g, row in table.items() for p, cell in row.items() if cell == "-"}
    listed = PAGE.split("### Pairs that are refused")[1].split("## A prior")[0]
    assert refused == set(re.findall(r"`(\w+\+\w+)`", listed))
    assert 0 < len(refused) <= 0.1 * len(tiny.priors()) * len(tiny.families())
    for pair in refused:
        made_of = get_method(pair)
        with pytest.raises(ConfigurationError, match=r"in each layer.*max_.*; use .*or raise"):
            tiny.adapted(net, prior=made_of.prior_of(8), guide=made_of.guide_of())
