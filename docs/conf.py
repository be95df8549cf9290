"""How Sphinx makes the site of these pages: ``make docs``."""

import base64
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyro_blora import __version__

project = "pyro_blora"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx-mathjax-offline"]  # formulas are shown without a network, too
if os.environ.get("DOCS_INTERSPHINX"):  # reads four inventories from the network
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "pyro": ("https://docs.pyro.ai/en/stable/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
    "transformers": ("https://huggingface.co/docs/transformers/main/en/", None),
    "peft": ("https://huggingface.co/docs/peft/main/en/", None),
}
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "amsmath"]
nb_execution_mode = "off"  # notebooks are kept with their outputs, and tests run them
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
napoleon_custom_sections = ["Reference"]


HERE = Path(__file__).parent


def bring_the_tutorials(app: Any) -> None:
    """Sphinx reads what is below its own folder alone: a copy."""
    shutil.rmtree(HERE / "tutorials", ignore_errors=True)  # a notebook may have gone
    shutil.copytree(HERE.parent / "tutorials", HERE / "tutorials")
    for path in (HERE / "tutorials").glob("*.ipynb"):  # whose first figure is its thumbnail
        outputs = (o for c in json.loads(path.read_bytes())["cells"] for o in c.get("outputs", ()))
        figures = (o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", ()))
        path.with_suffix(".png").write_bytes(base64.b64decode(next(figures)))


def as_it_stands(
    app: Any, what: str, name: str, member: object, options: Any, lines: list[str]
) -> None:
    """Docstrings that are read otherwise than they are meant."""
    if re.fullmatch(r"pyro_blora\.cli\.\w+\.run", name):  # it is the command's --help
        lines[:] = [".. code-block:: text", "", *(f"   {line}" for line in lines)]
    elif what == "property":  # napoleon takes what is before a colon for a type
        lines[:1] = [line.replace(": ", " -- ") for line in lines[:1]]
    elif what == "data":  # that of its type
        lines.clear()


def as_it_parses(
    app: Any, what: str, name: str, member: object, options: Any, arguments: str | None, result: Any
) -> tuple[str | None, Any]:
    """A dataclass says <factory> for a default that is made anew, which is no Python."""
    return arguments and arguments.replace("<factory>", "..."), result


MENU = {
    "Start": "tutorials/00* tutorials/02* choose own_data likelihoods tutorials/README",
    "How-to pages": "peft evaluation save_and_serve generation hyperparameters large_models pyro "
    "priors_and_guides tutorials/03* tutorials/05* tutorials/06* tutorials/07* tutorials/09* "
    "troubleshooting",
    "Explanation": "theory tutorials/01* calibration tutorials/04* tutorials/08* cost",
    "Reference": "reference/index reference/internals",
}


def link_to_the_site(app: Any, page: str, source: list[str]) -> None:
    """The README, which is the site's first page, and the tutorials are read in other folders."""
    if page == "index":
        readme = (HERE.parent / "README.md").read_text("utf-8")
        menu = (
            f"```{{toctree}}\n:hidden:\n:glob:\n:caption: {title}\n\n"
            + pages.replace(" ", "\n")
            + "\n```"
            for title, pages in MENU.items()
        )
        source[0] = "\n\n".join([readme, f"#{source[0]}", *menu])
        moved = {
            "](docs/index.md)": "](#all-pages)",
            "](docs/": "](",
            "](benchmarks/": "](../benchmarks/",
            "](CITATION": "](../CITATION",
            "](../tutorials/": "](tutorials/",
        }
    elif page.startswith("tutorials/"):
        moved = {"](../docs/": "](../", "](../benchmarks/": "](../../benchmarks/"}
    else:
        moved = {"](../README.md": "](index.md", "](../tutorials/": "](tutorials/"}
    for link, here in moved.items():
        source[0] = source[0].replace(link, here)
    if page == "tutorials/README":
        shown = r"| [![](\2.png)](\2.ipynb) [\1](\2.ipynb) ({nb-download}`file <\2.ipynb>`)"
        source[0] = re.sub(r"\| \[(.+)\]\((\w+)\.ipynb\)", shown, source[0])
    if source[0].startswith("{"):  # a notebook, whose figures say in words what the text below says
        notebook = json.loads(source[0])
        for cell, below in pairwise(notebook["cells"]):
            if "image/png" in json.dumps(cell.get("outputs", ())):
                alt = " ".join("".join(below["source"]).partition("\n\n")[0].split())
                cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
        source[0] = json.dumps(notebook)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", bring_the_tutorials)
    app.connect("autodoc-process-docstring", as_it_stands, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", as_it_parses)
    app.connect("source-read", link_to_the_site)
