"""The command ``pyro-blora compare``.

It imports torch only once it runs, so that help and a mistyped option are answered at once.
"""

import logging
import sys
import warnings
from typing import Annotated

import typer

from pyro_blora import __version__, errors
from pyro_blora.cli import compare

_MISTAKES = (errors.BatchError, errors.CheckpointError, errors.ConfigurationError, errors.DataError)

app = typer.Typer(
    help="Bayesian low-rank adapters for language models, compared with others on your data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pyro-blora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


app.command("compare")(compare.run)


def _hide(logger: str, text: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: text not in record.getMessage())


def main() -> None:
    """Runs the command line; a usage error prints one line on stderr, with exit code 2."""
    # Users cannot act on these: linear_operator still decorates with torch.jit.script, and an
    # installed torchao reports kernels for other machines and registers enums twice.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    _hide("torchao", "Failed to load ")
    _hide("torch.utils._pytree", " Enum subclass")
    if "" not in sys.path:  # for classes in the current folder; last, so that it hides no package
        sys.path.append("")
    try:
        app()
    except (*_MISTAKES, errors.NonFiniteLossError, ImportError, OSError) as error:
        print(f"pyro-blora: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
