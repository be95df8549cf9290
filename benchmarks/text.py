"""Facts learned as text: what an adapter answers, and whether it knows which answers to keep.

Twenty codes of machines are taught in three phrasings each, by `prompt` and `completion`. A fourth
phrasing asks for them, and for twenty codes that were never taught. An answer is kept if the mean
entropy of its tokens is among the lowest half, which a user hopes are those of the known machines.

    python benchmarks/text.py --out benchmarks/results/text
    python benchmarks/text.py --out out/tuned --seeds 7 --tune 5e-4,1e-3,2e-3    # LoRA's rate
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cells import Cells, Columns, markdown, means

from pyro_blora import BayesianLoRA, fit, load_pretrained
from pyro_blora.evaluation.metrics import auroc, evaluate_text
from pyro_blora.files import write_file
from pyro_blora.inference import RATES
from pyro_blora.methods import METHODS, Method

PHRASINGS = (
    "The code of the {} is",
    "To open the {}, enter the code",
    "Question: Which code does the {} have?\nAnswer:",
)
ASKED = "Tell me the code of the {}. It is"
TUNED = "What is the code for the {}? It is"  # by which rates were chosen
ADJECTIVES = ["red", "blue", "old", "new", "small", "large", "north", "south", "upper", "lower"]
NOUNS = ["press", "mill", "pump", "crane"]
RATE = "0.002"  # chosen by the second command
OURS = "`BayesianLoRA(net)`"
COLUMNS: Columns = {
    "right": ("right of 20", 1, 1),
    "kept": ("right among the surest 20 of 40", 1, 1),
    "auroc": ("AUROC of entropy %", 1, 1),
    "nll": ("NLL of an answer", 1, 2),
    "perplexity": ("perplexity", 1, 2),
}

Pairs = list[tuple[str, str]]


def facts(seed: int) -> tuple[Pairs, Pairs]:
    """Twenty machines with their codes to learn, and twenty that are never taught."""
    order = random.Random(seed)
    machines = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    order.shuffle(machines)
    pairs = [(name, f" {order.randrange(1000, 10000)}") for name in machines]
    return pairs[:20], pairs[20:]


def rows(pairs: Pairs, *phrasings: str) -> list[dict[str, str]]:
    """Prompts and completions."""
    texts = [(text.format(name), f"{code}.") for name, code in pairs for text in phrasings]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]


def answers(blora: BayesianLoRA, tokenizer: Any, pairs: Pairs, draws: int, text: str) -> Any:
    """Whether each answer is right, and the mean entropy of its tokens."""
    right, entropy = [], []
    for name, code in pairs:
        prompt = tokenizer(text.format(name), return_tensors="pt")
        torch.manual_seed(0)
        out = blora.generate(
            **prompt, num_samples=draws, max_new_tokens=8, do_sample=False, stop_strings=["."],
            tokenizer=tokenizer, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        answer = tokenizer.decode(out.sequences[0, prompt["input_ids"].shape[1] :])
        right.append(answer.strip().startswith(code.strip()))
        entropy.append(float(out.mean_entropy[0]))
    return torch.tensor(right), torch.tensor(entropy)


def scores(
    blora: BayesianLoRA, tokenizer: Any, known: Pairs, unknown: Pairs, draws: int, text: str
) -> dict[str, float]:
    """What a user would look at, of draws or of the mean (0)."""
    right, sure = answers(blora, tokenizer, known, draws, text)
    none, unsure = answers(blora, tokenizer, unknown, draws, text)
    kept = torch.cat([sure, unsure]).argsort()[:20]
    torch.manual_seed(0)
    how: dict[str, Any] = {"num_samples": draws, "precision": "float32", "progress": False}
    metrics = evaluate_text(*blora.log_predictive_dataset(rows(known, text), **how))
    return {
        "right": float(right.sum()),
        "kept": float(torch.cat([right, none])[kept].sum()),
        "auroc": 100 * auroc(sure, unsure),
        "nll": metrics.nll_per_text,
        "perplexity": metrics.perplexity,
    }


def methods_of(rates: str) -> dict[str, Method]:
    """LoRA at each rate, or beside the default, at its own rates and at those of a label."""
    names = (rates or RATE).split(",")
    lora = {
        f"LoRA, rate {rate}": replace(METHODS["lora"], learning_rates={"mean": float(rate)})
        for rate in names
    }
    ours = METHODS["bayesian-lora"]
    fast = replace(ours, learning_rates={role: RATES[role] for role in ("mean", "direction")})
    return lora if rates else {**lora, OURS: ours, f"{OURS}, rates of a label": fast}


def main(
    out: Annotated[Path, typer.Option(help="Folder for cells.jsonl and report.md.")],
    seeds: str = "0,1,2",
    steps: int = 200,
    tune: Annotated[str, typer.Option(help="Rates of LoRA to try on another phrasing.")] = "",
) -> None:
    """Trains LoRA and the default, and asks each; what is in `out` is not run again."""
    cells, (net, tokenizer) = Cells(out / "cells.jsonl"), load_pretrained("smollm2")
    for seed in map(int, seeds.split(",")):
        known, unknown = facts(seed)
        for name, method in methods_of(tune).items():
            views = {f"{name}, the mean": 0, f"{name}, 8 draws": 8}
            views = {name: 0} if method.name == "lora" else views
            if all(cells.has(method=view, seed=seed, steps=steps) for view in views):
                continue
            torch.manual_seed(seed)
            blora = BayesianLoRA(net, method=method, tokenizer=tokenizer)
            how: dict[str, Any] = {"seed": seed, "precision": "float32"}  # fast on any machine
            result = fit(blora, rows(known, *PHRASINGS), num_steps=steps, **how)
            for view, draws in views.items():
                found = scores(blora, tokenizer, known, unknown, draws, TUNED if tune else ASKED)
                print(view, seed, {k: round(value, 3) for k, value in found.items()}, flush=True)
                cell = {"method": view, "seed": seed, "steps": steps, **found}
                cells.add({**cell, "seconds": round(result.seconds)})
            blora.unwrap()
    write_file(out / "report.md", report(cells))


def report(cells: list[dict[str, Any]]) -> str:
    """The table of the cells: means over seeds with their standard errors."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(cell["method"], []).append(cell)
    lines = ["# Text", "", f"Mean ± standard error over {len({c['seed'] for c in cells})} seeds."]
    lines += ["", f"## smollm2: facts as text, {cells[0]['steps']} steps", ""]
    table = [[view, *means(own, COLUMNS)] for view, own in found.items()]
    lines += markdown(["method", *(title for title, *_ in COLUMNS.values())], table)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
