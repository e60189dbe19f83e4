"""kfaclinalg in a run of the peers' benchmark: what its jobs are, in this library's own calls.

Each function returns what that benchmark times; `jobs` and `peers.torch_common` come with it.
"""

import jobs
from peers import torch_common as tc
from peers.torch_common import tt

import kfaclinalg as kf
from kfaclinalg_torch import KFACPreconditioner

NAME, FRAMEWORK, VERSION = "kfaclinalg", "torch", "0.1.0"
VARIANTS = ["empirical", "sampled"]


def factor_update(m, d, dtype):
    """J1: A <- w A + (1 - w) aᵀa / m, and the same for G."""
    a, g = tt(jobs.activations(m, d, dtype, 1)), tt(jobs.activations(m, d, dtype, 2))
    state = [kf.batch_factors([a], [g])]

    def update():
        state[0] = kf.update_factors(state[0], [a], [g], decay=jobs.EMA_OLD)

    return {"kfaclinalg": update}


def refresh(d, dtype):
    """J2: the π-damped inverses of A and G."""
    layer = kf.LayerFactors(tt(jobs.spd(d, dtype, 1)), tt(jobs.spd(d, dtype, 2)))
    factors = kf.Factors((layer,))
    return {"kfaclinalg": lambda: kf.block_diagonal_inverse(factors, jobs.DAMPING**0.5)}


def precondition(shapes, dtype):
    """J3: G⁻¹ V A⁻¹ for every layer."""
    layers = []
    for k, (m, n) in enumerate(shapes):
        A, G = tt(jobs.spd(n, dtype, 2 * k)), tt(jobs.spd(m, dtype, 2 * k + 1))
        layers.append((kf.Kronecker(A, G), tt(jobs.rng(k).standard_normal((m, n)).astype(dtype))))
    return {"kfaclinalg": lambda: [P @ V for P, V in layers]}


def kron_matvec(p, q, dtype):
    """J6a: A V B for an A on the side of the rows: in this library's order (B ⊗ A) @ V."""
    A, B = tt(jobs.spd(p, dtype, 1)), tt(jobs.spd(q, dtype, 2))
    P, V = kf.Kronecker(B, A), tt(jobs.activations(p, q, dtype, 3))
    return {"kfaclinalg": lambda: P @ V}


def kron_sum_solve(p, q, dtype):
    """J6b: the X with A X B + C X D = V, by the inverse of B ⊗ A + D ⊗ C."""
    A, B = tt(jobs.spd(p, dtype, 1)), tt(jobs.spd(q, dtype, 2))
    C, D = tt(jobs.spd(p, dtype, 3)), tt(jobs.spd(q, dtype, 4))
    P, V = kf.KroneckerPair(B, A, D, C), tt(jobs.activations(p, q, dtype, 5))
    inverse = P.inverse()
    ways = {
        "kfaclinalg": lambda: P.inverse() @ V,
        "kfaclinalg, refined": lambda: P.solve(V),
        "kfaclinalg, apply only": lambda: inverse @ V,
    }
    for solve in ways.values():
        X = solve()
        solve.residual = float((A @ X @ B + C @ X @ D - V).abs().max() / V.abs().max())
    return ways


def lowrank_solve(d, k, dtype):
    """J7: (U Uᵀ + diag)⁻¹ v."""
    U, v = tt(jobs.activations(d, k, dtype, 1)), tt(jobs.activations(d, 1, dtype, 2))
    diagonal = tt(abs(jobs.activations(d, 1, dtype, 3))[:, 0] + dtype.type(0.5))
    M = kf.LowRankPlusDiagonal(U, U.new_ones(k), diagonal)
    inverse = M.inverse()
    ways = {
        "kfaclinalg": lambda: M.inverse() @ v,
        "kfaclinalg, refined": lambda: M.solve(v),
        "kfaclinalg, apply only": lambda: inverse @ v,
    }
    for solve in ways.values():
        solve.residual = float((M @ solve() - v).abs().max() / v.abs().max())
    return ways


def make_step(spec, m, stats_every, inverse_every, variant):
    """J4, J5: one whole training step."""
    net = tc.model(spec)
    x, y = tc.data(spec, m)
    criterion, optimizer = tc.loss_fn(spec), tc.sgd(net)
    likelihood = "bernoulli" if spec["loss"] == "bce" else "categorical"
    sampled = variant == "sampled"  # the empirical estimator takes the loss's own gradients
    preconditioner = KFACPreconditioner(
        net,
        likelihood=likelihood if sampled else None,
        estimator=variant,
        damping=jobs.DAMPING,
        decay=jobs.EMA_OLD,
        statistics_period=stats_every,
        inverse_period=inverse_every,
    )

    def step():
        optimizer.zero_grad(set_to_none=True)
        outputs = net(x)
        if sampled:
            preconditioner.update(outputs)
        loss = criterion(outputs, y)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        return loss

    step.loss = lambda: float(criterion(net(x), y))
    return step
