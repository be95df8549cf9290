"""``pyro-blora info``: the size of an adapter, without weights."""

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pyro_blora.cli import _arguments as o
from pyro_blora.methods import SHOWN, Method, all_methods, check_method


def run(
    model: Annotated[
        str,
        typer.Option(
            help="A known shape (llama-2-7b, smollm2), a folder with a config.json, or a hub id."
        ),
    ] = "llama-2-7b",
    target_modules: o.Targets = "q_proj,v_proj,lm_head",
    rank: o.Rank = None,
    method: o.Method = "bayesian-lora",
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods with their citations instead.")
    ] = False,
) -> None:
    """Count the parameters of plain LoRA and of a Bayesian adapter on a model's shapes.

    No weights are read or made: the network lives on the meta device. Only the adapter's own
    tensors are built.

    Example: pyro-blora info --model llama-2-7b --target-modules q_proj,v_proj,lm_head
    """
    if methods:
        Console().print(*_listed(), sep="\n")
        return
    targets = o.listed(target_modules, "--target-modules")
    check_method(method)
    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.network.pretrained import shape_only

    net = shape_only(model)
    blora = BayesianLoRA(net, method=method, rank=rank, target_modules=targets)
    console = Console(highlight=False)
    console.print(blora)
    plain = sum(g.n * (rank or 8) * (g.d_out + g.d_in) for g in blora.model.groups)
    view = Table(title=f"{model}, LoRA of rank {rank or 8}")
    view.add_column("adapter")
    view.add_column("trainable parameters", justify="right")
    view.add_column("more than plain LoRA", justify="right")
    view.add_row("plain LoRA", f"{plain:,}", "")
    surplus = blora.trainable_parameters - plain
    view.add_row(method, f"{blora.trainable_parameters:,}", f"{surplus:,} ({surplus / 1e6:.3f} M)")
    console.print(view)


def _pair(made: Method) -> str:
    """Prior and guide as Python, and what else the method says."""
    own = {"num_samples": made.num_samples, "linearized": made.linearized or None}
    said = [f"{name}={value}" for name, value in own.items() if value is not None]
    return ", ".join([f"{made.prior_of()!r} + {made.guide_of()!r}", *said])


def _listed() -> Iterator[RenderableType]:
    """A paragraph for each method; no word of it is broken on a narrow terminal."""
    yield Text("Methods: a prior beside a guide", style="bold")
    paragraphs: dict[str, tuple[str, ...]] = {
        name: (made.summary, _pair(made), made.citation) for name, made in all_methods().items()
    }
    for name, lines in {**paragraphs, **SHOWN}.items():
        yield Text(f"\n{name}", style="bold")
        yield from (Padding(Text(line), (0, 0, 0, 2)) for line in lines)
