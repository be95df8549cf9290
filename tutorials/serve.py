"""An HTTP endpoint for an adapter of classes, or of questions with options.

After ``pip install fastapi uvicorn``, in this folder::

    ADAPTER=out/mine ABSTAIN_ABOVE=0.4 uvicorn --factory serve:from_environment
    curl localhost:8000/predict --json '{"texts": ["Ice is"], "choices": [["cold", "hot"]]}'

A classifier takes ``texts`` alone. ``NUM_SAMPLES=0`` is one pass of the posterior mean. An adapter
names its base only if that is on the hub; for a base in a folder, set ``BASE`` to the folder.
"""

import os
from math import inf
from threading import Lock
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from pyro_blora import BayesianLoRA, load_pretrained
from pyro_blora.checkpoints import read_config


class Question(BaseModel):
    """Texts, and the options of each unless the adapter has classes."""

    texts: list[str]
    choices: list[list[str]] | None = None


def endpoint(blora: BayesianLoRA, abstain_above: float = inf, num_samples: int = 10) -> FastAPI:
    """``POST /predict``, which abstains where the entropy in nats is above a threshold."""
    app, lock = FastAPI(), Lock()

    @app.post("/predict")
    def predict(asked: Question) -> list[dict[str, Any]]:  # not async: FastAPI gives it a thread
        try:
            rows: list[Any] = asked.texts
            if asked.choices is not None:
                if any(len({*each}) < len(each) for each in asked.choices):
                    raise ValueError("The choices of a question must differ; leave some out.")
                pairs = zip(asked.texts, asked.choices, strict=True)
                rows = [{"question": text, "choices": each, "label": 0} for text, each in pairs]
            with lock:  # between the seed, which all threads share, and the draws
                torch.manual_seed(0)  # the same request has the same answer
                found = blora.predict(rows, num_samples)
        except ValueError as error:  # as the library's own errors are
            raise HTTPException(422, str(error)) from error
        classes = getattr(blora.likelihood, "classes", None) or range(found.probs.shape[1])
        return [
            {
                "class": names[best],
                "probs": dict(zip(names, found.probs[k].tolist(), strict=False)),
                "entropy": found.entropy[k].item(),
                "mutual_information": found.mutual_information[k].item(),
                "abstain": found.entropy[k].item() > abstain_above,
            }
            for k, best in enumerate(found.predictions)
            for names in [asked.choices[k] if asked.choices else classes]
        ]

    return app


def from_environment() -> FastAPI:
    """The endpoint of the adapter in the folder ``ADAPTER``."""
    get, folder = os.environ.get, os.environ["ADAPTER"]
    saved = read_config(folder)
    base = get("BASE", saved["base_model"])
    if not base:
        raise SystemExit(f"{folder} does not name its base; set BASE to the folder of the base.")
    net, tokenizer = load_pretrained(base, num_labels=saved["base"].get("num_labels"))
    blora = BayesianLoRA.from_pretrained(net, folder, tokenizer=tokenizer)
    return endpoint(blora, float(get("ABSTAIN_ABOVE", inf)), int(get("NUM_SAMPLES", 10)))
