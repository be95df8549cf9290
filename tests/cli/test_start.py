"""How the command starts: without torch, and with every option checked before a model is read."""

import subprocess
import sys

import pytest

from pyro_blora import cli
from pyro_blora._version import __version__
from pyro_blora.cli._arguments import TASK_NAMES
from pyro_blora.data import hub_tasks
from pyro_blora.errors import ConfigurationError
from pyro_blora.network import pretrained

HEAVY = ("torch", "pyro", "transformers", "gpytorch", "matplotlib")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["compare", "--help"],
        ["compare", "--methods", "lorra"],
        ["train", "--out", "x", "--precision", "half"],
        ["train", "--out", "x", "--method", "blub"],
        ["info", "--sseed"],
        ["compare", "--task", "fact"],
        ["train", "--out", "x", "--task", "fact"],
        ["evaluate", "--adapter", "nowhere/at/all"],
        ["evaluate", "--adapter", ".", "--ood", "fact"],
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    program = f"""
import sys
import pyro_blora
from pyro_blora import cli
sys.argv = ["pyro-blora", *{arguments!r}]
try:
    cli.main()
except SystemExit:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_names_in_the_help_are_those_there_are(run):
    assert set(TASK_NAMES) == {"facts", *hub_tasks()}
    _, text, _ = run("info", "--help", columns=400)
    assert f"({', '.join(pretrained.SHAPES)})" in text
    assert run("--version") == (0, f"pyro-blora {__version__}\n", "")


def test_every_name_of_the_package_is_found():
    program = """
from pyro_blora import *
import pyro_blora
assert set(pyro_blora.__all__) <= set(dir(pyro_blora)) & {*globals(), "__version__"}
assert pyro_blora.inference.fit is fit and pyro_blora.network.shortcuts.Shortcuts
assert not hasattr(pyro_blora, "nothing")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_but_the_result_is_said():
    """Not even by torchao, where it is installed."""
    command = [sys.executable, "-m", cli.__name__.split(".")[0], "info", "--model", "smollm2"]
    done = subprocess.run([*command, "--target-modules", "q_proj"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("load", [pretrained.load_pretrained, pretrained.shape_only])
def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch, load):
    import huggingface_hub

    asked = []

    def metadata(url):
        asked.append(url)
        raise ConnectionError("no such host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigurationError, match=r"no folder .*no such host.*smollm2"):
        load("some/nme")
    assert len(asked) == 1
