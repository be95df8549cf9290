"""The matrix of priors and guides in docs/priors_and_guides.md: sizes for a 7B model at rank 8.

    python benchmarks/matrix.py            print the table
    python benchmarks/matrix.py --write    put it into the page

Each entry is the number of trained parameters of the guide on Llama-2-7B's shapes, q and v of all
layers; nothing is downloaded. "-" stands for a pair that raises an error at this size.
"""

import argparse
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from pyro_blora import guides, models
from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import CausalLM
from pyro_blora.models import UpdateModel
from pyro_blora.network.pretrained import shape_only

PAGE = Path(__file__).resolve().parent.parent / "docs" / "priors_and_guides.md"
BEGIN, END = "<!-- sizes: begin -->\n", "<!-- sizes: end -->\n"
RANK = 8


def classes(package: Any, contract: type) -> list[type]:
    """The public subclasses of a contract."""
    found = [getattr(package, name) for name in package.__all__]
    return [kind for kind in found if issubclass(kind, contract) and kind is not contract]


def size(net: nn.Module, prior: type, guide: type) -> tuple[int, int] | None:
    """Trained parameters of the prior and of the guide, or ``None`` where the pair is refused."""
    ranked = "rank" in inspect.signature(prior).parameters
    try:
        blora = BayesianLoRA(
            net,
            target_modules=["q_proj", "v_proj"],
            prior=prior(rank=RANK) if ranked else prior(),
            guide=guide(),
            likelihood=CausalLM(num_data=1),
        )
    except ConfigurationError:
        return None
    blora.unwrap()
    parts = (blora.model, blora.guide)
    first, second = (sum(p.numel() for p in part.parameters()) for part in parts)
    return first, second


def short(count: int) -> str:
    """A count to three digits: 4096 is 4.10 k."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)


def table() -> str:
    """The whole matrix in markdown: a line for each guide, a column for each prior."""
    net = shape_only("llama-2-7b")
    priors, families = classes(models, UpdateModel), classes(guides, SiteGuide)
    own: dict[str, int] = {}
    lines = []
    for guide in families:
        cells = []
        for prior in priors:
            found = size(net, prior, guide)
            cells.append("-" if found is None else short(found[1]))
            if found is not None:
                own[prior.__name__] = found[0]
        lines.append(f"| `{guide.__name__}` | " + " | ".join(cells) + " |")
    head = "| guide \\ prior | " + " | ".join(f"`{p.__name__}`" for p in priors) + " |"
    rule = "|---" * (len(priors) + 1) + "|"
    first = "| *the prior itself* | " + " | ".join(short(own[p.__name__]) for p in priors) + " |"
    return "\n".join([head, rule, first, *lines]) + "\n"


def main() -> None:
    """Prints the table, or puts it into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"put it into {PAGE.name}")
    if not parser.parse_args().write:
        print(table())
        return
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
