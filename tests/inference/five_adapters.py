"""Five adapters, what each is asked, and a program that asks each in a process of its own."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from pyro_blora import BayesianLoRA, fit
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.models import KroneckerInducing

BATCH = tiny.sequences()


def net():
    torch.manual_seed(0)
    return tiny.llama()


def likelihood():
    return LabelTokens(token_ids=tiny.ANSWERS, num_data=10)


def trained_on(blora, steps):
    rows = tiny.examples()
    fit(blora, rows, collate=tiny.collate, num_steps=steps, progress=False, precision="float32")
    return blora


def adapted(seed, base, steps=5):
    torch.manual_seed(seed)
    return trained_on(tiny.adapted(base, likelihood=likelihood()), steps)


def alone(folder):
    """Each adapter by its kind, without any other."""
    return {
        "trained": lambda: adapted(1, net()),
        "loaded": lambda: BayesianLoRA.from_pretrained(net(), folder / "saved"),
        "peft": lambda: trained_on(
            BayesianLoRA.from_peft(net(), folder / "lora", likelihood=likelihood()), 2
        ),
        "copied": lambda: trained_on(adapted(1, net()), 3),
        "added": lambda: adapted(2, net()),
    }


def together(folder):
    """The same five in one process; two of them share a network."""
    kinds = ("trained", "loaded", "peft")
    made = {kind: alone(folder)[kind]() for kind in kinds}
    made["copied"] = trained_on(copy.deepcopy(made["trained"]), 3)
    torch.manual_seed(2)
    parts = {"prior": KroneckerInducing(rank=2, sigma=1.0), "guide": MatrixNormal(init_scale=0.1)}
    options = {**parts, "target_modules": ["q_proj", "v_proj"]}
    made["added"] = made["trained"].add_adapter("added", likelihood=likelihood(), **options)
    made["trained"].set_adapter("added")
    trained_on(made["added"], 5)
    return made


def drawn(blora):
    torch.manual_seed(3)
    return blora.predict(BATCH, 4).samples


def exported(blora, folder):
    blora.export_peft(folder / "export")
    return sum(
        t.double().square().sum()
        for t in load_file(folder / "export" / "adapter_model.safetensors").values()
    )


# The first two need no network, the others need theirs
QUESTIONS = {
    "kl": lambda blora, folder: blora.kl(),
    "export": exported,
    "mean": lambda blora, folder: blora.predict(BATCH, 0).samples,
    "draws": lambda blora, folder: drawn(blora),
}


def answer(blora, question, folder):
    return QUESTIONS[question](blora, folder).double().flatten().tolist()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for kind, make in alone(place).items():
        if not os.fork():  # nothing of the library has run in this process
            own = place / kind
            own.mkdir()
            blora = make()
            found = {question: answer(blora, question, own) for question in QUESTIONS}
            (own / "answers.json").write_text(json.dumps(found))
            os._exit(0)
        _, status = os.wait()
        assert not status, kind
