"""``pyro-blora generate``: text from a saved adapter, colored by its uncertainty."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o

By = Literal["mutual_information", "entropy", "disagreement"]
AbstainBy = Literal["mutual_information", "entropy"]


def run(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    adapter: o.AdapterFolder,
    model: o.Base = None,
    num_samples: o.NumSamples = 10,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.", min=1)] = 60,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the most probable token.", min=0)
    ] = 0.0,
    num_beams: Annotated[int, typer.Option(help="Beams of a beam search.", min=1)] = 1,
    by: Annotated[By, typer.Option(help="The measure that colors the text.")] = (
        "mutual_information"
    ),
    abstain_above: Annotated[
        float | None,
        typer.Option(
            help="Abstain if the score is above this, in nats per token. threshold_for of "
            "pyro_blora.evaluation.metrics finds it from prompts whose answers you know.",
            min=0,
        ),
    ] = None,
    abstain_by: Annotated[
        AbstainBy, typer.Option(help="The score: the mean of this measure over the tokens.")
    ] = "mutual_information",
    seed: Annotated[int, typer.Option(help="Seed of the draws and of sampling.")] = 0,
    html: Annotated[
        Path | None, typer.Option(help="File for a page with a legend and numbers on hover.")
    ] = None,
) -> None:
    """Write text from the average of posterior draws, colored by how much they disagree.

    The mutual information is the part of a token's uncertainty that comes from the posterior of
    the weights: how much the draws disagree.

    Example: pyro-blora generate "Copper is" --adapter out/facts --html answer.html
    """
    import torch

    from pyro_blora.files import check_free, write_file
    from pyro_blora.generation.show import answers, colored, legend, page

    if html is not None:
        check_free(html.parent, html.name)
    blora = o.load_adapter(adapter, model)
    tokenizer = blora.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(prompt, return_tensors="pt", padding=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0}
    torch.manual_seed(seed)
    with o.phase("generate"):
        generation = blora.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            num_samples=num_samples,
            abstain_above=abstain_above,
            by=abstain_by,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            pad_token_id=tokenizer.pad_token_id,
            **(sampling if temperature else {"do_sample": False}),
        )
    console = Console(highlight=False)
    found = answers(generation, tokenizer, prompt)
    console.print(legend(by))
    for answer in found:
        console.print(f"\n{answer.prompt}", style="dim", markup=False)
        console.print(colored(answer, by))
        console.print(answer.figures, style="bold" if answer.abstained else "")
    if html is not None:
        how = f"temperature {temperature:g}" if temperature else "the most probable tokens"
        draws = f"the average of {num_samples} draws" if num_samples else "the posterior mean"
        about = f"{adapter}: {draws}, {how}, seed {seed}"
        write_file(html, page(found, subtitle=about, by=by))
        console.print(f"\nWritten: {html}")
