import math

import pytest

from kfaclinalg import KFACOptions


def test_the_defaults_are_the_contract():
    options = KFACOptions().checked()
    assert options == (
        *("block-diagonal", 1.0, 1e-5, "quadratic-model"),
        *(5, 0.95, 20, math.sqrt(0.95), 20),
        *(1 / 8, 1 / 4, 0.95, "trace", None, None),
    )
    assert options.omega1 == pytest.approx((19 / 20) ** 5)
    assert options.omega2 == pytest.approx(math.sqrt(19 / 20) ** 20)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("structure", "dense", "one of 'block-diagonal', 'block-tridiagonal', 'eigen'"),
        ("momentum", True, "one of 'quadratic-model', 'none'"),
        ("pi_norm", "nuclear", "one of 'trace', 'frobenius', 'spectral'"),
        ("damping", -1.0, "a finite number >= 0"),
        ("damping", math.inf, "a finite number >= 0"),
        ("weight_decay", math.nan, "a finite number >= 0"),
        ("damping_decay", 0.0, "a number in (0, 1]"),
        ("gamma_decay", 1.5, "a number in (0, 1]"),
        ("statistics_fraction", 0, "a number in (0, 1]"),
        ("curvature_fraction", 1.1, "a number in (0, 1]"),
        ("damping_period", 0, "an integer >= 1"),
        ("gamma_period", 2.5, "an integer >= 1"),
        ("inverse_period", 7, "a divisor of gamma_period = 20"),
        ("chunk_size", 0, "an integer >= 1"),
        ("averaging_maximum", 1.0, "a number in [0, 1)"),
    ],
)
def test_a_wrong_option_is_named(name, value, expected):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared as a whole
        KFACOptions(**{name: value}).checked()
    assert str(error.value) == f"{name} is {value!r}, expected {expected}"[: len(str(error.value))]
    assert expected in str(error.value)


def test_a_short_form_is_one_value_for_all_steps():
    assert KFACOptions().structure_value is KFACOptions(damping=2.0).structure_value
    assert KFACOptions(pi_norm="spectral").structure_value.norm == "spectral"
