"""Sphinx configuration."""

import inspect
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

project = "kfaclinalg"
author = "the kfaclinalg developers"
copyright = "2026, " + author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["examples", "tutorials", "experiments"]
templates_path = ["_templates"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autosummary_ignore_module_all = False
default_role = "code"  # single backticks in docstrings
smartquotes = False
suppress_warnings = ["config.cache"]  # of the gallery's settings

# MathJax lies beside the pages, so that their formulas are set where there is no network.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
mathjax_path = "mathjax/tex-chtml.js"

PACKAGES = ("kfaclinalg", "kfaclinalg_jax", "kfaclinalg_mlp", "kfaclinalg_torch")
# The scripts of these folders are run, and become pages with their output and pictures, and notebooks.
sphinx_gallery_conf = {
    "examples_dirs": ["tutorials", "experiments"],
    "gallery_dirs": ["auto_tutorials", "auto_experiments"],
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "run_stale_examples": True,  # the library may have changed
    "abort_on_example_error": True,
    "capture_repr": (),
    "download_all_examples": False,
    "image_srcset": ["2x"],
    "doc_module": PACKAGES,
    "reference_url": dict.fromkeys(PACKAGES),
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}


def skip_bare_field(app: Any, what: str, name: str, obj: object, *skip_and_options: Any) -> bool | None:
    """Leave out a field of a NamedTuple: `add_fields` has those with a text."""
    return True if str(obj.__doc__).startswith("Alias for field number") else None


def add_fields(app: Any, what: str, name: str, obj: object, *options_and_lines: Any) -> None:
    """The fields of a NamedTuple are documented by the comments beside them."""
    lines = options_and_lines[-1]
    if what == "class" and hasattr(obj, "_fields"):
        lines.append("")
        for field, text in re.findall(r"^    (\w+): .+?  #:? (.+)$", inspect.getsource(obj), re.MULTILINE):
            lines.append(f":param {field}: " + re.sub(r"([*|])", r"\\\1", text))


def add_mathjax(app: Any, exception: Exception | None) -> None:
    """Its script and its fonts, a twentieth of what the package has."""
    if exception is None and app.builder.format == "html":
        fonts, target = "output/chtml/fonts", Path(app.outdir, "_static", "mathjax")
        shutil.copytree(MATHJAX / fonts, target / fonts, dirs_exist_ok=True)
        shutil.copy(MATHJAX / "tex-chtml.js", target)


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_bare_field)
    app.connect("autodoc-process-docstring", add_fields)
    app.connect("build-finished", add_mathjax)
