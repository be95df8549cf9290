"""Facts learned as text: what an adapter answers, and whether it knows which answers to keep.

Twenty codes of machines are taught in three phrasings each, by `prompt` and `completion`. A fourth
phrasing asks for them, and for twenty codes that were never taught. An answer is kept if the mean
entropy of its tokens is among the lowest half, which a user hopes are those of the known machines.

    python benchmarks/text.py --out benchmarks/results/text
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cells import Cells, Columns, markdown, means, titles

from pyro_blora import BayesianLoRA, fit, load_pretrained
from pyro_blora.checkpoints.files import write_file
from pyro_blora.evaluation.metrics import evaluate_text
from pyro_blora.inference import RATES
from pyro_blora.methods import METHODS, Method
from pyro_blora.scores import auroc

PHRASINGS = (
    "The code of the {} is",
    "To open the {}, enter the code",
    "Question: Which code does the {} have?\nAnswer:",
)
ASKED = "Tell me the code of the {}. It is"
ADJECTIVES = ["red", "blue", "old", "new", "small", "large", "north", "south", "upper", "lower"]
NOUNS = ["press", "mill", "pump", "crane"]
RATE = 2e-3  # the best of 5e-4, 1e-3 and 2e-3 with seed 7 and "What is the code for the {}? It is"
OURS = "`BayesianLoRA(net)`"
COLUMNS: Columns = {"right": ("right of 20", 1, 1)}
COLUMNS |= {"kept": ("right among the surest 20 of 40", 1, 1)}
COLUMNS |= {"auroc": ("AUROC of entropy %", 1, 1), "nll": ("NLL of an answer", 1, 2)}
COLUMNS |= {"perplexity": ("perplexity", 1, 2)}

Pairs = list[tuple[str, str]]


def facts(seed: int) -> tuple[Pairs, Pairs]:
    order = random.Random(seed)
    machines = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    order.shuffle(machines)
    pairs = [(name, f" {order.randrange(1000, 10000)}") for name in machines]
    return pairs[:20], pairs[20:]


def rows(pairs: Pairs, *phrasings: str) -> list[dict[str, str]]:
    texts = [(text.format(name), f"{code}.") for name, code in pairs for text in phrasings]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]


def answers(blora: BayesianLoRA, tokenizer: Any, pairs: Pairs, draws: int) -> Any:
    """Whether each answer is right, and the mean entropy of its tokens."""
    right, entropy = [], []
    for name, code in pairs:
        prompt = tokenizer(ASKED.format(name), return_tensors="pt")
        torch.manual_seed(0)
        out = blora.generate(
            **prompt, num_samples=draws, max_new_tokens=8, do_sample=False, stop_strings=["."],
            tokenizer=tokenizer, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        answer = tokenizer.decode(out.sequences[0, prompt["input_ids"].shape[1] :])
        right.append(answer.strip().startswith(code.strip()))
        entropy.append(float(out.mean_entropy[0]))
    return torch.tensor(right), torch.tensor(entropy)


def scores(blora: Any, tokenizer: Any, known: Any, unknown: Any, draws: int) -> dict[str, float]:
    right, sure = answers(blora, tokenizer, known, draws)
    none, unsure = answers(blora, tokenizer, unknown, draws)
    kept = torch.cat([sure, unsure]).argsort()[:20]
    torch.manual_seed(0)
    how: dict[str, Any] = {"num_samples": draws, "precision": "float32", "progress": False}
    metrics = evaluate_text(*blora.log_predictive_dataset(rows(known, ASKED), **how))
    found = {"right": float(right.sum()), "kept": float(torch.cat([right, none])[kept].sum())}
    found |= {"auroc": 100 * auroc(sure, unsure), "nll": metrics.nll_per_text}
    return {**found, "perplexity": metrics.perplexity}


def methods() -> dict[str, Method]:
    lora, ours = METHODS["lora"], METHODS["bayesian-lora"]
    fast = replace(ours, learning_rates={role: RATES[role] for role in ("mean", "direction")})
    lora = replace(lora, learning_rates={"mean": RATE})
    return {f"LoRA, rate {RATE:g}": lora, OURS: ours, f"{OURS}, rates of a label": fast}


def main(
    out: Annotated[Path, typer.Option(help="Folder for cells.jsonl and report.md.")],
    seeds: str = "0,1,2",
    steps: int = 200,
) -> None:
    """Trains LoRA and the default, and asks each; what is in `out` is not run again."""
    cells, (net, tokenizer) = Cells(out / "cells.jsonl"), load_pretrained("smollm2")
    for seed in map(int, seeds.split(",")):
        known, unknown = facts(seed)
        for name, method in methods().items():
            views = {f"{name}, the mean": 0, f"{name}, 8 draws": 8}
            views = {name: 0} if method.name == "lora" else views
            views = {v: views[v] for v in views if not cells.has(method=v, seed=seed, steps=steps)}
            if not views:
                continue
            torch.manual_seed(seed)
            blora = BayesianLoRA(net, method=method, tokenizer=tokenizer)
            how: dict[str, Any] = {"seed": seed, "precision": "float32"}  # fast on any machine
            result = fit(blora, rows(known, *PHRASINGS), num_steps=steps, **how)
            for view, draws in views.items():
                found = scores(blora, tokenizer, known, unknown, draws)
                print(view, seed, {k: round(value, 3) for k, value in found.items()}, flush=True)
                cell = {"method": view, "seed": seed, "steps": steps, **found}
                cells.add({**cell, "seconds": round(result.seconds)})
            blora.unwrap()
    write_file(out / "report.md", report(cells))


def report(cells: list[dict[str, Any]]) -> str:
    views = dict.fromkeys(cell["method"] for cell in cells)
    table = [[v, *means([c for c in cells if c["method"] == v], COLUMNS)] for v in views]
    lines = ["# Text", "", f"Mean ± standard error over {len({c['seed'] for c in cells})} seeds."]
    lines += ["", f"## smollm2: facts as text, {cells[0]['steps']} steps", ""]
    return "\n".join([*lines, *markdown(["method", *titles(COLUMNS)], table), ""])


if __name__ == "__main__":
    typer.run(main)
