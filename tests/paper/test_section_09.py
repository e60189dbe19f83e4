"""Algorithm 2: what happens in which iteration, with T1 = 5, T2 = T3 = 20 of Section 13."""

import math

import pytest
from backends import NUMPY
from test_algorithm import LinearRegression, run

from kfaclinalg import KFACOptions


def test_the_order_of_events():
    options = KFACOptions(damping=1.0)
    _, state, infos = run(LinearRegression(NUMPY), options, 45)
    k = range(1, 46)
    assert [info.refreshed for info in infos] == [i <= 3 or i % 20 == 0 for i in k]
    assert [not math.isnan(info.ratio) for info in infos] == [i % 5 == 0 for i in k]
    gammas = [info.gamma for info in infos]
    omega2 = math.sqrt(0.95) ** 20
    assert gammas[:19] == [math.sqrt(1 + 1e-5)] * 19
    assert any(gammas[19] == pytest.approx(gammas[0] * factor) for factor in (1, omega2, 1 / omega2))
    assert len(set(gammas[19:39])) == 1
    assert state.iteration == 45
    assert all(info.damping >= 1e-5 for info in infos)
    assert all(info.gamma >= math.sqrt(1e-5) for info in infos)
