"""A row of the tables, `Operation`, and the asv class that is made of each row."""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from statistics import median
from timeit import Timer
from typing import Any, NamedTuple

import numpy as np

from .backends import QUICK, backend

ROUNDS, SECONDS = (1, 0.0) if QUICK else (5, 0.1)  # of a ratio: at least and about


class Operation(NamedTuple):
    """One public operation of the library."""

    arguments: Callable[..., tuple[Any, ...]]  # of (new, n), `new` an `Arrays`
    ours: Callable[..., Any]  # of the arguments
    floor: Callable[..., Any]  # of the backend and the arguments: the fewest calls by hand that give the same values
    sizes: tuple[int, ...] = (64, 256, 1024)
    backends: tuple[str, ...] = ("numpy", "torch", "jax", "cupy", "cuda")
    dtypes: tuple[str, ...] = ("float32", "float64")
    mode: str = "compiled"  # or "eager": what JAX cannot trace


def operations(owner, arguments, pairs, **options):
    """Rows for the methods of `owner`, each (ours, floor), on the same arguments."""
    return {owner + name: Operation(arguments, ours, floor, **options) for name, (ours, floor) in pairs.items()}


class Arrays:
    """Random NumPy arrays; what is made of them goes to the backend `by` as a whole."""

    def __init__(self, by, dtype):
        self.by, self.dtype, self.rng = by, dtype, np.random.default_rng(0)

    def matrix(self, *shape):
        return self.rng.standard_normal(shape).astype(self.dtype)

    def positive(self, *shape):
        return self.rng.uniform(0.5, 1.5, shape).astype(self.dtype)

    def spd(self, n):
        """A second moment of 2n samples, which is what a factor is."""
        x = self.matrix(2 * n, n)
        return x.T @ x / (2 * n)


def moved(by, x):
    """`x`, an array or what holds some, with the backend's arrays in their place."""
    if isinstance(x, np.ndarray):
        return by.asarray(x)
    if type(x) in (tuple, list):
        return type(x)(moved(by, y) for y in x)
    names = getattr(x, "__match_args__", ())
    return type(x)(*(moved(by, getattr(x, name)) for name in names)) if names else x


class _Benchmark:
    param_names = ("backend", "dtype", "n")
    rounds, repeat, warmup_time, timeout = 1, (3, 20, 0.05), 0, 300

    def setup(self, *params):
        self.ours, self.floor = prepared(self.operation, *params)

    def time_ours(self, *params):
        self.ours()

    def track_ratio(self, *params):
        return ratio(self.ours, self.floor)

    track_ratio.unit = "ratio to the floor"


def asv_classes(rows, module, backends):
    """The namespace of asv's classes: `Kronecker.inverse` becomes `Kronecker_inverse`."""
    classes = {}
    for name, row in rows.items():
        params = [[b for b in backends if b in row.backends], list(row.dtypes), list(row.sizes)]
        if QUICK:
            params = [["+".join(params[0])], row.dtypes[:1], row.sizes[:1]]
        if params[0]:
            identifier = re.sub(r"\W", "_", name.replace("__", ""))
            attributes = {"operation": row, "params": params, "pretty_name": name, "__module__": module}
            classes[identifier] = type(identifier, (_Benchmark,), attributes)
    return classes


@lru_cache(maxsize=1)  # asv sets up before every sample
def prepared(operation, backends, dtype, n):
    """Ours and the floor as functions of nothing, warm, that return when the result is there."""
    runs = [[], []]
    for by in map(backend, backends.split("+")):
        arguments = moved(by, operation.arguments(Arrays(by, dtype), n))
        for kind, f in zip(runs, (operation.ours, partial(operation.floor, by)), strict=True):
            kind.append(partial(_run, by, by.compiled(f) if operation.mode == "compiled" else f, arguments))
    ours, floor = (runs_of_all[0] if len(runs_of_all) == 1 else partial(_each, runs_of_all) for runs_of_all in runs)
    ours(), floor()
    return ours, floor


def _run(by, f, arguments):
    by.wait(f(*arguments))


def _each(runs):
    for run in runs:
        run()


def ratio(ours, floor):
    """The median over rounds in turn of the time of ours to that of the floor."""
    timers = Timer(ours), Timer(floor)
    once = timers[1].timeit(1) + 1e-7
    number = 1 if QUICK else max(1, int(1e-3 / once))
    rounds = max(ROUNDS, min(100, int(SECONDS / (2 * number * once))))
    pairs = [[timer.timeit(number) for timer in timers] for _ in range(rounds)]
    return median(mine / theirs for mine, theirs in pairs)
