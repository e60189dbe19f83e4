"""What a whole network takes: statistics, damping, inverse curvature, block operators, the quadratic model."""

import kfaclinalg as kf

from . import network_by_hand as net
from .operation import Operation, operations
from .operators import shifted_inverse

SIZES = {"sizes": (64, 256, 512)}
NUMBERS = {"sizes": (1,), "backends": ("numpy",), "dtypes": ("float32",)}  # of Python
OPERATIONS = {
    **operations(
        "",
        net.batch,
        {
            "homogeneous": (
                lambda a, g: kf.homogeneous(a[0]),
                lambda by, a, g: by.xp.concatenate([a[0], by.xp.ones_like(a[0][:, :1])], 1),
            ),
            "second_moment": (lambda a, g: kf.second_moment(a[0]), lambda by, a, g: by.moment(a[0])),
            "batch_factors": (kf.batch_factors, net.moments),
            "batch_factors links": (
                lambda a, g: kf.batch_factors(a, g, links=True),
                lambda by, a, g: (net.moments(by, a, g), net.links(a, g)),
            ),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (kf.Factors(net.factors(new, n).layers), *net.batch(new, n)),
        {
            "update_factors": (
                lambda F, a, g: kf.update_factors(F, a, g, decay=net.DECAY),
                lambda by, F, a, g: [
                    by.updated(net.DECAY, C, x)
                    for layer, *pair in zip(F.layers, a, g, strict=True)
                    for C, x in zip(layer, pair, strict=True)
                ],
            ),
            "moving_average": (
                lambda F, a, g: kf.moving_average(F, F, decay=net.DECAY),
                lambda by, F, a, g: net.mixed(by, F),
            ),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (net.factors(new, n).layers[0],),
        {
            **{f"tikhonov_pi {kind}": net.norms(kind) for kind in ("trace", "frobenius", "spectral")},
            "factored_tikhonov": (lambda layer: kf.factored_tikhonov(layer, net.GAMMA), net.damped),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (net.factors(new, n),),
        {
            "block_diagonal_inverse": (lambda F: kf.block_diagonal_inverse(F, net.GAMMA), net.block_diagonal),
            "block_tridiagonal_inverse": (lambda F: kf.block_tridiagonal_inverse(F, net.GAMMA), net.block_tridiagonal),
            "exactly_damped_inverse": (
                lambda F: kf.exactly_damped_inverse(F, 0.1),
                lambda by, F: [shifted_inverse(by, kf.Kronecker(*layer), None) for layer in F.layers],
            ),
        },
        **SIZES,
    ),
    "low_rank_inverse": Operation(
        lambda new, n: (
            net.factors(new, n),
            [new.matrix(d, n // 8 + 5) for _ in range(net.LAYERS) for d in (n, n // 2)],
        ),
        lambda F, _: kf.low_rank_inverse(F, net.GAMMA, rank=len(F.layers[0].A) // 8),
        net.low_rank_inverse,
        **SIZES,
    ),
    "LowRank.inverse": Operation(
        lambda new, n: (
            net.factors(new, n),
            [new.matrix(d, n // 8 + 5) for _ in range(net.LAYERS) for d in (n, n // 2)],
        ),
        lambda F, _: kf.LowRank(len(F.layers[0].A) // 8).inverse(F, net.GAMMA),
        net.low_rank_inverse,
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (net.factors(new, n),),
        {
            "Factored.inverse": (lambda F: kf.Factored().inverse(F, net.GAMMA), net.block_diagonal),
            "Tridiagonal.inverse": (lambda F: kf.Tridiagonal().inverse(F, net.GAMMA), net.block_tridiagonal),
            "Exact.fitted": (lambda F: kf.Exact().fitted(F, None), net.spectra),
            "Eigen.fitted": (lambda F: kf.Eigen().fitted(F, None), net.spectra),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (kf.Exact().fitted(net.factors(new, n), None),),
        {
            "Exact.inverse": (lambda F: kf.Exact().inverse(F, net.GAMMA), net.shifted_reciprocals),
            "Eigen.inverse": (lambda F: kf.Eigen().inverse(F, net.GAMMA), net.shifted_reciprocals),
            "Eigen.observed": (
                lambda F: kf.Eigen().observed(F, [Q.eigenvalues for Q in F], decay=net.DECAY),
                lambda by, F: [net.DECAY * Q.eigenvalues + (1 - net.DECAY) * Q.eigenvalues for Q in F],
            ),
        },
        **SIZES,
    ),
    **operations(
        "BlockDiagonal.",
        net.blocks,
        {
            "__matmul__": (lambda P, Vs: P @ Vs, net.each(lambda by, P, V: P.B @ V @ P.A.mT)),
            "apply": (lambda P, Vs: P.apply(Vs), net.each(lambda by, P, V: P.B @ V @ P.A.mT)),
            "inverse": (lambda P, Vs: P.inverse(), net.each(lambda by, P, V: (by.inverse(P.A), by.inverse(P.B)))),
            "solve": (lambda P, Vs: P.solve(Vs), net.each(lambda by, P, V: by.solve(P.A, by.solve(P.B, V).mT).mT)),
            "logdet": (lambda P, Vs: P.logdet(), net.total(lambda by, P, V: net.kronecker_logdet(by, P))),
            "trace": (lambda P, Vs: P.trace(), net.total(lambda by, P, V: P.A.trace() * P.B.trace())),
            "diagonal": (
                lambda P, Vs: P.diagonal(),
                net.each(lambda by, P, V: by.xp.outer(by.xp.diagonal(P.B), by.xp.diagonal(P.A))),
            ),
        },
        **SIZES,
    ),
    "BlockDiagonal.gram": Operation(
        net.batches, lambda P, Us: P.gram(Us, Us), net.total(lambda by, P, U: net.gram(U, P.B @ U @ P.A.mT)), **SIZES
    ),
    **operations(
        "DirectSum.",
        net.members,
        {
            "__matmul__": (lambda P, V: P @ V, lambda by, P, V: P.members.B @ V @ P.members.A.mT),
            "apply": (lambda P, V: P.apply(V), lambda by, P, V: P.members.B @ V @ P.members.A.mT),
            "trace": (
                lambda P, V: P.trace(),
                lambda by, P, V: (net.traces(P.members.A) * net.traces(P.members.B)).sum(),
            ),
            "diagonal": (lambda P, V: P.diagonal(), net.outer_diagonals),
            "inverse": (
                lambda P, V: P.inverse().members,
                lambda by, P, V: [by.la.inv(M) for M in (P.members.A, P.members.B)],
            ),
            "solve": (lambda P, V: P.solve(V), lambda by, P, V: by.la.inv(P.members.B) @ V @ by.la.inv(P.members.A)),
            "logdet": (lambda P, V: P.logdet(), net.logdets),
            "gram": (
                lambda P, V: P.gram(V[None], V[None]),
                lambda by, P, V: net.gram(V[None], P.members.B @ V @ P.members.A.mT),
            ),
        },
        sizes=(8, 32),
    ),
    "DirectSum.to_dense": Operation(net.members, lambda P, V: P.to_dense(), net.dense_members, sizes=(4, 8)),
    "BlockDiagonal.to_dense": Operation(net.blocks, lambda P, Vs: P.to_dense(), net.dense_blocks, sizes=(8, 16)),
    **operations(
        "BlockTridiagonalInverse.",
        net.tridiagonal,
        {
            "__matmul__": (lambda P, Vs: P @ Vs, net.sweeps),
            "apply": (lambda P, Vs: P.apply(Vs), net.sweeps),
            "logdet": (lambda P, Vs: P.logdet(), net.tridiagonal_logdet),
        },
        **SIZES,
    ),
    "BlockTridiagonalInverse.gram": Operation(
        lambda new, n: (net.tridiagonal(new, n)[0], net.batches(new, n)[1]),
        lambda P, Us: P.gram(Us, Us),
        lambda by, P, Us: sum(net.gram(U, W) for U, W in zip(Us, net.sweeps(by, P, Us), strict=True)),
        **SIZES,
    ),
    "BlockTridiagonalInverse.to_dense": Operation(
        net.tridiagonal, lambda P, Vs: P.to_dense(), net.dense_tridiagonal, sizes=(8, 16)
    ),
    "fit_quadratic": Operation(
        lambda new, n: (new.spd(n), new.spd(n), new.matrix(n)),
        lambda F, D, slopes: kf.fit_quadratic(F, D, slopes, 0.1),
        net.fit,
        sizes=(1, 2),
    ),
    "inner_products": Operation(
        lambda new, n: (net.matrices(new, n), net.matrices(new, n)),
        lambda x, y: kf.inner_products([x, y], [x, y]),
        lambda by, x, y: [
            sum(by.xp.vdot(X.reshape(-1), Y.reshape(-1)) for X, Y in zip(*pair, strict=True))
            for pair in ((x, x), (x, y), (y, x), (y, y))
        ],
    ),
    "averaging_decay": Operation(
        lambda new, n: (), lambda: kf.averaging_decay(7), lambda by: min(1 - 1 / 7, net.DECAY), **NUMBERS
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
