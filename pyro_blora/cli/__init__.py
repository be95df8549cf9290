"""The command ``pyro-blora``: one file for each sub-command."""

import sys
import warnings

import typer

from pyro_blora.cli import compare, evaluate, info, train
from pyro_blora.data import DataError
from pyro_blora.errors import BatchError, CheckpointError, ConfigurationError, NonFiniteLossError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Bayesian low-rank adapters for language models: fine-tune, compare, evaluate, count.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.run)
app.command("evaluate")(evaluate.run)
app.command("compare")(compare.run)
app.command("info")(info.run)


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    # linear_operator still decorates with torch.jit.script; nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    try:
        app()
    except (
        BatchError,
        CheckpointError,
        ConfigurationError,
        DataError,
        NonFiniteLossError,
    ) as error:
        print(f"pyro-blora: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
