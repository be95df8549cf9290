"""How Sphinx makes the site of these pages: ``make docs``."""

from typing import Any

from pyro_blora import __version__

project = "pyro_blora"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
smartquotes_action = "qe"  # two hyphens begin an option
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
autodoc_default_options = {
    "members": True,
    "undoc-members": True,  # constants; docstrings of all else are held by a test
    "show-inheritance": True,
}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Reference"]


def skip_fields(app: Any, what: str, name: str, member: object, skip: bool, options: Any) -> Any:
    """Fields of a class are in its docstring already, under Attributes or Args."""
    field = what == "class" and not callable(getattr(member, "__func__", member))
    return True if field and not isinstance(member, property) else None


def link_to_the_site(app: Any, page: str, source: list[str]) -> None:
    """The README, outside of these pages, is the site's first one."""
    source[0] = source[0].replace("](../README.md)", "](index.md)")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("source-read", link_to_the_site)
