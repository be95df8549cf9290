"""``pyro-blora distill``: make one pass of a saved adapter as calibrated as its draws."""

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
    """Make one pass of an adapter nearly as calibrated as its draws, without labels.

    Fits a temperature of the posterior mean's scores to the average of the draws, on the training
    items without their labels. The temperature is saved with the adapter, and `--num-samples 0`
    uses it.

    Example: pyro-blora distill --adapter out/facts --peft
    """
    from pyro_blora.checkpoints import read_config

    notes = read_config(adapter)["notes"]
    data = load_task(o.named(task, notes.get("task"), "--task"), data_dir=data_dir)
    blora = o.load_adapter(adapter, model)
    collate = o.collator_for(blora, data)
    with o.phase("distill"):
        options = {"num_samples": num_samples, "precision": precision}
        found = blora.distill(data.train, collate, **options)
    blora.save_pretrained(adapter, notes=notes)
    if peft:
        blora.export_peft(adapter / "peft")
    Console(highlight=False).print(f"temperature {found:.4g} of one pass, written: {adapter}")
