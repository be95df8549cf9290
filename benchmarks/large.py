"""LoRA, split LoRA and the default on a network of billions, in the papers' setting, on one GPU.

    python benchmarks/large.py --task arc_easy --out out/arc_easy               # 24 GiB or more
    python benchmarks/large.py --task arc_easy --out out/arc_easy --quantized   # 16 GiB

Adapters of rank 8 on q_proj, v_proj and lm_head, 5,000 steps of batch 4, all test items. LoRA has
the rate that BLoB gives it (arXiv:2406.11675), and the default its usual ones. Each row is saved
when it is done, so the same command goes on after an interruption.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from cells import markdown

from pyro_blora import compare, load_pretrained
from pyro_blora.evaluation.results import RESULTS, Row, versions
from pyro_blora.methods import METHODS

LORA = replace(METHODS["lora"], learning_rates={"mean": 1e-4})


def load(model: str, quantized: bool) -> tuple[Any, Any]:
    if not quantized:
        return load_pretrained(model, dtype=torch.bfloat16)
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **bits)}
    place = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    how |= {"dtype": torch.bfloat16, "device_map": {"": place}}
    net = AutoModelForCausalLM.from_pretrained(model, **how)
    return net.eval(), AutoTokenizer.from_pretrained(model)


def show(row: Row) -> None:
    memory = ""
    if torch.cuda.is_available():
        memory = f", at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        torch.cuda.reset_peak_memory_stats()
    print(
        f"{row.method}, seed {row.seed}: {row.train_seconds:.1f} s of training{memory}", flush=True
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json, predictions and a diagram.")],
    task: Annotated[str, typer.Option(help="A task of the hub, or a folder with its splits.")],
    model: str = "meta-llama/Llama-2-7b-hf",
    quantized: Annotated[bool, typer.Option("--quantized", help="In 4 bits.")] = False,
    max_steps: int = 5000,
    seeds: str = "0,1,2",
) -> None:
    """Trains and scores each method, and prints the table beside what papers print."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{model}{' in 4 bits' if quantized else ''} on {device}, {versions()}", flush=True)
    how: dict[str, Any] = {"own": [LORA], "num_steps": max_steps, "batch_size": 4}
    how |= {"target_modules": ["q_proj", "v_proj", "lm_head"], "rank": 8, "out": out}
    how |= {"seeds": [int(seed) for seed in seeds.split(",")], "callback": show}
    table = compare(load(model, quantized), task, ["lora", "split:lora", "bayesian-lora"], **how)
    print(f"\n{table}\n")
    printed = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    if task in printed["tasks"] and (rows := printed["models"].get(model)):
        place = printed["tasks"].index(task)
        cells = [[name, *row[place].split()] for name, row in rows.items()]
        print("\n".join([*markdown(["published", "ACC %", "ECE %", "NLL"], cells), ""]))
    print(f"To let others know, open an issue with {out / RESULTS} and all lines printed here.")


if __name__ == "__main__":
    typer.run(main)
