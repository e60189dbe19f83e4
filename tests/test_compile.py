"""`torch.compile` takes every public call whole, and computes the same."""

import warnings

import pytest
import torch
from traced_calls import COLD, HOT, arguments


def kinds():
    """The calls of one class or module together: most of a compilation is what they share."""
    found = {}
    for name, (f, _) in (HOT | COLD).items():
        kind = name.replace(",", " ").replace(".", " ").split()[0]
        found.setdefault(kind if kind[0].isupper() else kind.split("_")[0], {})[name] = f
    return found


def in_turn(fs):
    def run(*args):
        results = {}
        for name, f in fs.items():
            results[name] = f(*args)
        return results

    return run


def taken_whole(fs):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # array-api-compat's own caches; Dynamo traces through them
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        return torch.compile(in_turn(fs), fullgraph=True, backend="eager")(*arguments())


@pytest.mark.parametrize("fs", kinds().values(), ids=kinds())
def test_torch_compile_takes_them_whole(fs, monkeypatch):
    monkeypatch.setattr("kfaclinalg.kronecker_pair.SQUARINGS", 12)  # enough for it to underflow: each is traced
    results, expected = taken_whole(fs), in_turn(fs)(*arguments())
    for name in fs:
        torch.testing.assert_close(results[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_one_that_cannot_be_compiled_fails_for_all():
    """What waits for a value stops Dynamo, whatever stands beside it."""
    with pytest.raises(torch._dynamo.exc.Unsupported):
        taken_whole({"fine": lambda A, G, V: A @ A, "waits": lambda A, G, V: A if A[0, 0] > 0 else -A})
