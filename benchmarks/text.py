"""Facts learned as text: what an adapter answers, and whether it knows which answers to keep.

Twenty codes of machines are taught in three phrasings each, by `prompt` and `completion`, and asked
for in a fourth phrasing, beside twenty codes that were never told. An answer is kept if the mean
entropy of its tokens is among the lowest half, which a user hopes are those of the known machines.

    python benchmarks/text.py --out benchmarks/results/text
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from calibration_report import markdown

from pyro_blora import BayesianLoRA, fit, load_pretrained
from pyro_blora.evaluation.metrics import auroc, evaluate_text
from pyro_blora.evaluation.results import versions
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
RATE = 2e-3  # chosen by --seeds 7 and --tune 5e-4,1e-3,2e-3
OURS = "`BayesianLoRA(net)`"
COLUMNS = {  # title, digits
    "right": ("right of 20", 1),
    "kept": ("right among the surest 20 of 40", 1),
    "auroc": ("AUROC of entropy %", 1),
    "nll": ("NLL of an answer", 2),
    "perplexity": ("perplexity", 2),
}


def facts(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Twenty machines with their codes to learn, and twenty that are never told."""
    order = random.Random(seed)
    machines = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    order.shuffle(machines)
    codes = [f" {order.randrange(1000, 10000)}" for _ in machines]
    pairs = list(zip(machines, codes, strict=True))
    return pairs[:20], pairs[20:]


def rows(pairs: list[tuple[str, str]], *phrasings: str) -> list[dict[str, str]]:
    """Prompts and completions."""
    return [
        {"prompt": text.format(name), "completion": f"{code}."}
        for name, code in pairs
        for text in phrasings
    ]


def asked(blora: BayesianLoRA, tokenizer: Any, pairs: Any, draws: int, text: str) -> Any:
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
    blora: BayesianLoRA, tokenizer: Any, known: Any, unknown: Any, draws: int, text: str
) -> dict[str, float]:
    """What a user would look at, of draws or of the mean (0)."""
    right, sure = asked(blora, tokenizer, known, draws, text)
    none, unsure = asked(blora, tokenizer, unknown, draws, text)
    kept = torch.cat([sure, unsure]).argsort()[:20]
    torch.manual_seed(0)
    how: dict[str, Any] = {"num_samples": draws, "precision": "float32", "progress": False}
    logp = blora.log_predictive_dataset(rows(known, text), **how)
    metrics = evaluate_text(*logp)
    return {
        "right": float(right.sum()),
        "kept": float(torch.cat([right, none])[kept].sum()),
        "auroc": 100 * auroc(sure, unsure),
        "nll": metrics.nll_per_text,
        "perplexity": metrics.perplexity,
    }


def with_rate(rate: str | float) -> Method:
    """LoRA with another learning rate."""
    return replace(METHODS["lora"], learning_rates={"mean": float(rate)})


def main(
    out: Annotated[Path, typer.Option(help="Folder for cells.jsonl and report.md.")],
    model: str = "smollm2",
    seeds: str = "0,1,2",
    steps: int = 200,
    tune: Annotated[str, typer.Option(help="Rates of LoRA to try on another phrasing.")] = "",
) -> None:
    """Trains LoRA and the default, at its own and at a label's rates, and asks each."""
    cells: list[dict[str, Any]] = []
    asked_for = TUNED if tune else ASKED
    trained = {f"LoRA, rate {rate}": with_rate(rate) for rate in tune.split(",") if rate}
    if not tune:
        default, roles = METHODS["bayesian-lora"], ("mean", "direction")
        fast = replace(default, learning_rates={role: RATES[role] for role in roles})
        trained = {f"LoRA, rate {RATE:g}": with_rate(RATE), OURS: default}
        trained[f"{OURS}, rates of a label"] = fast
    net, tokenizer = load_pretrained(model)
    for seed in map(int, seeds.split(",")):
        known, unknown = facts(seed)
        for name, method in trained.items():
            torch.manual_seed(seed)
            blora = BayesianLoRA(net, method=method, tokenizer=tokenizer)
            how: dict[str, Any] = {"seed": seed, "precision": "float32"}  # fast on any machine
            result = fit(blora, rows(known, *PHRASINGS), num_steps=steps, **how)
            views = {f"{name}, the mean": 0, f"{name}, 8 draws": 8}
            if method.name == "lora":
                views = {name: 0}
            for view, draws in views.items():
                found = scores(blora, tokenizer, known, unknown, draws, asked_for)
                cells.append({"method": view, "seed": seed, "steps": steps, **found})
                cells[-1] |= {"seconds": round(result.seconds), "versions": versions()}
                print(
                    view, seed, {key: round(value, 3) for key, value in found.items()}, flush=True
                )
            blora.unwrap()
    write_file(out / "cells.jsonl", "".join(json.dumps(cell) + "\n" for cell in cells))
    write_file(out / "report.md", report(cells, model))
    print(report(cells, model))


def report(cells: list[dict[str, Any]], model: str) -> str:
    """The table of the cells: means over seeds with their standard errors."""
    lines = []
    for view in dict.fromkeys(cell["method"] for cell in cells):
        texts = [view]
        for key, (_, digits) in COLUMNS.items():
            values = [cell[key] for cell in cells if cell["method"] == view]
            error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if values[1:] else ""
            texts.append(f"{mean(values):.{digits}f}{error}")
        lines.append(texts)
    seeds = len({cell["seed"] for cell in cells})
    table = markdown(["method", *(title for title, _ in COLUMNS.values())], lines)
    title = f"## {model}: facts as text, {cells[0]['steps']} steps"
    head = ["# Text", "", f"Mean ± standard error over {seeds} seeds.", "", title, ""]
    return "\n".join([*head, *table]) + "\n"


if __name__ == "__main__":
    typer.run(main)
