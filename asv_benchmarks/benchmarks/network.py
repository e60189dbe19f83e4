"""What a whole network takes: statistics, damping, inverse curvature, block operators, the quadratic model."""

import kfaclinalg as kf

from .network_by_hand import (
    DECAY,
    GAMMA,
    LAYERS,
    batch,
    block_diagonal,
    block_tridiagonal,
    blocks,
    damped,
    dense_blocks,
    dense_tridiagonal,
    each,
    factors,
    fit,
    kronecker_logdet,
    links,
    low_rank_inverse,
    matrices,
    mixed,
    moments,
    norms,
    sweeps,
    total,
    tridiagonal,
    tridiagonal_logdet,
)
from .operation import Operation, operations
from .operators import shifted_inverse

SIZES = {"sizes": (64, 256, 512)}
NUMBERS = {"sizes": (1,), "backends": ("numpy",), "dtypes": ("float32",)}  # of Python
OPERATIONS = {
    **operations(
        "",
        batch,
        {
            "homogeneous": (
                lambda a, g: kf.homogeneous(a[0]),
                lambda by, a, g: by.xp.concatenate([a[0], by.xp.ones_like(a[0][:, :1])], 1),
            ),
            "batch_factors": (kf.batch_factors, moments),
            "batch_factors links": (
                lambda a, g: kf.batch_factors(a, g, links=True),
                lambda by, a, g: (moments(by, a, g), links(a, g)),
            ),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (kf.Factors(factors(new, n).layers), *batch(new, n)),
        {
            "update_factors": (
                lambda F, a, g: kf.update_factors(F, a, g, decay=DECAY),
                lambda by, F, a, g: [
                    by.updated(DECAY, C, x)
                    for layer, *pair in zip(F.layers, a, g, strict=True)
                    for C, x in zip(layer, pair, strict=True)
                ],
            ),
            "moving_average": (
                lambda F, a, g: kf.moving_average(F, F, decay=DECAY),
                lambda by, F, a, g: mixed(by, F),
            ),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (factors(new, n).layers[0],),
        {
            **{f"tikhonov_pi {kind}": norms(kind) for kind in ("trace", "frobenius", "spectral")},
            "factored_tikhonov": (lambda layer: kf.factored_tikhonov(layer, GAMMA), damped),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (factors(new, n),),
        {
            "block_diagonal_inverse": (lambda F: kf.block_diagonal_inverse(F, GAMMA), block_diagonal),
            "block_tridiagonal_inverse": (lambda F: kf.block_tridiagonal_inverse(F, GAMMA), block_tridiagonal),
            "exactly_damped_inverse": (
                lambda F: kf.exactly_damped_inverse(F, 0.1),
                lambda by, F: [shifted_inverse(by, kf.Kronecker(*layer), None) for layer in F.layers],
            ),
        },
        **SIZES,
    ),
    "low_rank_inverse": Operation(
        lambda new, n: (
            factors(new, n),
            [new.matrix(d, n // 8 + 5) for _ in range(LAYERS) for d in (n, n // 2)],
        ),
        lambda F, _: kf.low_rank_inverse(F, GAMMA, rank=len(F.layers[0].A) // 8),
        low_rank_inverse,
        **SIZES,
    ),
    **operations(
        "BlockDiagonal.",
        blocks,
        {
            "__matmul__": (lambda P, Vs: P @ Vs, each(lambda by, P, V: P.B @ V @ P.A.mT)),
            "apply": (lambda P, Vs: P.apply(Vs), each(lambda by, P, V: P.B @ V @ P.A.mT)),
            "inverse": (lambda P, Vs: P.inverse(), each(lambda by, P, V: (by.inverse(P.A), by.inverse(P.B)))),
            "solve": (lambda P, Vs: P.solve(Vs), each(lambda by, P, V: by.solve(P.A, by.solve(P.B, V).mT).mT)),
            "logdet": (lambda P, Vs: P.logdet(), total(lambda by, P, V: kronecker_logdet(by, P))),
            "trace": (lambda P, Vs: P.trace(), total(lambda by, P, V: P.A.trace() * P.B.trace())),
            "diagonal": (
                lambda P, Vs: P.diagonal(),
                each(lambda by, P, V: by.xp.outer(by.xp.diagonal(P.B), by.xp.diagonal(P.A))),
            ),
        },
        **SIZES,
    ),
    "BlockDiagonal.to_dense": Operation(blocks, lambda P, Vs: P.to_dense(), dense_blocks, sizes=(8, 16)),
    **operations(
        "BlockTridiagonalInverse.",
        tridiagonal,
        {
            "__matmul__": (lambda P, Vs: P @ Vs, sweeps),
            "apply": (lambda P, Vs: P.apply(Vs), sweeps),
            "logdet": (lambda P, Vs: P.logdet(), tridiagonal_logdet),
        },
        **SIZES,
    ),
    "BlockTridiagonalInverse.to_dense": Operation(
        tridiagonal, lambda P, Vs: P.to_dense(), dense_tridiagonal, sizes=(8, 16)
    ),
    "fit_quadratic": Operation(
        lambda new, n: (new.spd(n), new.spd(n), new.matrix(n)),
        lambda F, D, slopes: kf.fit_quadratic(F, D, slopes, 0.1),
        fit,
        sizes=(1, 2),
    ),
    "inner_products": Operation(
        lambda new, n: (matrices(new, n), matrices(new, n)),
        lambda x, y: kf.inner_products([x, y], [x, y]),
        lambda by, x, y: [
            sum(by.xp.vdot(X.reshape(-1), Y.reshape(-1)) for X, Y in zip(*pair, strict=True))
            for pair in ((x, x), (x, y), (y, x), (y, y))
        ],
    ),
    "averaging_decay": Operation(
        lambda new, n: (), lambda: kf.averaging_decay(7), lambda by: min(1 - 1 / 7, DECAY), **NUMBERS
    ),
    "reduction_ratio": Operation(
        lambda new, n: (), lambda: kf.reduction_ratio(3.0, 2.0, -2.0), lambda by: (2.0 - 3.0) / -2.0, **NUMBERS
    ),
    "levenberg_marquardt": Operation(
        lambda new, n: (),
        lambda: kf.levenberg_marquardt(1.0, 0.9, omega=0.5),
        lambda by: 0.5 * 1.0,
        **NUMBERS,
    ),
}
