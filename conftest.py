"""Every Python snippet of the README and of the documentation is a test. Those of one page share their names."""

import pytest
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own for what a snippet saves."""
    monkeypatch.chdir(tmp_path)


pages = Sybil([PythonCodeBlockParser(), SkipParser()], pattern="*.md", fixtures=["elsewhere"])
pytest_collect_file = pages.pytest()
