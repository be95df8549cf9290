"""``pyro-blora distill``: one pass of a saved adapter, as calibrated as its draws."""

from typing import Annotated

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.data import load_task


def run(
    adapter: o.AdapterFolder,
    model: o.Base = None,
    task: o.OwnTask = None,
    data_dir: o.DataDir = None,
    num_samples: o.NumSamples = 16,
    precision: o.Precision = "auto",
    peft: Annotated[
        bool, typer.Option(help="Also write the one pass as a PEFT adapter to ADAPTER/peft.")
    ] = False,
) -> None:
    """Make one pass of an adapter nearly as calibrated as its draws, without a label.

    Fits a temperature of the posterior mean's scores to the average of the draws, on training items
    without their labels. It is saved with the adapter, and `--num-samples 0` uses it.

    Example: pyro-blora distill --adapter out/facts --peft
    """
    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.checkpoints import read_config
    from pyro_blora.data.items import item_length
    from pyro_blora.network.pretrained import load_pretrained

    console, saved = Console(highlight=False), read_config(adapter)
    data = load_task(o.named(task, saved["notes"].get("task"), "--task"), data_dir=data_dir)
    with o.phase("load"):
        net, tokenizer = load_pretrained(o.named(model, saved["base_model"], "--model"))
    blora = BayesianLoRA.from_pretrained(net, adapter)
    with o.phase("distill"):
        reading = {"length": item_length, "precision": precision}
        found = blora.distill(data.train, data.collator(tokenizer), num_samples, **reading)
    blora.save_pretrained(adapter, notes=saved["notes"])
    if peft:
        blora.export_peft(adapter / "peft")
    console.print(f"temperature {found:.4g} of one pass, written: {adapter}")
