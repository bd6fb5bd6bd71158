"""The documentation site: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

from typing import Any

from tutelage.version import __version__

project, author, project_copyright = "Tutelage", "The Tutelage developers", "The Tutelage developers, Apache-2.0"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # links to headings as on GitHub: page.md#heading

html_theme = "furo"
html_title = "Tutelage"
html_show_sphinx = False
html_use_index = False  # its page of names is wider than a telephone, and the search finds them
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]

default_role = "code"  # of `text` in docstrings
smartquotes = False  # "--flag" and {"key"} as they are
napoleon_custom_sections = ["Returns"]  # as plain text: the part before its first colon is not always a type
autodoc_mock_imports = ["torch"]  # nothing is computed here, and its import takes longer than most pages
autodoc_typehints = "signature"
autodoc_member_order = "bysource"


def without_settings(app: Any, what: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Leave a command's arguments out of its docstring: they are its flags, which cli.md lists with ranges and defaults."""
    if hasattr(it, "settings") and "Args:" in lines:
        del lines[lines.index("Args:") : lines.index("Returns:")]


def setup(app: Any) -> None:
    """Run `without_settings` before napoleon reads a docstring."""
    app.connect("autodoc-process-docstring", without_settings, priority=100)
