"""The table of errors over eps, a default dtype, and the settings of hypothesis and of the garbage collector."""

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from matrices import worst

torch.set_num_threads(1)  # the matrices are small: a second thread would only wait for the first
settings.register_profile("kfaclinalg", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("kfaclinalg")


@pytest.fixture
def double() -> Iterator[None]:
    """torch's own layers in float64."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collection_finish() -> None:
    """The modules and the tests live to the end: every collection would look at their objects again."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors", action="store_true", help="print the largest errors (with -n 0)")
    parser.addoption("--fuzz", type=int, default=1000, help="how many odd calls to try")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--errors"):
        terminalreporter.section("largest c, error = c * unit of the bound (c <= 10)")
        for (operation, backend), c in sorted(worst.items()):
            terminalreporter.line(f"{operation:28} {backend:24} {c:8.3f}")
