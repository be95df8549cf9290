"""The figures of docs/cost.md, and how they compare with measured ones.

    python benchmarks/cost_model.py            print the tables
    python benchmarks/cost_model.py --write    put them into the page
    python benchmarks/cost_model.py --compare out/step_time.json out/predict_time.json

Pure arithmetic (`cost_formulas.py`), for Llamas of three sizes and a card that is given by three
numbers. `--compare` takes what step_time.py and predict_time.py write with `--json`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cost_formulas import LLAMA, Adapter, Shape, Task

__all__ = ["compare", "tables"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cost.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
RANKS, DRAWS, KINDS = (8, 16, 64), (1, 4, 10, 32), ("bfloat16", "int8", "int4")
RATE, BANDWIDTH, MEMORY = 400e12, 3e12, 80e9  # FLOP/s reached, bytes/s, bytes of a card
ROWS, LENGTH, RANK, CLASSES, FILL = 8, 512, 16, 4, 0.9
OWN, OWN_PASS = 3e-3, 1e-3  # seconds of a step, of a prediction's pass, besides the network


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _depths(shape: Shape) -> dict[str, int]:
    return {"all": shape.L, "top third": round(shape.L / 3)}


def _task(shape: Shape, layers: int, r: int = RANK, bayesian: bool = True) -> Task:
    return Task(Adapter(shape, r, layers, bayesian), ROWS, LENGTH)


def _adapters() -> str:
    rows = []
    for name, shape in LLAMA.items():
        for r in RANKS:
            own, plain = (_task(shape, shape.L, r, kind) for kind in (True, False))
            a, b = own.adapter, plain.adapter
            more = own.training_bytes("bfloat16") - plain.training_bytes("bfloat16")
            sizes = (a.parameter_bytes, a.optimizer_bytes, a.factor_bytes(ROWS), more)
            row = [name, str(r), f"{b.numbers:,}", f"{a.numbers:,}"]
            row += [f"{size / 1e6:,.1f}" for size in sizes]
            rows.append([*row, f"{a.numbers / b.numbers:.4f}", f"{own.step() / plain.step():.5f}"])
    head = ["model", "r", "LoRA trains", "Bayesian trains", "adapter MB", "AdamW MB"]
    head += ["factors MB", "more than LoRA on a card, MB"]
    return _table([*head, "ratio of bytes", "ratio of a step's FLOPs"], rows)


def _seconds(task: Task, kind: str, flops: float, passes: float) -> float:
    return max(flops / RATE, task.traffic(kind, passes) / BANDWIDTH)


def _training() -> str:
    rows = []
    for name, shape in LLAMA.items():
        for where, layers in _depths(shape).items():
            task = _task(shape, layers)
            for kind in KINDS:
                row = [name, where, kind]
                for again in (False, True):
                    flops, passes = task.step(again), 1 + (1 + again) * task.adapter.share
                    row.append(f"{_seconds(task, kind, flops, passes):.2f}")
                    row.append(f"{task.training_bytes(kind, again) / 1e9:,.0f}")
                base = shape.base_bytes(kind) / 1e9
                rows.append([*row[:3], f"{base:,.1f}", *row[3:]])
    head = ["model", "adapters in", "base", "base GB", "s a step", "GB", "s, checkpointed"]
    return _table([*head, "GB, checkpointed"], rows)


def _prediction() -> str:
    rows = []
    for name, shape in LLAMA.items():
        for where, layers in _depths(shape).items():
            task = _task(shape, layers)
            row = [name, where, f"{_seconds(task, 'bfloat16', task.forward(), 1):.2f}"]
            row += [f"{task.prediction(s) / task.forward():.2f}" for s in DRAWS]
            row.append(f"{task.linearised(CLASSES) / task.forward():.2f}")
            row += [f"{task.prediction_bytes(kind, 10) / 1e9:,.0f}" for kind in KINDS]
            rows.append(row)
    head = ["model", "adapters in", "s a forward", *(f"S = {s}" for s in DRAWS), "linearised"]
    return _table([*head, *(f"GB {kind}, S = 10" for kind in KINDS)], rows)


def placed(task: Task, kind: str, cards: int, how: str) -> tuple[float, float]:
    """Bytes on each card, checkpointed, and bytes that each exchanges in a step."""
    s, own = task.adapter.shape, task.adapter
    base, moved = s.base_bytes(kind), 2 * (cards - 1) / cards
    whole, gradients = task.training_bytes(kind, True), moved * own.parameter_bytes
    if how == "DDP":
        return whole, gradients
    if how == "FSDP":  # a block in use and the next one are whole
        block = (base - 2 * s.rest) / s.L
        gathers = (1 + own.share) * base * moved / 2
        return whole - base + base / cards + 2 * block, gradients + gathers
    cut = task.tokens * (4 * s.h + 4 * s.k + 6 * s.f) * (1 - 1 / cards)
    sums = 2 * (1 + 2 * own.share) * s.L * 2 * task.tokens * s.h * moved
    return whole - base + base / cards - cut, sums


def _placement() -> str:
    rows = []
    for name, shape in LLAMA.items():
        task = _task(shape, shape.L)
        for kind in ("bfloat16", "int4"):
            row = [name, kind]
            for how in ("DDP", "FSDP", "tensor"):
                size, moved = placed(task, kind, 8, how)
                row += [f"{size / 1e9:,.0f}", f"{moved / 1e9:,.2f}"]
            rows.append(row)
    head = ["model", "base"]
    for how in ("DDP", "FSDP", "tensor"):
        head += [f"{how} GB", f"{how} GB moved"]
    return _table(head, rows)


def _recommended() -> str:
    rows = []
    for name, shape in LLAMA.items():
        for r in RANKS:
            task = _task(shape, shape.L, r)
            tries = [(k, c) for k in KINDS for c in (False, True)]
            room = FILL * MEMORY
            fits = [(k, c) for k, c in tries if task.training_bytes(k, c) <= room]
            one = "none" if not fits else fits[0][0] + (", checkpointed" if fits[0][1] else "")
            cards = [g for g in (2, 4, 8) if placed(task, "bfloat16", g, "FSDP")[0] <= room]
            many = "DDP, any number" if fits[:1] and fits[0][0] == "bfloat16" else "more than 8"
            if cards and not many.startswith("DDP"):
                many = f"FSDP over {cards[0]}"
            top = _task(shape, _depths(shape)["top third"], r)
            kind = next((k for k in KINDS if top.prediction_bytes(k, 10) <= room), "none")
            ratio = top.prediction(10) / task.prediction(10)
            rows.append([name, str(r), one, f"bfloat16, {many}", kind, f"{1 / ratio:.1f}"])
    head = ["model", "r", "one card", "several cards", "S = 10 on one card, top third"]
    return _table([*head, "times faster than with all layers"], rows)


def tables() -> str:
    """All tables of the page, in markdown."""
    card = f"{RATE / 1e12:.0f} TFLOP/s reached, {BANDWIDTH / 1e12:.0f} TB/s and {MEMORY / 1e9:.0f}"
    setting = f"B = {ROWS}, T = {LENGTH}, a card of {card} GB"
    parts = {
        "Adapters of all layers": _adapters(),
        f"A training step: r = {RANK}, {setting}": _training(),
        f"A prediction, in forward passes of the plain network: r = {RANK}, "
        f"{CLASSES} classes, {setting}": _prediction(),
        f"Eight cards, all layers adapted, checkpointed, B = {ROWS} on each card "
        "(tensor: for all)": _placement(),
        f"What to take, where a card may be filled to {FILL:.0%}": _recommended(),
    }
    return "\n".join(f"**{title}**\n\n{table}" for title, table in parts.items())


def _measured_shape(arguments: dict[str, Any]) -> Shape:
    from setting import KEY_VALUE_HEADS, SIZES, VOCABULARY

    size = arguments["size"]
    own = SIZES[size]
    width = own["hidden_size"] * KEY_VALUE_HEADS[size] // own["heads"]
    layers = arguments.get("layers") or own["num_hidden_layers"]
    return Shape(own["hidden_size"], own["intermediate_size"], width, layers, VOCABULARY[size])


def allocated(arguments: dict[str, Any], layers: int) -> int:
    """Bytes of the tensors that the library trains on a network of this size."""
    import pyro
    import torch
    from setting import RANK as rank
    from setting import TARGETS, network

    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.models import KroneckerInducing

    with pyro.settings.context(module_local_params=True):
        with torch.device("meta"):
            net = network(arguments["size"], arguments.get("layers"))
        depth = net.config.num_hidden_layers
        blora = BayesianLoRA(
            net,
            target_modules=TARGETS,
            prior=KroneckerInducing(rank=rank),
            layers_to_transform=list(range(depth - layers, depth)),
        )
    return sum(p.numel() * p.element_size() for p in blora.parameters())


def compare(document: dict[str, Any]) -> list[tuple[str, float, float, float, float]]:
    """Predicted and measured ratios of a document of step_time.py or predict_time.py.

    Returns:
        Name, prediction, measured median, and quartiles. The last row has the adapter's bytes, as
        the library allocates them.
    """
    from setting import ANSWERS
    from setting import RANK as rank

    arguments, rows = document["arguments"], document["rows"]
    shape = _measured_shape(arguments)
    adapter = Adapter(shape, rank, arguments.get("top") or shape.L)
    task = Task(adapter, int(arguments["rows"]), int(arguments["length"]))
    plain = Task(Adapter(shape, rank, shape.L, bayesian=False), task.B, task.T)
    flops = {"bayesian-lora": task.step(), "peft": plain.whole_step(), "peft:read": plain.step()}
    flops |= {"plain": plain.plain(), "plain:read": plain.forward() - plain.unread}
    flops["linearised"] = task.linearised(int(arguments.get("classes") or len(ANSWERS)))
    more = {"bayesian-lora": OWN}
    for draws in (int(row["name"][4:]) for row in rows if row["name"].startswith("S = ")):
        flops[f"S = {draws}"] = task.prediction(draws)
        more[f"S = {draws}"] = task.passes(draws) * OWN_PASS
    seconds = {row["name"]: float(row["seconds"]) for row in rows}
    compared = []
    for row in rows:
        for key, found in row.items():
            name, other = row["name"], key.removeprefix("to ")
            if key != other and name != other and name in flops:
                value = flops[name] / flops[other] + more.get(name, 0.0) / seconds[other]
                measured = (float(found[k]) for k in ("ratio", "low", "high"))
                compared.append((f"{name} to {other}", value, *measured))
    size = float(allocated(arguments, adapter.layers))
    return [*compared, ("adapter bytes", float(adapter.parameter_bytes), size, size, size)]


def main() -> None:
    """Prints the tables, puts them into the page, or compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    parser.add_argument("--compare", type=Path, nargs="+", help="JSON files of measured times")
    arguments = parser.parse_args()
    if arguments.compare:
        rows = []
        for path in arguments.compare:
            for name, *values in compare(json.loads(path.read_text(encoding="utf-8"))):
                numbers = [f"{v:,.0f}" if v > 1e3 else f"{v:.3f}" for v in values]
                rows.append([path.name, name, *numbers[:2], f"{numbers[2]} - {numbers[3]}"])
        print(_table(["file", "ratio", "predicted", "measured", "quartiles"], rows))
    elif arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(before + BEGIN + tables() + END + after, encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
