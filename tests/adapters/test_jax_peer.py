"""The factors are those of kfac-jax, in float64, where it is installed: `make jax` has an environment for it."""

import sys
from pathlib import Path

import jax
import pytest

pytest.importorskip("kfac_jax")
sys.path.insert(0, str(Path(__file__).parents[2] / "asv_benchmarks"))

from jax_peers import FACTORS, compared


@pytest.mark.parametrize(("network", "likelihood"), FACTORS[1:])
def test_the_factors_are_those_of_kfac_jax(network, likelihood):
    """Theirs of the squared error are of ‖y - z‖², and ours of half of it."""
    with jax.enable_x64(True):
        difference, theirs_over_ours, layers = compared(network, likelihood)
    assert layers > 1
    assert difference <= 1e-9
    assert theirs_over_ours == pytest.approx(2 if likelihood == "gaussian" else 1, rel=1e-9)
