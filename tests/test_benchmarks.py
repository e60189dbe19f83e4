"""Every public operation has a benchmark, and every benchmark is of one that exists."""

import inspect

import numpy as np
import pytest

import kfaclinalg
import kfaclinalg_torch

core = pytest.importorskip("benchmarks.core", reason="asv_benchmarks/ is not beside tests/")
steps = pytest.importorskip("benchmarks.steps")
from benchmarks import conversions  # noqa: E402
from benchmarks.backends import backend  # noqa: E402
from benchmarks.operation import Arrays, moved  # noqa: E402

RECORDS = {"Problem", "Structure", "LinAlgError"}  # and the NamedTuples: they hold, and compute nothing
BENCHMARKED = {name.split()[0] for name in core.OPERATIONS} | set(steps.OPERATIONS)
# Eigenvectors have a sign, a subspace many bases, a rank-k correction many forms; `assert_finite` gives nothing.
NOT_UNIQUE = {
    "assert_finite",
    "Kronecker.shifted_inverse",
    "Kronecker.eigh",
    "KroneckerPair.inverse",
    "exactly_damped_inverse",
}
NOT_UNIQUE |= {"low_rank", "low_rank_plus_diagonal", "low_rank_inverse", "block_tridiagonal_inverse"}
NOT_UNIQUE |= {"Exact.fitted", "Eigen.fitted", "Exact.inverse", "Eigen.inverse", "Eigen.observed"}
NOT_UNIQUE |= {"LowRank.inverse", "Tridiagonal.inverse"}
NOT_UNIQUE |= {"LowRankPlusDiagonal.inverse", "LowRankPlusDiagonal.inverse sherman-morrison"}


NOTHING = {"Factored.fitted", "Tridiagonal.fitted", "LowRank.fitted"}  # they give what they got


def public():
    """The functions, the methods of operators, those of `spd`, and the optimizers; `testing` is not for speed."""
    yield from (name for name in kfaclinalg_torch.__all__ if name.startswith("KFAC"))
    yield from (f"spd.{name}" for name, f in vars(kfaclinalg.spd).items() if _is_public(name, f, kfaclinalg.spd))
    for name in set(kfaclinalg.__all__) - RECORDS:
        thing = getattr(kfaclinalg, name)
        if inspect.isfunction(thing) and thing is not kfaclinalg.show_config:
            yield name
        elif inspect.isclass(thing) and not issubclass(thing, tuple):
            yield from (f"{name}.{method}" for method, f in inspect.getmembers(thing) if _is_public(method, f))


def _is_public(name, f, module=None):
    if module is not None and getattr(f, "__module__", None) != module.__name__:
        return False
    return inspect.isfunction(f) and (name == "__matmul__" or name[0] != "_")


def test_every_public_operation_has_a_benchmark():
    operations = set(public()) - NOTHING
    assert {"spd.solve", "KroneckerPair.solve", "Kronecker.__matmul__", "Diagonal.astype", "KFAC"} <= operations
    assert operations == BENCHMARKED


def test_asv_finds_a_class_for_each():
    found = {f.pretty_name for f in vars(core).values() if hasattr(f, "track_ratio") and hasattr(f, "time_ours")}
    assert found == set(core.OPERATIONS)


def numbers(result):
    return np.concatenate([np.ravel(x) for x in conversions.arrays(result)])


@pytest.mark.parametrize("name", sorted(set(core.OPERATIONS) - NOT_UNIQUE))
def test_the_floor_gives_the_values_of_ours(name):
    operation, by = core.OPERATIONS[name], backend("torch" if "torch" in core.OPERATIONS[name].backends else "numpy")
    arguments = moved(by, operation.arguments(Arrays(by, operation.dtypes[-1]), 16))
    ours, floor = numbers(operation.ours(*arguments)), numbers(operation.floor(by, *arguments))
    rounding = 1e3 * np.finfo(operation.dtypes[-1]).eps * np.max(abs(floor))
    np.testing.assert_allclose(ours, floor, rtol=0, atol=rounding)
