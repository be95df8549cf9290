"""docs/priors_and_guides.md: its programs run, and its tables are complete."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.methods import METHODS, get_method
from pyro_blora.testing import PriorContract

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "priors_and_guides.md").read_text("utf-8")
PRIOR, SHARED, GUIDE, CHECK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


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
        assert f"| `{name}` |" in PAGE, name
    for name in set(METHODS) - {"lora"}:  # plain LoRA is no posterior
        assert f"`{name}`" in PAGE
    pairs = set(re.findall(r"`(\w+\+\w+)`", PAGE)) - {"PRIOR+GUIDE"}
    assert len(pairs) > 10
    for pair in pairs:
        get_method(pair)


def test_the_pairs_that_are_refused_are_listed_and_say_why():
    with torch.device("meta"):
        net, refused = LlamaForCausalLM(LlamaConfig()), {}  # Llama-2-7B
    for pair in (f"{prior}+{guide}" for prior in tiny.priors() for guide in tiny.families()):
        parts = {"prior": get_method(pair).prior_of(8), "guide": get_method(pair).guide_of()}
        try:
            BayesianLoRA(net, target_modules=["q_proj", "v_proj"], **parts).unwrap()
        except ConfigurationError as error:
            refused[pair] = str(error)
    listed = PAGE.split("## Pairs that are refused")[1].split("## A prior")[0]
    assert 0 < len(refused) < 10
    assert set(refused) == set(re.findall(r"`(\w+\+\w+)`", listed))
    for told in refused.values():
        assert re.search(r"in each layer.*max_.*; use .*or raise", told)
