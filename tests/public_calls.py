"""Every public function, method and argument, with something that each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import array_api_compat
import numpy as np

import kfaclinalg as kl
from kfaclinalg import spd, testing
from kfaclinalg_mlp import MLP

n, m, k, N = 3, 2, 1, 4


@dataclass(frozen=True)
class Call:
    """f(**arguments(b)), and what each argument is."""

    name: str
    f: Callable[..., Any]
    arguments: Callable[[Any], dict[str, Any]]
    kinds: dict[str, str]

    def __repr__(self) -> str:
        return self.name


def spd_of(b, size, seed=0):
    return b.array(testing.spd_matrix(np.linspace(1, 2, size), np.random.default_rng(seed)))


def dense(b, *shape, seed=1):
    return b.array(np.random.default_rng(seed).standard_normal(shape))


def factors(b, *, links=False, layers=2):
    pairs = tuple(kl.LayerFactors(spd_of(b, n), spd_of(b, m)) for _ in range(layers))
    crosses = tuple(kl.Link(0.1 * spd_of(b, n), 0.1 * spd_of(b, m)) for _ in range(layers - 1))
    return kl.Factors(pairs, crosses if links else ())


SIDES = {
    "Dense": lambda b: kl.Dense(spd_of(b, n)),
    "Diagonal": lambda b: kl.Diagonal(b.array(np.arange(1.0, n + 1))),
    "LowRankPlusDiagonal": lambda b: kl.LowRankPlusDiagonal(
        dense(b, n, k), b.array(np.ones(k)), b.array(np.arange(1.0, n + 1))
    ),
    "CholeskyInverse": lambda b: kl.CholeskyInverse(spd.cholesky(spd_of(b, n))),
}
OPERATORS = {
    "Kronecker": lambda b: kl.Kronecker(spd_of(b, n), spd_of(b, m)),
    "KroneckerBasis": lambda b: kl.KroneckerBasis(spd_of(b, n), spd_of(b, m), b.array(np.ones((m, n)))),
    "KroneckerEigen": lambda b: kl.KroneckerEigen(spd_of(b, n), spd_of(b, m), b.array(np.ones((m, n)))),
    "KroneckerPair": lambda b: kl.KroneckerPair(spd_of(b, n), spd_of(b, m), 0.1 * spd_of(b, n), spd_of(b, m)),
}
NETWORKS = {
    "BlockDiagonal": lambda b: kl.BlockDiagonal((OPERATORS["Kronecker"](b),) * 2),
    "BlockTridiagonalInverse": lambda b: kl.block_tridiagonal_inverse(factors(b, links=True), 0.1),
}


def positional(f, **given):
    return f(*given.values())


def with_first(f, **given):
    """f of the first argument by position, of the others by name."""
    (_, first), *options = given.items()
    return f(first, **dict(options))


def method(made, name):
    return lambda **given: getattr(given.pop("self"), name)(*given.values())


def of_matrices():
    square, vector, plain = {"M": "array"}, {"M": "array", "X": "array"}, {"p": 2.0, "rank": 1}
    for f, kinds in (
        (spd.inverse, square),
        (spd.cholesky, square),
        (spd.logdet, square),
        (spd.solve, vector),
        (spd.inverse_root, square | {"p": "positive"}),
        (spd.newton_schulz_inverse, square | {"start": "array"}),
        (kl.low_rank, square | {"rank": "integer"}),
        (kl.low_rank_plus_diagonal, square | {"rank": "integer"}),
    ):
        yield Call(
            f.__name__,
            lambda f=f, **given: f(*given.values()),
            lambda b, kinds=kinds: {
                name: {"M": spd_of(b, n), "X": dense(b, n, k), "start": spd_of(b, n)}.get(name, plain.get(name))
                for name in kinds
            },
            kinds,
        )
    yield Call(
        "newton_schulz_inverse, options",
        partial(with_first, spd.newton_schulz_inverse),
        lambda b: {"M": spd_of(b, n), "iterations": 9, "tolerance": 0.1},
        {"iterations": "integer", "tolerance": "positive"},
    )
    for f in (kl.low_rank, kl.low_rank_plus_diagonal):
        yield Call(
            f"{f.__name__}, options",
            lambda M, f=f, **options: f(M, 1, **options),
            lambda b: {"M": spd_of(b, n), "iterations": 2, "start": SIDES["LowRankPlusDiagonal"](b)},
            {"iterations": "integer", "start": "object"},
        )


def of_statistics():
    yield Call("homogeneous", partial(positional, kl.homogeneous), lambda b: {"a": dense(b, N, n)}, {"a": "rows"})
    yield Call("second_moment", partial(positional, kl.second_moment), lambda b: {"x": dense(b, N, n)}, {"x": "rows"})
    batch = lambda b: {"inputs": [dense(b, N, n)] * 2, "output_gradients": [dense(b, N, m)] * 2}  # noqa: E731
    sequences = {"inputs": "sequence", "output_gradients": "sequence"}
    yield Call(
        "batch_factors",
        lambda inputs, output_gradients, links: kl.batch_factors(inputs, output_gradients, links=links),
        lambda b: batch(b) | {"links": True},
        sequences | {"links": "flag"},
    )
    yield Call(
        "update_factors",
        lambda old, inputs, output_gradients, decay: kl.update_factors(old, inputs, output_gradients, decay=decay),
        lambda b: {"old": factors(b, links=True)} | batch(b) | {"decay": 0.5},
        {"old": "factors"} | sequences | {"decay": "fraction"},
    )
    yield Call(
        "moving_average",
        lambda old, new, decay: kl.moving_average(old, new, decay=decay),
        lambda b: {"old": factors(b, links=True), "new": factors(b, links=True), "decay": 0.5},
        {"old": "factors", "new": "factors", "decay": "fraction"},
    )
    yield Call(
        "averaging_decay",
        lambda iteration, maximum: kl.averaging_decay(iteration, maximum=maximum),
        lambda b: {"iteration": 3, "maximum": 0.9},
        {"iteration": "count", "maximum": "only a fraction"},
    )


def of_networks():
    layer = lambda b: factors(b).layers[0]  # noqa: E731
    yield Call(
        "tikhonov_pi",
        lambda layer, norm: kl.tikhonov_pi(layer, norm=norm),
        lambda b: {"layer": layer(b), "norm": "trace"},
        {"layer": "layer", "norm": "choice"},
    )
    yield Call(
        "factored_tikhonov",
        lambda layer, gamma, norm: kl.factored_tikhonov(layer, gamma, norm=norm),
        lambda b: {"layer": layer(b), "gamma": 0.5, "norm": "trace"},
        {"layer": "layer", "gamma": "damping", "norm": "choice"},
    )
    for f, options in (
        (kl.block_diagonal_inverse, {"norm": "trace", "method": "explicit"}),
        (kl.block_tridiagonal_inverse, {"norm": "trace"}),
        (kl.low_rank_inverse, {"rank": 1, "norm": "trace"}),
    ):
        yield Call(
            f.__name__,
            lambda factors, gamma, f=f, **options: f(factors, gamma, **options),
            lambda b, options=options, f=f: (
                {
                    "factors": factors(b, links=f is kl.block_tridiagonal_inverse),
                    "gamma": 0.5,
                }
                | options
            ),
            {"factors": "linked factors" if f is kl.block_tridiagonal_inverse else "factors", "gamma": "damping"}
            | {name: "integer" if name == "rank" else "choice" for name in options},
        )
    yield Call(
        "low_rank_inverse, start",
        lambda factors, start: kl.low_rank_inverse(factors, 0.5, rank=1, start=start),
        lambda b: {"factors": factors(b), "start": kl.low_rank_inverse(factors(b), 0.5, rank=1)},
        {"start": "object"},
    )
    yield Call(
        "exactly_damped_inverse",
        partial(positional, kl.exactly_damped_inverse),
        lambda b: {"factors": factors(b), "damping": 0.5},
        {"factors": "factors", "damping": "damping"},
    )


def of_the_algorithm():
    yield Call(
        "fit_quadratic",
        lambda **given: kl.fit_quadratic(*given.values()),
        lambda b: {
            "curvature_gram": spd_of(b, 2),
            "direction_gram": spd_of(b, 2),
            "slopes": b.array(np.ones(2)),
            "damping": 0.5,
        },
        {"curvature_gram": "array", "direction_gram": "array", "slopes": "vector", "damping": "damping"},
    )
    yield Call(
        "inner_products",
        partial(positional, kl.inner_products),
        lambda b: {"directions": [(dense(b, m, n),) * 2], "others": [(dense(b, m, n),) * 2] * 2},
        {"directions": "nested", "others": "nested"},
    )
    yield Call(
        "reduction_ratio",
        lambda **given: kl.reduction_ratio(*given.values()),
        lambda b: {"loss_before": 3.0, "loss_after": 2.0, "change": -2.0},
        {"loss_before": "number", "loss_after": "number", "change": "number"},
    )
    yield Call(
        "levenberg_marquardt",
        lambda damping, ratio, omega: kl.levenberg_marquardt(damping, ratio, omega=omega),
        lambda b: {"damping": 2.0, "ratio": 0.9, "omega": 0.5},
        {"damping": "lone damping", "ratio": "number", "omega": "fraction"},
    )
    yield Call(
        "assert_finite",
        partial(positional, kl.assert_finite),
        lambda b: {"x": dense(b, 2), "name": "x"},
        {"x": "any array", "name": "string"},
    )
    step = {"problem": "object", "weights": "matrices", "state": "object", "options": "object"}
    yield Call("kfac_step", lambda **given: kl.kfac_step(*given.values()), problem, step)
    for name, default in kl.KFACOptions()._asdict().items():
        if name != "generator":
            kind = {str: "choice", int: "integer", float: "option"}.get(type(default), "integer")
            yield Call(
                f"KFACOptions.{name}",
                lambda **given: kl.KFACOptions(**given).checked(),
                lambda b, name=name, default=default: {name: 5 if default is None else default},
                {name: kind},
            )


def constructors():
    constructors = {
        "Dense": (lambda b: {"M": spd_of(b, n)}, {"M": "array"}),
        "Diagonal": (lambda b: {"d": b.array(np.ones(n))}, {"d": "any array"}),
        "CholeskyInverse": (lambda b: {"L": spd_of(b, n)}, {"L": "array"}),
        "LowRankPlusDiagonal": (
            lambda b: {"U": dense(b, n, k), "s": b.array(np.ones(k)), "d": b.array(np.ones(n))},
            {"U": "rows", "s": "vector", "d": "vector"},
        ),
        "OuterProduct": (lambda b: {"L": dense(b, m, k), "R": dense(b, n, k)}, {"L": "rows", "R": "rows"}),
        "Kronecker": (lambda b: {"A": spd_of(b, n), "B": spd_of(b, m)}, {"A": "array", "B": "array"}),
        "KroneckerBasis": (
            lambda b: {"K_A": spd_of(b, n), "K_B": spd_of(b, m), "weights": b.array(np.ones((m, n)))},
            {"K_A": "array", "K_B": "array", "weights": "array"},
        ),
        "KroneckerEigen": (
            lambda b: {"Q_A": spd_of(b, n), "Q_B": spd_of(b, m), "eigenvalues": b.array(np.ones((m, n)))},
            {"Q_A": "array", "Q_B": "array", "eigenvalues": "array"},
        ),
        "DirectSum": (lambda b: {"members": OPERATORS["Kronecker"](b)}, {"members": "object"}),
        "KroneckerPair": (
            lambda b: {"A": spd_of(b, n), "B": spd_of(b, m), "C": spd_of(b, n), "D": spd_of(b, m)},
            dict.fromkeys("ABCD", "array"),
        ),
        "BlockDiagonal": (lambda b: {"blocks": (OPERATORS["Kronecker"](b),)}, {"blocks": "object"}),
        "BlockTridiagonalInverse": (
            lambda b: {
                "Psi_A": (spd_of(b, n),),
                "Psi_G": (spd_of(b, m),),
                "Lambda": (OPERATORS["Kronecker"](b),) * 2,
            },
            dict.fromkeys(("Psi_A", "Psi_G", "Lambda"), "object"),
        ),
    }
    for name, (arguments, kinds) in constructors.items():
        yield Call(name, partial(positional, getattr(kl, name)), arguments, kinds)


def of_operators():
    for name, made in SIDES.items():
        for verb, kinds in {
            "apply": {"X": "array"},
            "__matmul__": {"X": "array"},
            "apply_right": {"X": "array"},
            "solve": {"X": "array"},
            "shifted": {"shift": "any number"},
            "inverse_root": {"p": "positive"},
        }.items():
            X = (lambda b: dense(b, k, n)) if verb == "apply_right" else (lambda b: dense(b, n, k))
            yield Call(
                f"{name}.{verb}",
                method(made, verb),
                lambda b, made=made, kinds=kinds, X=X: (
                    {"self": made(b)} | {a: X(b) if a == "X" else 2.0 for a in kinds}
                ),
                kinds,
            )
    for name, made in OPERATORS.items():
        for verb in ("apply", "__matmul__", "solve"):
            yield Call(
                f"{name}.{verb}",
                method(made, verb),
                lambda b, made=made: {"self": made(b), "V": dense(b, m, n)},
                {"V": "array"},
            )


def with_options():
    kron = OPERATORS["Kronecker"]
    yield Call(
        "Kronecker.apply_outer",
        method(kron, "apply_outer"),
        lambda b: {"self": kron(b), "L": dense(b, m, k), "R": dense(b, n, k)},
        {"L": "array", "R": "array"},
    )
    for verb, argument, kind, value in (
        ("inverse_root", "p", "positive", 2.0),
        ("shifted_inverse", "shift", "damping", 0.5),
    ):
        yield Call(
            f"Kronecker.{verb}",
            method(kron, verb),
            lambda b, argument=argument, value=value: {"self": kron(b), argument: value},
            {argument: kind},
        )
    pair = OPERATORS["KroneckerPair"]
    for name, made, verb in (
        ("Kronecker", kron, "inverse"),
        ("LowRankPlusDiagonal", SIDES["LowRankPlusDiagonal"], "inverse"),
        ("KroneckerPair", pair, "inverse"),
    ):
        usual = {"Kronecker": "explicit", "LowRankPlusDiagonal": "woodbury", "KroneckerPair": "eigh"}[name]
        yield Call(
            f"{name}.{verb}, method",
            lambda self, method: self.inverse(method=method),
            lambda b, made=made, usual=usual: {"self": made(b), "method": usual},
            {"method": "choice"},
        )
    yield Call(
        "KroneckerPair.solve, method",
        lambda self, V, method: self.solve(V, method),
        lambda b: {"self": pair(b), "V": dense(b, m, n), "method": "smith"},
        {"V": "array", "method": "choice"},
    )
    for name, made in NETWORKS.items():
        for verb in ("apply", "__matmul__", *(["solve"] if name == "BlockDiagonal" else [])):
            yield Call(
                f"{name}.{verb}",
                method(made, verb),
                lambda b, made=made: {"self": made(b), "Vs": (dense(b, m, n),) * 2},
                {"Vs": "matrices"},
            )
    for name, made in (SIDES | OPERATORS | NETWORKS).items():
        yield Call(
            f"{name}.astype",
            method(made, "astype"),
            lambda b, made=made: {"self": made(b), "dtype": b.array(1.0).dtype},
            {"dtype": "object"},
        )
        yield Call(
            f"{name}.to_device",
            method(made, "to_device"),
            lambda b, made=made: {"self": made(b), "device": array_api_compat.device(b.array(1.0))},
            {"device": "object"},
        )
        yield Call(
            f"{name}.to_namespace",
            lambda self, xp: self.to_namespace(xp),
            lambda b, made=made: {"self": made(b), "xp": np},
            {"xp": "object"},
        )


def problem(b):
    mlp, x = MLP(("identity",), "gaussian"), dense(b, N, n)
    made = mlp.problem(x, x, rng=np.random.default_rng(0), statistics_fraction=1, curvature_fraction=1)
    state = kl.kfac_step(made, (dense(b, n, n + 1),), None, kl.KFACOptions())[1]
    return {"problem": made, "weights": (dense(b, n, n + 1),), "state": state, "options": kl.KFACOptions()}


CALLS = [
    call
    for some in (of_matrices, of_statistics, of_networks, of_the_algorithm, constructors, of_operators, with_options)
    for call in some()
]
