"""Sphinx configuration."""

from typing import Any

project = "kfaclinalg"
author = "the kfaclinalg developers"
copyright = "2026, " + author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
default_role = "code"  # single backticks in docstrings
smartquotes = False


def skip_bare_field(app: Any, what: str, name: str, obj: object, *skip_and_options: Any) -> bool | None:
    """Leave out a field of a NamedTuple that has no text of its own."""
    return True if str(obj.__doc__).startswith("Alias for field number") else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_bare_field)
