"""docs/priors_and_guides.md: its programs run, and its tables are complete."""

import re
from pathlib import Path

import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.methods import METHODS
from pyro_blora.testing import PriorContract

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "priors_and_guides.md").read_text("utf-8")
NAMES = {}
for program in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
    if "compare(" not in program:  # tests/cli/test_readme.py runs it
        exec(program, NAMES)
# The page's own tests of its prior and its guide, and one of the prior that has a shared site
TestSpikeAndSlab, TestHeavyTails = NAMES["TestSpikeAndSlab"], NAMES["TestHeavyTails"]
tiny.contract(globals(), PriorContract, "SharedScale", make=NAMES["SharedScale"](rank=2))


def test_every_class_method_and_refused_pair_is_on_the_page():
    cells = {f"| `{name}` |" for name in (*tiny.priors(), *tiny.families())}
    cells |= {f"`{name}`" for name in set(METHODS) - {"lora"}}  # plain LoRA is no posterior
    assert {cell for cell in cells if cell not in PAGE} == set()
    with torch.device("meta"):
        net, refused = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)), set()  # of Llama-2-7B
    for pair in (f"{prior}+{guide}" for prior in tiny.priors() for guide in tiny.families()):
        try:
            BayesianLoRA(net, target_modules=["q_proj", "v_proj"], method=pair, rank=8).unwrap()
        except ConfigurationError:
            refused.add(pair)
    listed = PAGE.split("## Pairs that are refused")[1].split("## A prior")[0]
    assert refused == set(re.findall(r"`(\w+\+\w+)`", listed))
