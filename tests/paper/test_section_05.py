"""The moving averages of A and G."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfaclinalg import Factors, LayerFactors, averaging_decay, moving_average


@given(values=st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_the_average_starts_as_the_plain_mean(values):
    """ε = 1 - 1/k: no start value biases it."""
    average = None
    for k, value in enumerate(values, start=1):
        new = Factors((LayerFactors(np.full((1, 1), value), np.ones((1, 1))),))
        average = moving_average(average, new, decay=averaging_decay(k))
    np.testing.assert_allclose(average.layers[0].A.item(), np.mean(values), atol=1e-14)


def test_averaging_decay():
    assert averaging_decay(1) == 0
    assert averaging_decay(20) == pytest.approx(0.95)
    assert averaging_decay(21) == 0.95
    assert averaging_decay(1000, maximum=0.5) == 0.5
    with pytest.raises(ValueError, match="iteration is 0"):
        averaging_decay(0)
